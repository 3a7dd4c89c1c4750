"""The headers of safetensors files: names, dtypes and sizes of tensors. No weights are read."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from omni.errors import UsageError
from omni.sizes import format_bytes

MAX_HEADER_BYTES = 100_000_000
"""The bound of the safetensors library itself."""


class TensorHeader(msgspec.Struct, frozen=True):
    """What a header says about one tensor; its bytes lie in [start, end) of the file's data."""

    dtype: str
    """As in the header: `BF16`."""
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data in the file."""
        return self.data_offsets[1] - self.data_offsets[0]


class Header(msgspec.Struct, frozen=True):
    """The head of a safetensors file."""

    data_start: int
    """Where the data begins in the file, in bytes."""
    tensors: dict[str, TensorHeader]


def read_header(file: Path) -> Header:
    """What one file holds: 8 bytes of length, then that much JSON, then the data.

    Raises UsageError for a file that is cut short, cannot be read, or is none of safetensors' at all.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise UsageError(f"{file}: not a safetensors file, or cut short ({format_bytes(size)}): fetch it again")
            text = stream.read(length)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(raw, type=TensorHeader) for name, raw in entries.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: its safetensors header is broken ({error}): fetch it again") from error
    for name, tensor in tensors.items():
        start, end = tensor.data_offsets
        if not 0 <= start <= end <= size - 8 - length:
            raise UsageError(
                f"{file}: cut short, its header promises {format_bytes(max(end, 0))} of data for tensor '{name}', and "
                f"{format_bytes(size - 8 - length)} are there: fetch it again"
            )
    return Header(8 + length, tensors)
