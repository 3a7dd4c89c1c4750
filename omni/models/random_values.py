"""Random numbers as fast as memory takes them: pieces of one pool of normal numbers, scaled.

The numbers depend on the seed and the key alone, not on the machine, its threads or the order of the calls.
"""

from __future__ import annotations

import random

import torch

POOL_VALUES = 1 << 24
PIECE_VALUES = 1 << 20
"""Each run of so many values starts at a random place of the pool, so that no two runs are alike."""


class RandomValues:
    """Fills CPU tensors of one floating dtype with normal numbers."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        self._pool = torch.randn(POOL_VALUES, generator=generator).to(dtype)
        self._seed = seed

    def fill(self, out: torch.Tensor, key: str, spread: float, centre: float = 0.0) -> None:
        """Fill a contiguous tensor, with this standard deviation and mean; the same for the same seed, key and size."""
        flat = out.view(-1)
        place = random.Random(f"{self._seed}/{key}")
        for begin in range(0, flat.numel(), PIECE_VALUES):
            piece = flat[begin : begin + PIECE_VALUES]
            start = place.randrange(POOL_VALUES - piece.numel())
            torch.mul(self._pool[start : start + piece.numel()], spread, out=piece)
            if centre:
                piece += centre


def spread_of(name: str, shape: torch.Size) -> tuple[float, float]:
    """Standard deviation and mean that keep activations in range through many layers, for a parameter.

    Gains of norms lie around one, all else around zero, and nothing is zero: gates that training starts at zero would
    hide faults.
    """
    fan_in = shape.numel() // shape[0] if shape and shape[0] else 1
    if fan_in > 1:
        return max(fan_in**-0.5, 0.02), 0.0
    is_gain = name.rpartition(".")[2] in ("weight", "gamma")
    return (0.1, 1.0) if is_gain else (0.02, 0.0)
