"""Pieces of the tiny pipelines: numbers, pictures, random weights, a small VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import numpy as np
import torch
from PIL import Image


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


def two_embeds(width: int) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {
        "prompt_embeds": random(seed, 1, 8, width),
        "negative_prompt_embeds": random(seed + 50, 1, 8, width),
    }
