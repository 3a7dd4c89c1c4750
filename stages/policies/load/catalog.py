"""Every tensor of a component's folder, from safetensors headers alone: where its bytes lie and what they are."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import msgspec

from omni.checkpoint import MissingFile, read_header, weight_files
from omni.errors import UsageError
from omni.sizes import format_bytes

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of an element, by dtype name; names that are not here make a checkpoint that this policy cannot load."""


class UnknownDtype(Exception):
    """A dtype that only the library may know how to load."""


class Entry(msgspec.Struct, frozen=True):
    """One tensor of a checkpoint."""

    name: str
    file: str
    offset: int
    """Of its first byte, from the start of the file."""
    num_bytes: int
    dtype: str
    """As the header names it: `BF16`."""
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]


def read_catalog(folder: Path, variant: str | None = None) -> dict[str, Entry]:
    """Name -> entry of all tensors in a component's folder: shards of an index, one file, or several files.

    Reads headers only. Raises UsageError with file and tensor when a file is missing, cut short, broken, pickled or not
    to be read; UnknownDtype for dtypes that are not in ITEM_BYTES.
    """
    try:
        files = list(weight_files(folder, variant))
    except MissingFile as error:
        raise UsageError(f"{error}: the checkpoint is incomplete, fetch it again") from error
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read: {error.strerror}") from error
    if not files:
        raise UsageError(f"{folder}: holds no safetensors weights")
    entries: dict[str, Entry] = {}
    for file in files:
        entries.update((entry.name, entry) for entry in _read_file(file))
    return entries


def _read_file(file: Path) -> list[Entry]:
    header = read_header(file)
    entries = [
        Entry(
            name,
            str(file),
            header.data_start + tensor.data_offsets[0],
            tensor.data_offsets[1] - tensor.data_offsets[0],
            tensor.dtype,
            tensor.shape,
        )
        for name, tensor in header.tensors.items()
    ]
    for entry in entries:
        if entry.dtype not in ITEM_BYTES:
            raise UnknownDtype(f"{file}: tensor '{entry.name}' has dtype {entry.dtype}")
        needed = math.prod(entry.shape) * entry.item_bytes
        if needed != entry.num_bytes or min(entry.shape, default=0) < 0:
            raise UsageError(
                f"{file}: tensor '{entry.name}' of {entry.dtype} and shape {list(entry.shape)} takes "
                f"{format_bytes(needed)}, its header gives it {format_bytes(entry.num_bytes)}: fetch the file again"
            )
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    for before, after in itertools.pairwise(entries):
        if before.offset + before.num_bytes > after.offset:
            raise UsageError(f"{file}: tensors '{before.name}' and '{after.name}' overlap: fetch the file again")
    return entries
