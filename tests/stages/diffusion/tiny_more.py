"""Further tiny pipelines, for what is tried on as many denoisers as possible."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from tests.stages.diffusion.tiny_parts import flow, kl_vae, random, redraw, two_embeds


def stable_diffusion() -> Any:
    """A UNet, with guidance as a batch of two."""
    unet = d.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return d.StableDiffusionPipeline(
        scheduler=d.DDIMScheduler(),
        vae=kl_vae(4),
        unet=redraw(unet),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    """A UNet with further conditions in a dict."""
    unet = d.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=64,
        norm_num_groups=4,
    )
    return d.StableDiffusionXLPipeline(
        scheduler=d.EulerDiscreteScheduler(),
        vae=kl_vae(4),
        unet=redraw(unet),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )


def stable_diffusion_xl_inputs(seed: int) -> dict[str, Any]:
    return {
        **two_embeds(16)(seed),
        "pooled_prompt_embeds": random(seed + 60, 1, 16),
        "negative_pooled_prompt_embeds": random(seed + 70, 1, 16),
    }


def masked_embeds(width: int, dtype: torch.dtype = torch.long, name: str = "attention_mask") -> Any:
    """Embeddings with masks, for both branches of guidance."""
    return lambda seed: {
        **two_embeds(width)(seed),
        f"prompt_{name}": torch.ones(1, 8, dtype=dtype),
        f"negative_prompt_{name}": torch.ones(1, 8, dtype=dtype),
    }


def pixart() -> Any:
    transformer = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
    )
    return d.PixArtSigmaPipeline(
        scheduler=d.DDIMScheduler(), vae=kl_vae(4), transformer=redraw(transformer), text_encoder=None, tokenizer=None
    )


def lumina2() -> Any:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        ffn_dim_multiplier=None,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=16,
    )
    return d.Lumina2Pipeline(
        scheduler=flow(), vae=kl_vae(4), transformer=redraw(transformer), text_encoder=None, tokenizer=None
    )


def chroma() -> Any:
    transformer = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return d.ChromaPipeline(
        scheduler=flow(), vae=kl_vae(4), transformer=redraw(transformer), text_encoder=None, tokenizer=None
    )


def sana() -> Any:
    transformer = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
    )
    vae = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return d.SanaPipeline(
        scheduler=flow(), vae=redraw(vae), transformer=redraw(transformer), text_encoder=None, tokenizer=None
    )


def cogvideox() -> Any:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )
    vae = d.AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return d.CogVideoXPipeline(
        scheduler=d.CogVideoXDDIMScheduler(),
        vae=redraw(vae),
        transformer=redraw(transformer),
        text_encoder=None,
        tokenizer=None,
    )


def hidream() -> Any:
    """A mixture of experts, with the samples of one input along its second dimension."""
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(128, 128),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    names += ("text_encoder_3", "tokenizer_3", "text_encoder_4", "tokenizer_4")
    return d.HiDreamImagePipeline(
        scheduler=flow(), vae=kl_vae(4), transformer=redraw(transformer), **dict.fromkeys(names)
    )


def hidream_inputs(seed: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for number, prefix in enumerate(("", "negative_")):
        inputs[f"{prefix}prompt_embeds_t5"] = random(seed + 50 * number, 1, 8, 32)
        inputs[f"{prefix}prompt_embeds_llama3"] = random(seed + 50 * number + 10, 2, 1, 8, 16)
        inputs[f"{prefix}pooled_prompt_embeds"] = random(seed + 50 * number + 20, 1, 64)
    return inputs
