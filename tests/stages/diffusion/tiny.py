"""Tiny random pipelines of many families, saved as folders, and the stage calls that fit them.

Text encoders are left out, so that embeddings come in as tensors. Gates that start at zero get random weights, because
a denoiser that answers zero would hide every fault.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import msgspec
import numpy as np
import torch
from PIL import Image


class Family(msgspec.Struct, frozen=True):
    """One tiny pipeline."""

    build: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    """variant -> inputs that the stage gets; other variants have other values of the same shapes."""
    call: dict[str, Any]
    """The spec's `call`, without num_inference_steps."""
    port: str
    pipeline: str | None = None
    """The spec's `pipeline`, where it is not the class that was saved."""


def random(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers that depend on `seed` only."""
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed))


def picture(seed: int, size: int) -> Image.Image:
    """A noisy square picture."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def redraw(module: torch.nn.Module, spread: float = 0.08) -> Any:
    """`module` with random weights everywhere, also where the class starts with zeros."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            gain = "norm" in name and name.endswith("weight") and weight.dim() < 2
            weight.copy_(1 + noise * 0.1 if gain else noise * spread)
    return module.eval()


def flow() -> Any:
    return d.FlowMatchEulerDiscreteScheduler()


def kl_vae(channels: int) -> Any:
    return redraw(
        d.AutoencoderKL(
            sample_size=32,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
            scaling_factor=1.5,
        )
    )


def wan_vae() -> Any:
    vae = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return redraw(vae, spread=0.3)


def qwen() -> Any:
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = d.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return d.QwenImagePipeline(
        scheduler=flow(), vae=redraw(vae), text_encoder=None, tokenizer=None, transformer=redraw(transformer)
    )


def qwen_inputs(seed: int) -> dict[str, Any]:
    mask = torch.ones(1, 8, dtype=torch.long)
    return {
        "prompt_embeds": random(seed, 1, 8, 16),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": random(seed + 50, 1, 8, 16),
        "negative_prompt_embeds_mask": mask,
    }


def flux() -> Any:
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return d.FluxPipeline(
        scheduler=flow(),
        vae=kl_vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=redraw(transformer),
    )


def flux_inputs(seed: int) -> dict[str, Any]:
    return {"prompt_embeds": random(seed, 1, 8, 32), "pooled_prompt_embeds": random(seed + 50, 1, 32)}


def flux2_klein() -> Any:
    transformer = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = d.AutoencoderKLFlux2(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return d.Flux2KleinPipeline(
        scheduler=flow(), vae=vae.eval(), text_encoder=None, tokenizer=None, transformer=redraw(transformer)
    )


def two_embeds(width: int) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {
        "prompt_embeds": random(seed, 1, 8, width),
        "negative_prompt_embeds": random(seed + 50, 1, 8, width),
    }


def sd3() -> Any:
    transformer = d.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return d.StableDiffusion3Pipeline(
        scheduler=flow(),
        vae=kl_vae(4),
        transformer=redraw(transformer),
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),
    )


def sd3_inputs(seed: int) -> dict[str, Any]:
    return {
        **two_embeds(32)(seed),
        "pooled_prompt_embeds": random(seed + 60, 1, 64),
        "negative_pooled_prompt_embeds": random(seed + 70, 1, 64),
    }


def wan_transformer(channels: int) -> Any:
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
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    )


def wan() -> Any:
    """Wan 2.2: two denoisers, one for the noisy steps and one for the rest."""
    return d.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(16),
        transformer_2=wan_transformer(16),
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


def z_image() -> Any:
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=64,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return d.ZImagePipeline(
        scheduler=flow(), vae=kl_vae(4), text_encoder=None, tokenizer=None, transformer=redraw(transformer)
    )


def z_image_inputs(seed: int) -> dict[str, Any]:
    return {"prompt_embeds": [random(seed, 8, 16)], "negative_prompt_embeds": [random(seed + 50, 8, 16)]}


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


def ltx2() -> Any:
    """Video with sound."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    transformer = d.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=32,
        rope_double_precision=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = d.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    audio_vae = d.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=24000,
    )
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


LTX2_CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 16,
    "use_cross_timestep": False,
    **dict.fromkeys(("guidance_scale", "audio_guidance_scale", "modality_scale", "audio_modality_scale"), 1.0),
    **dict.fromkeys(("stg_scale", "audio_stg_scale", "guidance_rescale", "audio_guidance_rescale"), 0.0),
}


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


FAMILIES = {
    "qwen": Family(qwen, qwen_inputs, {"true_cfg_scale": 4.0, "height": 32, "width": 32}, "images"),
    "flux": Family(flux, flux_inputs, {"guidance_scale": 3.5, "height": 32, "width": 32}, "images"),
    "flux_img2img": Family(
        flux,
        lambda seed: {**flux_inputs(seed), "image": picture(seed, 32)},
        {"strength": 0.6, "height": 32, "width": 32},
        "images",
        "FluxImg2ImgPipeline",
    ),
    "flux2_klein": Family(flux2_klein, two_embeds(16), {"guidance_scale": 4.0, "height": 32, "width": 32}, "images"),
    "sd3": Family(sd3, sd3_inputs, {"guidance_scale": 5.0, "height": 32, "width": 32}, "images"),
    "wan": Family(wan, two_embeds(32), {"height": 16, "width": 16, "num_frames": 9}, "video"),
    "wan_i2v": Family(
        wan_image_to_video,
        lambda seed: {**two_embeds(32)(seed), "image": picture(seed, 16)},
        {"height": 16, "width": 16, "num_frames": 9},
        "video",
    ),
    "z_image": Family(z_image, z_image_inputs, {"guidance_scale": 5.0, "height": 32, "width": 32}, "images"),
    "stable_audio": Family(stable_audio, two_embeds(8), {"guidance_scale": 6.0}, "audio"),
    "ltx2": Family(ltx2, ltx2_inputs, LTX2_CALL, "video"),
    "hunyuan_video": Family(hunyuan_video, hunyuan_video_inputs, {"height": 16, "width": 16, "num_frames": 5}, "video"),
}


def save(name: str, root: Path) -> Path:
    """Save the pipeline of family `name` under `root`, once."""
    build = FAMILIES[name].build
    folder = root / build.__name__
    if not folder.exists():
        build().save_pretrained(folder)
    return folder
