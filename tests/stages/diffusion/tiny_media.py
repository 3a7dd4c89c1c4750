"""Tiny pipelines that make video, sound, or both, and inputs for them."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from tests.stages.diffusion.tiny_parts import flow, random, redraw


def wan_vae() -> Any:
    vae = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return redraw(vae, spread=0.3)


def wan_transformer(channels: int, num_layers: int = 2) -> Any:
    return redraw(
        d.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=channels,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=num_layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    )


def wan(num_layers: int = 2) -> Any:
    """Wan 2.2: two denoisers, one for the noisy steps and one for the rest."""
    return d.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(16, num_layers),
        transformer_2=wan_transformer(16, num_layers),
        boundary_ratio=0.875,
    )


def wan_image_to_video() -> Any:
    return d.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=d.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        transformer=wan_transformer(36),
        transformer_2=None,
        image_encoder=None,
        image_processor=None,
    )


def stable_audio() -> Any:
    from transformers import T5Config, T5EncoderModel

    transformer = d.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    vae = d.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = d.StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=4, min_value=0, max_value=32)
    encoder = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=50))
    return d.StableAudioPipeline(
        vae=redraw(vae),
        text_encoder=encoder.eval(),
        projection_model=redraw(projection),
        tokenizer=None,
        transformer=redraw(transformer),
        scheduler=d.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )


def hunyuan_video() -> Any:
    transformer = d.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return d.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=redraw(transformer),
        vae=vae.eval(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=d.ClassifierFreeGuidance(guidance_scale=6.0),
    )


def hunyuan_video_inputs(seed: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for number, (suffix, width) in enumerate((("", 16), ("_2", 32))):
        for sign, prefix in enumerate(("", "negative_")):
            inputs[f"{prefix}prompt_embeds{suffix}"] = random(seed + 10 * number + 20 * sign, 1, 8, width)
            inputs[f"{prefix}prompt_embeds_mask{suffix}"] = torch.ones(1, 8)
    return inputs


LTX2_TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "qk_norm": "rms_norm_across_heads",
    "caption_channels": 32,
    "rope_double_precision": False,
    "rope_type": "split",
}
LTX2_CONNECTORS: dict[str, Any] = {
    "caption_channels": 32,
    "text_proj_in_factor": 3,
    "video_connector_num_attention_heads": 4,
    "video_connector_attention_head_dim": 8,
    "video_connector_num_layers": 1,
    "video_connector_num_learnable_registers": None,
    "audio_connector_num_attention_heads": 4,
    "audio_connector_attention_head_dim": 8,
    "audio_connector_num_layers": 1,
    "audio_connector_num_learnable_registers": None,
    "connector_rope_base_seq_len": 32,
    "rope_theta": 10000.0,
    "rope_double_precision": False,
    "causal_temporal_positioning": False,
    "rope_type": "split",
}
LTX2_VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8,),
    "decoder_block_out_channels": (8,),
    "layers_per_block": (1,),
    "decoder_layers_per_block": (1, 1),
    "spatio_temporal_scaling": (True,),
    "decoder_spatio_temporal_scaling": (True,),
    "decoder_inject_noise": (False, False),
    "downsample_type": ("spatial",),
    "upsample_residual": (False,),
    "upsample_factor": (1,),
    "timestep_conditioning": False,
    "patch_size": 1,
    "patch_size_t": 1,
    "encoder_causal": True,
    "decoder_causal": False,
}
LTX2_AUDIO_VAE: dict[str, Any] = {
    "base_channels": 4,
    "output_channels": 2,
    "ch_mult": (1,),
    "num_res_blocks": 1,
    "attn_resolutions": None,
    "in_channels": 2,
    "resolution": 32,
    "latent_channels": 2,
    "norm_type": "pixel",
    "causality_axis": "height",
    "dropout": 0.0,
    "mid_block_add_attention": False,
    "sample_rate": 16000,
    "mel_hop_length": 160,
    "is_causal": True,
    "mel_bins": 8,
}
LTX2_VOCODER: dict[str, Any] = {
    "in_channels": 16,
    "hidden_channels": 32,
    "out_channels": 2,
    "upsample_kernel_sizes": [4, 4],
    "upsample_factors": [2, 2],
    "resnet_kernel_sizes": [3],
    "resnet_dilations": [[1, 3, 5]],
    "output_sampling_rate": 24000,
}
LTX2_CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 16,
    "use_cross_timestep": False,
    **dict.fromkeys(("guidance_scale", "audio_guidance_scale", "modality_scale", "audio_modality_scale"), 1.0),
    **dict.fromkeys(("stg_scale", "audio_stg_scale", "guidance_rescale", "audio_guidance_rescale"), 0.0),
}


def ltx2(num_layers: int = 2) -> Any:
    """Video with sound."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    transformer = d.LTX2VideoTransformer3DModel(**{**LTX2_TRANSFORMER, "num_layers": num_layers})
    connectors = LTX2TextConnectors(**LTX2_CONNECTORS)
    vae = d.AutoencoderKLLTX2Video(**LTX2_VAE)
    audio_vae = d.AutoencoderKLLTX2Audio(**LTX2_AUDIO_VAE)
    vocoder = LTX2Vocoder(**LTX2_VOCODER)
    return d.LTX2Pipeline(
        scheduler=flow(),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=None,
        tokenizer=None,
        connectors=redraw(connectors),
        transformer=redraw(transformer),
        vocoder=vocoder.eval(),
    )


def ltx2_inputs(seed: int) -> dict[str, Any]:
    return {
        "prompt_embeds": random(seed, 1, 16, 96),
        "prompt_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }
