"""Text encoders and image VAEs that stock pipelines share."""

from __future__ import annotations

from omni.models.stock_part import Part

QWEN25_VL_7B = Part(
    library="transformers",
    class_name="Qwen2_5_VLForConditionalGeneration",
    full={
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"hidden_size": 1280},
    },
    small={"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4}},
    tiny={
        "text_config": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [2, 3, 3]},
            "bos_token_id": 510,
            "eos_token_id": 511,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": 500,
        "video_token_id": 501,
        "vision_start_token_id": 502,
        "vision_end_token_id": 503,
    },
)

QWEN3_4B = Part(
    library="transformers",
    class_name="Qwen3Model",
    full={
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    small={"num_hidden_layers": 8},
    tiny={
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
)

T5_XXL = Part(
    library="transformers",
    class_name="T5EncoderModel",
    full={
        "d_model": 4096,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    },
    small={"num_layers": 4},
    tiny={"vocab_size": 512, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
)

UMT5_XXL = Part(
    library="transformers",
    class_name="UMT5EncoderModel",
    full={
        "vocab_size": 256384,
        "d_model": 4096,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "is_encoder_decoder": False,
        "use_cache": False,
    },
    small={"num_layers": 4},
    tiny=T5_XXL.tiny,
)

GEMMA3_12B = Part(
    library="transformers",
    class_name="Gemma3ForConditionalGeneration",
    full={
        "text_config": {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    small={"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 2}},
    tiny={
        "text_config": {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
        },
        "mm_tokens_per_image": 4,
        "boi_token_index": 500,
        "eoi_token_index": 501,
        "image_token_index": 502,
    },
)

_CLIP_TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
    "bos_token_id": 510,
    "eos_token_id": 511,
    "pad_token_id": 1,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_L = Part(library="transformers", class_name="CLIPTextModel", full=_CLIP_L, tiny=_CLIP_TINY)
CLIP_L_PROJECTED = Part(library="transformers", class_name="CLIPTextModelWithProjection", full=_CLIP_L, tiny=_CLIP_TINY)
CLIP_G_PROJECTED = Part(
    library="transformers",
    class_name="CLIPTextModelWithProjection",
    full={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    small={"num_hidden_layers": 8},
    tiny=_CLIP_TINY,
)


def kl_vae(scaling_factor: float, shift_factor: float) -> Part:
    """The 16-channel AutoencoderKL of FLUX, Stable Diffusion 3 and Z-Image."""
    return Part(
        library="diffusers",
        class_name="AutoencoderKL",
        full={
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": scaling_factor,
            "shift_factor": shift_factor,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        tiny={"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 32},
    )
