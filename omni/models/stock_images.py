"""Stock components of the pipelines that make pictures."""

from __future__ import annotations

from omni.models.stock_encoders import (
    CLIP_G_PROJECTED,
    CLIP_L,
    CLIP_L_PROJECTED,
    QWEN3_4B,
    QWEN25_VL_7B,
    T5_XXL,
    kl_vae,
)
from omni.models.stock_part import Part

QWEN_IMAGE = {
    "text_encoder": QWEN25_VL_7B,
    "transformer": Part(
        library="diffusers",
        class_name="QwenImageTransformer2DModel",
        small={"num_layers": 3},
        tiny={
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 64,
            "axes_dims_rope": [8, 4, 4],
        },
        depths={"num_layers": 60},
    ),
    "vae": Part(
        library="diffusers",
        class_name="AutoencoderKLQwenImage",
        tiny={"base_dim": 8, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    ),
}

FLUX = {
    "text_encoder": CLIP_L,
    "text_encoder_2": T5_XXL,
    "transformer": Part(
        library="diffusers",
        class_name="FluxTransformer2DModel",
        full={"guidance_embeds": True},
        small={"num_layers": 2, "num_single_layers": 4},
        tiny={
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        depths={"num_layers": 19, "num_single_layers": 38},
    ),
    "vae": kl_vae(0.3611, 0.1159),
}

SD35 = {
    "text_encoder": CLIP_L_PROJECTED,
    "text_encoder_2": CLIP_G_PROJECTED,
    "text_encoder_3": T5_XXL,
    "transformer": Part(
        library="diffusers",
        class_name="SD3Transformer2DModel",
        full={
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        small={"num_layers": 4},
        tiny={
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "caption_projection_dim": 64,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 32,
            "sample_size": 32,
        },
        depths={"num_layers": 38},
    ),
    "vae": kl_vae(1.5305, 0.0609),
}

Z_IMAGE = {
    "text_encoder": QWEN3_4B,
    "transformer": Part(
        library="diffusers",
        class_name="ZImageTransformer2DModel",
        small={"n_layers": 6},
        tiny={
            "n_layers": 2,
            "n_refiner_layers": 1,
            "dim": 64,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 64,
            "axes_dims": [8, 4, 4],
        },
        depths={"n_layers": 30},
    ),
    "vae": kl_vae(0.3611, 0.1159),
}
