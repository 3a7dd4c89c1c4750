"""What the decoders of single families hold at their peak, where the general rule does not fit."""

from __future__ import annotations

DECODE_VALUES: dict[str, tuple[float, bool]] = {
    "AutoencoderKLWan": (58.0, True),
    "AutoencoderKLQwenImage": (19.0, True),
    "AutoencoderKLLTXVideo": (6.2, False),
    "AutoencoderKLLTX2Video": (3.2, False),
}
"""VAE class -> full-size feature maps at once, and whether it decodes one frame after another and keeps features of the
last ones. Counted on the stock classes, as those in stages/diffusion/memory.py."""
