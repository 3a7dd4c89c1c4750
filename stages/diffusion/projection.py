"""A linear map from a VAE's latents to colours, fitted to how the VAE encodes a coloured pattern."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

CELLS = 24
"""Latents along an edge of the pattern: more samples than any VAE has channels."""
RIDGE = 1e-3
"""Weight of small coefficients against the fit, as a part of the latents' own size."""


class Projection(msgspec.Struct, frozen=True):
    """Colours as a linear map of latents."""

    weight: Tensor
    """(3, channels) float32."""
    bias: Tensor
    """(3,) float32."""

    def apply(self, latents: Tensor) -> Tensor:
        """RGB around 0 to 1, (3, height, width), of latents (channels, height, width) float32."""
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        return torch.einsum("oc,chw->ohw", weight, latents) + bias[:, None, None]


def pattern(side: int) -> Tensor:
    """Blocks of random colours at several scales, always the same: (3, side, side) float32 from 0 to 1."""
    generator = torch.Generator("cpu").manual_seed(0)
    coarse = [torch.rand(1, 3, cells, cells, generator=generator) for cells in (CELLS // 2, CELLS // 4, CELLS // 8)]
    blocks = [nn.functional.interpolate(colours, (side, side), mode="nearest") for colours in coarse]
    weights = (0.5, 0.3, 0.2)
    mixed = sum(weight * own for weight, own in zip(weights, blocks, strict=True))
    assert isinstance(mixed, Tensor)
    # The mean of several draws is gray; this spreads it over all colours again.
    return (((mixed - 0.5) * 2.2) + 0.5).clamp(0, 1)[0]


@torch.no_grad()
def fit_projection(vae: nn.Module, scale: tuple[int, int], device: str, *, is_offloaded: bool) -> Projection:
    """The projection for `vae`; `scale`: frames and pixels a latent.

    `is_offloaded`: the VAE itself is called, which then comes onto the device; nothing else may call it meanwhile.
    """
    # Some VAEs keep the features of a call on themselves; the copy has the same modules.
    encoder: Any = vae if is_offloaded else copy.copy(vae)
    num_frames, pixels = scale
    picture = pattern(CELLS * pixels).to(device)
    sample = (picture * 2 - 1)[None].to(encoder.dtype)
    if any(parameter.ndim == 5 for parameter in encoder.encoder.parameters()):
        sample = sample[:, :, None].expand(-1, -1, num_frames + 1, -1, -1)
    encoded = encoder.encode(sample, return_dict=False)[0]
    latents = (encoded.mode() if hasattr(encoded, "mode") else encoded)[0].float()
    if latents.ndim == 3:
        latents = latents[:, None]
    colours = nn.functional.interpolate(picture[None].float(), latents.shape[-2:], mode="area")[0]
    values = latents.flatten(1).T.cpu()
    wanted = colours[:, None].expand(-1, latents.shape[1], -1, -1).flatten(1).T.cpu()
    return _least_squares(values, wanted)


def _least_squares(values: Tensor, wanted: Tensor) -> Projection:
    """The linear map from values (samples, channels) to `wanted` (samples, 3), its coefficients held small."""
    means, averages = values.mean(0), wanted.mean(0)
    centred = (values - means).double()
    square = centred.T @ centred
    square += torch.eye(len(square), dtype=torch.float64) * (RIDGE * square.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(square, centred.T @ (wanted - averages).double()).T.float()
    return Projection(weight, averages - weight @ means)
