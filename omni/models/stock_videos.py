"""Stock components of the pipelines that make video, with or without sound."""

from __future__ import annotations

from omni.models.stock_encoders import GEMMA3_12B, UMT5_XXL
from omni.models.stock_part import Part

_WAN_TRANSFORMER = Part(
    library="diffusers",
    class_name="WanTransformer3DModel",
    small={"num_layers": 4},
    tiny={
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "ffn_dim": 128,
        "text_dim": 64,
        "rope_max_seq_len": 64,
    },
    depths={"num_layers": 40},
)

WAN22 = {
    "text_encoder": UMT5_XXL,
    "transformer": _WAN_TRANSFORMER,
    "transformer_2": _WAN_TRANSFORMER,
    "vae": Part(
        library="diffusers",
        class_name="AutoencoderKLWan",
        tiny={"base_dim": 8, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    ),
}

_TINY_LTX2 = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
}

LTX2 = {
    "text_encoder": GEMMA3_12B,
    "connectors": Part(
        library="diffusers",
        class_name="pipelines.ltx2.LTX2TextConnectors",
        full={"rope_type": "split"},
        tiny={
            "caption_channels": 32,
            "text_proj_in_factor": 3,
            "video_connector_num_attention_heads": 2,
            "video_connector_attention_head_dim": 16,
            "video_connector_num_layers": 1,
            "video_connector_num_learnable_registers": 16,
            "audio_connector_num_attention_heads": 2,
            "audio_connector_attention_head_dim": 16,
            "audio_connector_num_layers": 1,
            "audio_connector_num_learnable_registers": 16,
        },
    ),
    "transformer": Part(
        library="diffusers",
        class_name="LTX2VideoTransformer3DModel",
        full={"rope_type": "split"},
        small={"num_layers": 6},
        tiny={"num_layers": 2, "in_channels": 16, "out_channels": 16, "caption_channels": 32, **_TINY_LTX2},
        depths={"num_layers": 48},
    ),
    "vae": Part(
        library="diffusers",
        class_name="AutoencoderKLLTX2Video",
        full={"decoder_causal": False, "timestep_conditioning": False},
        tiny={
            "latent_channels": 16,
            "block_out_channels": [8, 8, 16, 16],
            "decoder_block_out_channels": [8, 16, 32],
            "layers_per_block": [1, 1, 1, 1, 1],
            "decoder_layers_per_block": [1, 1, 1, 1],
        },
    ),
    "audio_vae": Part(
        library="diffusers",
        class_name="AutoencoderKLLTX2Audio",
        tiny={"base_channels": 8, "num_res_blocks": 1, "latent_channels": 2, "mel_bins": 16},
    ),
    "vocoder": Part(
        library="diffusers", class_name="pipelines.ltx2.LTX2Vocoder", tiny={"in_channels": 32, "hidden_channels": 64}
    ),
}
