"""What the signature does not tell about joining calls of single denoisers.

The rules in stages/diffusion/batching/join.py cover every other argument of every other class.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

BATCH_AXES: dict[str, dict[str, int]] = {
    "HiDreamImageTransformer2DModel": {"encoder_hidden_states_llama3": 1},
}
"""Denoiser class -> argument -> the axis of its samples, where that is not the first."""

SHARED: dict[str, frozenset[str]] = {
    "FluxTransformer2DModel": frozenset({"img_ids", "txt_ids"}),
    "ChromaTransformer2DModel": frozenset({"img_ids", "txt_ids"}),
    "BriaTransformer2DModel": frozenset({"img_ids", "txt_ids"}),
    "LongCatImageTransformer2DModel": frozenset({"img_ids", "txt_ids"}),
}
"""Denoiser class -> arguments without samples: calls are joined only where they are equal. Those whose first axis is
not as long as the batch are found without a rule; these may have one row, for one token."""


def _buckets(size: int) -> Callable[[Sequence[Any]], Hashable]:
    return lambda items: tuple(sorted({-(-len(item) // size) for item in items}))


PADDED: dict[str, dict[str, Callable[[Sequence[Any]], Hashable]]] = {
    "ZImageTransformer2DModel": {"cap_feats": _buckets(32)},
}
"""Denoiser class -> list argument -> what must be equal in joined calls, so that none is padded further than alone."""
