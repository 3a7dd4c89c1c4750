"""Where weights are to live: mapped files, one region of host memory, one region of a device."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from omni.errors import UsageError
from stages.memory.host import HostMemory
from stages.policies.load.blueprint import DTYPES, Blueprint, Target
from stages.policies.load.catalog import Entry
from stages.policies.load.files import Files

ALIGN = 256
"""Of every tensor in a region, in bytes: what CUDA's own allocator gives."""
PIECE_BYTES = 1 << 30
"""Of a region that the device cannot give at once."""


def target_bytes(target: Target) -> int:
    """Bytes of the finished tensor."""
    return math.prod(target.shape) * target.dtype.itemsize


def map_tensor(entry: Entry, files: Files) -> torch.Tensor:
    """The tensor in place, in the mapped file; a small copy where its bytes are not aligned.

    It may be written to: the mapping is private, and the file stays as it is.
    """
    dtype = DTYPES[entry.dtype]
    if not entry.num_bytes:
        return torch.empty(entry.shape, dtype=dtype)
    mapped = files.mapping(entry.file).map
    if entry.offset % dtype.itemsize:
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.num_bytes, offset=entry.offset)
        return raw.clone().view(dtype).view(entry.shape)
    count = entry.num_bytes // dtype.itemsize
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.offset).view(entry.shape)


def allocate_host(targets: Sequence[Target], key: str | None = None) -> tuple[dict[str, torch.Tensor], HostMemory]:
    """Name -> tensor, side by side in one region, in the order given. Nothing is touched yet.

    With `key`, the region is that of all who ask for it; blocks while another fills it. Raises UsageError.
    """
    offsets, total = _layout(targets)
    try:
        memory = HostMemory(total, key=key)
    except TimeoutError as error:
        raise UsageError(str(error)) from error
    return _cut(memory.bytes, targets, offsets), memory


def share_key(blueprint: Blueprint, targets: Sequence[Target]) -> str:
    """Names what a region of these targets holds: files and their versions, the class that reads them, the layout."""
    entries = [target.source for target in targets if target.source]
    entries += [entry for merge in blueprint.merges for entry in merge.sources]
    lines = [f"{type(blueprint.module).__module__}.{type(blueprint.module).__qualname__}"]
    for file in sorted({os.path.realpath(entry.file) for entry in entries}):
        found = os.stat(file)
        lines.append(f"{file} {found.st_size} {found.st_mtime_ns}")
    lines += [f"{target.name} {target.dtype} {list(target.shape)}" for target in targets]
    return "\n".join(lines)


def allocate_device(targets: Sequence[Target], device: torch.device) -> dict[str, torch.Tensor]:
    """Name -> tensor, side by side in one region of the device; in several where it has no such large block.

    Raises torch.OutOfMemoryError.
    """
    offsets, total = _layout(targets)
    try:
        return _cut(torch.empty(total, dtype=torch.uint8, device=device), targets, offsets)
    except torch.OutOfMemoryError:
        if total <= PIECE_BYTES:
            raise
    tensors: dict[str, torch.Tensor] = {}
    group: list[Target] = []
    for target in targets:
        if group and sum(map(target_bytes, group)) + target_bytes(target) > PIECE_BYTES:
            tensors.update(_allocate_group(group, device))
            group = []
        group.append(target)
    return {**tensors, **_allocate_group(group, device)}


def _allocate_group(targets: Sequence[Target], device: torch.device) -> dict[str, torch.Tensor]:
    offsets, total = _layout(targets)
    return _cut(torch.empty(total, dtype=torch.uint8, device=device), targets, offsets)


def _layout(targets: Sequence[Target]) -> tuple[list[int], int]:
    """Where each tensor begins, and the bytes of all."""
    offsets, end = [], 0
    for target in targets:
        offsets.append(end)
        end += -(-target_bytes(target) // ALIGN) * ALIGN
    return offsets, end


def _cut(region: torch.Tensor, targets: Sequence[Target], offsets: Sequence[int]) -> dict[str, torch.Tensor]:
    return {
        target.name: region[offset : offset + target_bytes(target)].view(target.dtype).view(target.shape)
        for target, offset in zip(targets, offsets, strict=True)
    }
