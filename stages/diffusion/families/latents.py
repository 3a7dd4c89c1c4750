"""How pipeline families lay out and scale their latents: back to what the VAE itself encodes to.

Most give (batch, channels, height, width), or the same with frames before the height. Those that pack patches into
tokens (Flux, Qwen-Image, LTX) tell the denoiser how many patches there are in each direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

GRID_ARGUMENTS = ("img_shapes", "img_ids", "num_frames", "height", "width")
"""Arguments of a denoiser that say how its tokens lie; no rule looks at others."""


class UnknownLayout(ValueError):
    """Latents that no rule here can read."""


def vae_latents(latents: Tensor, vae: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The first sample of a pipeline's latents as its VAE encodes: (frames, channels, height, width) float32.

    `arguments` are those of a denoiser's call. Raises UnknownLayout.
    """
    channels = num_channels(vae)
    grid = _unpack(latents[0].float(), channels, arguments)
    norm = getattr(vae, "bn", None)
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:  # Flux 2
        scale = torch.sqrt(norm.running_var + vae.config.batch_norm_eps)
        return _unpatch(grid * _column(scale, grid) + _column(norm.running_mean, grid), channels)
    grid = _unpatch(grid, channels)
    config = vae.config
    mean, std = (_per_channel(vae, name) for name in ("latents_mean", "latents_std"))
    grid = grid / (config.get("scaling_factor") or 1.0)
    if mean is not None and std is not None:
        return grid * _column(std, grid) + _column(mean, grid)
    return grid + (config.get("shift_factor") or 0.0)


def num_channels(vae: nn.Module) -> int:
    """Channels of what the VAE encodes to. Raises UnknownLayout."""
    config = vae.config
    channels = config.get("latent_channels") or config.get("z_dim")
    if not isinstance(channels, int):
        raise UnknownLayout(f"{type(vae).__name__} does not say how many channels its latents have")
    return channels


def _unpack(latents: Tensor, channels: int, arguments: Mapping[str, Any]) -> Tensor:
    """(frames, channels or channels of whole patches, height, width)."""
    if latents.ndim == 2:
        rows, columns = _rows_and_columns(len(latents), arguments)
        frames = len(latents) // (rows * columns)
        return latents[: frames * rows * columns].view(frames, rows, columns, -1).permute(0, 3, 1, 2)
    if latents.ndim == 3:
        latents = latents[:, None]
    if latents.ndim == 4:
        axis = next((axis for axis in (0, 1, 3) if latents.shape[axis] == channels), None)
        if axis is not None:
            return latents.movedim(axis, 1) if axis != 0 else latents.transpose(0, 1)
    raise UnknownLayout(f"latents of shape {tuple(latents.shape)} for a VAE of {channels} channels")


def _rows_and_columns(num_tokens: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
    shapes, ids = arguments.get("img_shapes"), arguments.get("img_ids")
    if shapes:  # Qwen-Image: for each sample one shape or several, the pictures to draw first
        shape = shapes[0] if isinstance(shapes[0][0], int) else shapes[0][0]
        return int(shape[1]), int(shape[2])
    if isinstance(ids, Tensor):  # Flux: index, row and column of each token, reference pictures last
        places = ids.reshape(-1, ids.shape[-1])[:num_tokens].long()
        return int(places[:, 1].max()) + 1, int(places[:, 2].max()) + 1
    sizes = arguments.get("height"), arguments.get("width")  # LTX
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UnknownLayout("the denoiser is not told how its tokens lie")
    return sizes  # type: ignore[return-value]


def _unpatch(grid: Tensor, channels: int) -> Tensor:
    """Patches of several latents, as (channels, rows, columns) of each, spread out."""
    edge = math.isqrt(grid.shape[1] // channels)
    if edge * edge * channels != grid.shape[1]:
        raise UnknownLayout(f"tokens of {grid.shape[1]} values for a VAE of {channels} channels")
    return nn.functional.pixel_shuffle(grid, edge)


def _per_channel(vae: nn.Module, name: str) -> Tensor | None:
    value = vae.config[name] if name in vae.config else getattr(vae, name, None)  # LTX keeps them as buffers
    return None if value is None else torch.as_tensor(value, dtype=torch.float32)


def _column(values: Tensor, grid: Tensor) -> Tensor:
    return values.to(grid.device, torch.float32).view(1, -1, 1, 1)
