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
    """What a header says about one tensor."""

    dtype: str
    """As in the header: `BF16`."""
    data_offsets: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data in the file."""
        return self.data_offsets[1] - self.data_offsets[0]


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Name -> tensor of one file: 8 bytes of length, then that much JSON, then the data.

    Raises UsageError for a file that is cut short, or none of safetensors' at all.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UsageError(f"{file}: not a safetensors file, or cut short ({format_bytes(size)}): fetch it again")
        text = stream.read(length)
    try:
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        tensors = {
            name: msgspec.json.decode(raw, type=TensorHeader) for name, raw in entries.items() if name != "__metadata__"
        }
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: its safetensors header is broken ({error}): fetch it again") from error
    for tensor in tensors.values():
        start, end = tensor.data_offsets
        if not 0 <= start <= end <= size - 8 - length:
            raise UsageError(
                f"{file}: cut short, its header promises {format_bytes(max(end, 0))} of data: fetch it again"
            )
    return tensors
