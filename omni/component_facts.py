"""One component of a checkpoint: its bytes by dtype, its repeated blocks, and its config.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

FLOAT_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element, by the names of safetensors headers and of graph files."""
_IN_BLOCK = re.compile(r"(?P<list>.+?)\.(?P<index>\d+)\.(?P<rest>.+)")
"""The top-most list that a tensor's name passes through: `transformer_blocks.7.attn.to_q.weight`."""

Sizes = dict[str, int]
"""dtype name as in the header (`BF16`) -> bytes."""


class BlockList(msgspec.Struct, frozen=True):
    """A list of modules that repeat, such as `transformer_blocks`, in the order in which they run."""

    name: str
    blocks: tuple[Sizes, ...]


class ComponentFacts(msgspec.Struct, frozen=True):
    """What headers and config.json say about one component."""

    dtypes: Sizes
    outside: Sizes = {}
    """Weights that belong to no block."""
    lists: tuple[BlockList, ...] = ()
    config: dict[str, Any] = {}
    """The component's config.json, as it is; empty when it has none."""

    @property
    def total_bytes(self) -> int:
        """Bytes of its weights in the checkpoint."""
        return sum(self.dtypes.values())

    def loaded_bytes(self, dtype: str | None, device: str) -> int:
        """Bytes of its weights once loaded as `dtype` onto `device`; None keeps the checkpoint's own dtypes."""
        return loaded_size(self.dtypes, dtype, device)

    def block_bytes(self, dtype: str | None, device: str) -> tuple[int, ...]:
        """Bytes of each block once loaded, in the order in which they run."""
        return tuple(loaded_size(block, dtype, device) for found in self.lists for block in found.blocks)


def auto_dtype(device: str) -> str:
    """What `dtype: auto` loads as: bfloat16 on a GPU, float32 on a CPU, whose bfloat16 convolutions are slow."""
    return "float32" if device == "cpu" else "bfloat16"


def loaded_size(sizes: Sizes, dtype: str | None, device: str) -> int:
    """Bytes of weights of these sizes once loaded as `dtype`; only floating-point weights change theirs."""
    size = FLOAT_SIZES.get(auto_dtype(device) if dtype == "auto" else dtype or "")
    if size is None:
        return sum(sizes.values())
    return sum(count * size // FLOAT_SIZES[name] if name in FLOAT_SIZES else count for name, count in sizes.items())


def sort_tensors(tensors: Iterable[tuple[str, str, int]], config: dict[str, Any]) -> ComponentFacts:
    """Facts from (name, dtype, bytes) of all tensors of a component.

    A list counts as repeated blocks when at least two of its items hold tensors of the same names, several each.
    """
    dtypes: Counter[str] = Counter()
    found: dict[str, dict[int, dict[str, tuple[str, int]]]] = {}
    outside: Counter[str] = Counter()
    for name, dtype, size in tensors:
        dtypes[dtype] += size
        if match := _IN_BLOCK.fullmatch(name):
            block = found.setdefault(match["list"], {}).setdefault(int(match["index"]), {})
            block[match["rest"]] = (dtype, size)
        else:
            outside[dtype] += size
    lists = []
    for name, blocks in found.items():
        if _repeats(blocks.values()):
            lists.append(BlockList(name, tuple(_sum_up(blocks[index].values()) for index in sorted(blocks))))
        else:
            outside.update(_sum_up(tensor for block in blocks.values() for tensor in block.values()))
    lists.sort(key=lambda one: one.name)  # shards come in any order
    return ComponentFacts(dict(dtypes), dict(outside), tuple(lists), config)


def _repeats(blocks: Iterable[dict[str, Any]]) -> bool:
    names = Counter(frozenset(block) for block in blocks if len(block) > 1)
    return any(count > 1 for count in names.values())


def _sum_up(tensors: Iterable[tuple[str, int]]) -> Sizes:
    sizes: Counter[str] = Counter()
    for dtype, size in tensors:
        sizes[dtype] += size
    return dict(sizes)
