"""Stock configurations: which components a released pipeline has, and their sizes; data, read without torch.

A component's `full` configuration holds what differs from its class's own defaults in the released model. `small` keeps
the widths and cuts the depth, so that tensors have their real sizes; `tiny` fits a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from omni.errors import UsageError
from omni.models import stock_images, stock_videos
from omni.models.stock_part import Part

Scale = Literal["full", "small", "tiny"]
SCALES: tuple[Scale, ...] = ("full", "small", "tiny")


class Stock(msgspec.Struct, frozen=True):
    """A pipeline class of diffusers and its components."""

    pipeline: str
    parts: dict[str, Part]
    """Component -> what it is; the denoiser is called `transformer`."""
    tokenizers: dict[str, str]
    """Component -> class of transformers."""
    settings: dict[str, Any] = {}
    """Arguments of the pipeline that are no components."""


_QWEN = {"tokenizer": "Qwen2Tokenizer"}
_CLIP_T5 = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5Tokenizer"}
_CLIPS_T5 = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5Tokenizer"}

STOCK: dict[str, Stock] = {
    "qwen-image": Stock("QwenImagePipeline", stock_images.QWEN_IMAGE, _QWEN),
    "flux": Stock("FluxPipeline", stock_images.FLUX, _CLIP_T5),
    "sd3.5": Stock("StableDiffusion3Pipeline", stock_images.SD35, _CLIPS_T5),
    "z-image": Stock("ZImagePipeline", stock_images.Z_IMAGE, _QWEN),
    "wan2.2": Stock("WanPipeline", stock_videos.WAN22, {"tokenizer": "T5Tokenizer"}, {"boundary_ratio": 0.875}),
    "ltx-2": Stock("LTX2Pipeline", stock_videos.LTX2, {"tokenizer": "GemmaTokenizer"}),
}
"""Name -> pipeline, as `omni models random --config` takes it."""


def find_stock(name: str) -> Stock:
    """The stock configuration called `name`. Raises UsageError with those there are."""
    if name not in STOCK:
        raise UsageError(f"config '{name}': there is none of that name, take one of {', '.join(STOCK)}")
    return STOCK[name]


def part_config(part: Part, scale: Scale, layers: int | None = None) -> dict[str, Any]:
    """A component's configuration at a scale; `layers` sets the depth of a denoiser instead of the scale.

    A denoiser of several stacks keeps their proportions: `layers` is the depth of the first.
    """
    config = _merge({}, part.full)
    if scale != "full":
        config = _merge(config, getattr(part, scale))
    if layers is not None and part.depths:
        first = next(iter(part.depths.values()))
        config |= {key: max(1, round(layers * depth / first)) for key, depth in part.depths.items()}
    return config


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` on top; dicts inside are merged too."""
    merged = dict(base)
    for key, value in change.items():
        merged[key] = _merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged
