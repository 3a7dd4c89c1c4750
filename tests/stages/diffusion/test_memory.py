"""How often components run and what they take: against peaks that were counted on stock classes."""

from __future__ import annotations

from typing import Any

import pytest

from omni.checkpoint import CheckpointFacts
from omni.component_facts import ComponentFacts
from omni.memory import ComponentUse
from omni.spec import BatchingSpec, DiffusionSpec
from stages.diffusion.memory import hidden_size, uses

MIB = 1024**2
KL = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16}
QWEN_VAE = {
    "_class_name": "AutoencoderKLQwenImage", "base_dim": 96, "z_dim": 16, "temperal_downsample": [False, True, True]
}  # fmt: skip
QWEN = {
    "_class_name": "QwenImageTransformer2DModel", "patch_size": 2, "in_channels": 64, "num_attention_heads": 24,
    "attention_head_dim": 128, "guidance_embeds": False,
}  # fmt: skip
FLUX = {**QWEN, "_class_name": "FluxTransformer2DModel", "patch_size": 1, "guidance_embeds": True}
SD3 = {
    "_class_name": "SD3Transformer2DModel", "patch_size": 2, "in_channels": 16, "num_attention_heads": 24,
    "attention_head_dim": 64, "sample_size": 128,
}  # fmt: skip
Z_IMAGE = {"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "in_channels": 16, "dim": 3840}
WAN = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "in_channels": 16, "num_attention_heads": 40,
    "attention_head_dim": 128,
}  # fmt: skip
WAN_VAE = {**QWEN_VAE, "_class_name": "AutoencoderKLWan"}
LTX_VAE = {
    "_class_name": "AutoencoderKLLTXVideo", "block_out_channels": [128, 256, 512, 512], "latent_channels": 128,
    "decoder_block_out_channels": [128, 256, 512, 512], "spatio_temporal_scaling": [True, True, True, False],
    "patch_size": 4,
}  # fmt: skip
LTX = {
    "_class_name": "LTXVideoTransformer3DModel", "patch_size": 1, "in_channels": 128, "num_attention_heads": 32,
    "attention_head_dim": 64,
}  # fmt: skip
SQUARE = {"height": 1024, "width": 1024, "guidance_scale": 1.0}
WIDE = {"height": 480, "width": 832, "num_frames": 81, "guidance_scale": 1.0}


def uses_of(call: dict[str, Any], **configs: dict[str, Any]) -> dict[str, ComponentUse]:
    parts = {name: ComponentFacts({"BF16": 8}, config=config) for name, config in configs.items()}
    facts = CheckpointFacts(dict.fromkeys(parts, 8), parts=parts)
    return uses(DiffusionSpec(model="m", dtype="bfloat16", call=call), facts)


COUNTED = [
    ("Qwen-Image", QWEN, QWEN_VAE, SQUARE, 396, 3652),
    ("Qwen-Image, 2048", QWEN, QWEN_VAE, {**SQUARE, "height": 2048, "width": 2048}, 1556, None),
    ("FLUX", FLUX, KL, SQUARE, 522, 1921),
    ("SD3, guided", SD3, KL, {"height": 1024, "width": 1024}, 348, 1921),
    ("SD3, sizes of its own", SD3, KL, {"guidance_scale": 5.0}, 348, 1921),
    ("Z-Image", Z_IMAGE, KL, SQUARE, 513, 1921),
    ("Wan", WAN, WAN_VAE, WIDE, 4188, 4340),
    ("LTX", LTX, LTX_VAE, {"height": 512, "width": 768, "num_frames": 121, "guidance_scale": 1.0}, 435, 4571),
]


@pytest.mark.parametrize(("denoiser", "vae", "call", "forward", "decode"), [row[1:] for row in COUNTED],
                         ids=[row[0] for row in COUNTED])  # fmt: skip
def test_estimates_are_near_what_was_counted(
    denoiser: dict[str, Any], vae: dict[str, Any], call: dict[str, Any], forward: int, decode: int | None
) -> None:
    """Peaks of torch's allocations in one forward, in MiB: the denoiser's within a third, the decoder's within 5 %."""
    found = uses_of(call, transformer=denoiser, vae=vae)
    assert found["transformer"].activation_bytes / MIB == pytest.approx(forward, rel=0.35)
    if decode is not None:
        assert found["vae"].activation_bytes / MIB == pytest.approx(decode, rel=0.05)


def test_runs() -> None:
    found = uses_of({"num_inference_steps": 8, "true_cfg_scale": 4.0}, transformer=QWEN, vae=QWEN_VAE, text_encoder={})
    assert {name: use.num_runs for name, use in found.items()} == {"transformer": 16, "vae": 1, "text_encoder": 1}
    assert found["transformer"].calls_per_step == 2
    assert [use.may_stream for use in found.values()] == [True, False, True]
    two = uses_of({"num_inference_steps": 9}, transformer=WAN, transformer_2=WAN, vae=WAN_VAE)
    assert [use.num_runs for use in two.values()] == [5, 5, 1]


def test_requests_that_are_joined_take_as_much_as_all_of_them() -> None:
    configs = {"transformer": QWEN, "vae": QWEN_VAE}
    parts = {name: ComponentFacts({"BF16": 8}, config=config) for name, config in configs.items()}
    facts = CheckpointFacts(dict.fromkeys(parts, 8), parts=parts)

    def taken(side: int, **batching: int) -> int:
        spec = DiffusionSpec(
            model="m", call={"height": side, "width": side, "guidance_scale": 1}, batching=BatchingSpec(**batching)
        )
        return uses(spec, facts)["transformer"].activation_bytes

    assert taken(512, max_requests=8) == 8 * taken(512)
    assert taken(1024, max_requests=8) == 4 * taken(1024)
    assert taken(4096, max_requests=8) == taken(4096)


def test_sound() -> None:
    vae = {"sampling_rate": 44100, "decoder_channels": 128}
    found = uses_of({"audio_end_in_s": 10}, transformer={"sample_size": 1024, "dim": 64}, vae=vae)
    assert found["vae"].activation_bytes == 441_000 * 128 * 15
    assert found["transformer"].activation_bytes == 2 * (1024 + 512) * 64 * 16 * 2


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"hidden_size": 8}, 8),
        ({"d_model": 9}, 9),
        ({"text_config": {"hidden_size": 7}}, 7),
        ({"num_attention_heads": 2, "attention_head_dim": 5}, 10),
        ({"block_out_channels": [320, 640], "attention_head_dim": [5, 10]}, 320),
        ({"hidden_size": "wide", "num_attention_heads": None}, 0),
        ({}, 0),
    ],
)
def test_hidden_size(config: dict[str, Any], size: int) -> None:
    assert hidden_size(config) == size


@pytest.mark.parametrize(
    "call", [{"height": "tall", "num_inference_steps": None}, {"num_frames": [1]}, {"width": True}]
)
def test_odd_calls_and_configs_give_numbers(call: dict[str, Any]) -> None:
    odd = {"patch_size": [], "in_channels": "x", "block_out_channels": [], "_class_name": None, "sample_size": [64, 64]}
    odd_vae = {**odd, "temperal_downsample": None, "spatio_temporal_scaling": 3, "latent_channels": "x"}
    found = uses_of(call, unet=odd, vae=odd_vae, text_encoder=odd)
    assert all(use.activation_bytes >= 0 and use.num_runs >= 1 for use in found.values())
