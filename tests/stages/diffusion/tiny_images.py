"""Tiny pipelines that draw pictures, and inputs for them."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from tests.stages.diffusion.tiny_parts import flow, kl_vae, random, redraw, two_embeds


def qwen(num_layers: int = 2) -> Any:
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=num_layers,
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


def flux(num_layers: int = 1) -> Any:
    transformer = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=num_layers,
        num_single_layers=num_layers,
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


def sd3(num_layers: int = 2) -> Any:
    transformer = d.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=num_layers,
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


def z_image(num_layers: int = 1) -> Any:
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=64,
        n_layers=num_layers,
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
