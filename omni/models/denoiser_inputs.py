"""Random inputs of one denoise step, for each class of denoiser that the stock configurations have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omni.errors import UsageError

NUM_TEXT_TOKENS = 256
AUDIO_LATENTS_PER_SECOND = 25
FRAMES_PER_SECOND = 24


class Maker:
    """Draws normal numbers for a denoiser, the same for the same seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """On the device, in the denoiser's dtype."""
        return torch.randn(shape, generator=self._generator).to(self._device, self._dtype)

    def number(self, value: float) -> torch.Tensor:
        """A batch of one number, float32."""
        return torch.tensor([value], device=self._device)

    def zeros(self, *shape: int) -> torch.Tensor:
        """On the device, in the denoiser's dtype."""
        return torch.zeros(shape, device=self._device, dtype=self._dtype)


def build_inputs(
    denoiser: Any, height: int, width: int, num_frames: int = 1, *, device: str, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """Arguments of one call of `denoiser` for a picture or clip of that size, without classifier-free guidance.

    Sizes are in pixels. Raises UsageError for a class without a builder, and for a size that its patches do not fill.
    """
    name = type(denoiser).__name__
    if name not in BUILDERS:
        raise UsageError(f"{name}: no inputs are known for this class; there are {', '.join(BUILDERS)}")
    unit, build = BUILDERS[name]
    if height % unit or width % unit or min(height, width, num_frames) < 1:
        raise UsageError(f"{width}x{height}: {name} takes multiples of {unit} pixels")
    maker = Maker(device, dtype, seed)
    return {**build(maker, denoiser.config, height // unit, width // unit, num_frames), "return_dict": False}


def _qwen_image(maker: Maker, config: Any, rows: int, columns: int, num_frames: int) -> dict[str, Any]:
    return {
        "hidden_states": maker.normal(1, rows * columns, config.in_channels),
        "encoder_hidden_states": maker.normal(1, NUM_TEXT_TOKENS, config.joint_attention_dim),
        "timestep": maker.number(0.5),
        "img_shapes": [[(1, rows, columns)]],
        "guidance": maker.number(4.0) if config.guidance_embeds else None,
    }


def _flux(maker: Maker, config: Any, rows: int, columns: int, num_frames: int) -> dict[str, Any]:
    places = maker.zeros(rows, columns, 3)
    places[..., 1] += torch.arange(rows, device=places.device)[:, None]
    places[..., 2] += torch.arange(columns, device=places.device)[None, :]
    return {
        "hidden_states": maker.normal(1, rows * columns, config.in_channels),
        "encoder_hidden_states": maker.normal(1, NUM_TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": maker.normal(1, config.pooled_projection_dim),
        "timestep": maker.number(0.5),
        "img_ids": places.reshape(-1, 3),
        "txt_ids": maker.zeros(NUM_TEXT_TOKENS, 3),
        "guidance": maker.number(3.5) if config.guidance_embeds else None,
    }


def _sd3(maker: Maker, config: Any, rows: int, columns: int, num_frames: int) -> dict[str, Any]:
    return {
        "hidden_states": maker.normal(1, config.in_channels, rows * 2, columns * 2),
        "encoder_hidden_states": maker.normal(1, NUM_TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": maker.normal(1, config.pooled_projection_dim),
        "timestep": maker.number(500.0),
    }


def _z_image(maker: Maker, config: Any, rows: int, columns: int, num_frames: int) -> dict[str, Any]:
    return {
        "x": [maker.normal(config.in_channels, 1, rows * 2, columns * 2)],
        "t": maker.number(0.5),
        "cap_feats": [maker.normal(NUM_TEXT_TOKENS, config.cap_feat_dim)],
    }


def _wan(maker: Maker, config: Any, rows: int, columns: int, num_frames: int) -> dict[str, Any]:
    latents = (num_frames - 1) // 4 + 1
    return {
        "hidden_states": maker.normal(1, config.in_channels, latents, rows * 2, columns * 2),
        "encoder_hidden_states": maker.normal(1, NUM_TEXT_TOKENS, config.text_dim),
        "timestep": maker.number(500.0),
    }


def _ltx2(maker: Maker, config: Any, rows: int, columns: int, num_frames: int) -> dict[str, Any]:
    latents = (num_frames - 1) // 8 + 1
    sounds = max(1, round(num_frames / FRAMES_PER_SECOND * AUDIO_LATENTS_PER_SECOND))
    return {
        "hidden_states": maker.normal(1, latents * rows * columns, config.in_channels),
        "audio_hidden_states": maker.normal(1, sounds, config.audio_in_channels),
        "encoder_hidden_states": maker.normal(1, NUM_TEXT_TOKENS, config.caption_channels),
        "audio_encoder_hidden_states": maker.normal(1, NUM_TEXT_TOKENS, config.caption_channels),
        "timestep": maker.number(500.0),
        "num_frames": latents,
        "height": rows,
        "width": columns,
        "fps": float(FRAMES_PER_SECOND),
        "audio_num_frames": sounds,
    }


BUILDERS: dict[str, tuple[int, Callable[[Maker, Any, int, int, int], dict[str, Any]]]] = {
    "QwenImageTransformer2DModel": (16, _qwen_image),
    "FluxTransformer2DModel": (16, _flux),
    "SD3Transformer2DModel": (16, _sd3),
    "ZImageTransformer2DModel": (16, _z_image),
    "WanTransformer3DModel": (16, _wan),
    "LTX2VideoTransformer3DModel": (32, _ltx2),
}
"""Class -> pixels of one patch's side, and its builder, which gets rows and columns of patches."""
