"""One component of a stock pipeline."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A component: its class, and its configuration at each scale."""

    library: Literal["diffusers", "transformers"]
    class_name: str
    full: dict[str, Any] = {}
    """What the released model has that the class's defaults do not."""
    small: dict[str, Any] = {}
    """Changes of `full`: the same widths, few layers."""
    tiny: dict[str, Any] = {}
    """Changes of `full`: some thousand to a million parameters."""
    depths: dict[str, int] = {}
    """A denoiser's keys that say how many layers it has -> the released model's number."""
