"""Cuts the tensors of files into chunks: contiguous bytes that one thread reads at once."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from stages.policies.load.catalog import Entry

ALIGN = 64
"""Tensors are cut at multiples of this, in bytes, so that no element is cut; chunks are no smaller."""
MAX_PIECES = 512
"""Pieces of one chunk; the system takes up to 1024 destinations in one read."""


class Piece(msgspec.Struct, frozen=True):
    """Part of one tensor, in bytes."""

    name: str
    start: int
    """Within the tensor."""
    num_bytes: int


class Chunk(msgspec.Struct, frozen=True):
    """Contiguous bytes of one file, all of which belong to tensors; pieces follow each other without a gap."""

    file: str
    offset: int
    num_bytes: int
    pieces: tuple[Piece, ...]

    def piece_at(self, done: int) -> Piece:
        """The piece that holds byte `done` of the chunk; the last one beyond its end."""
        for piece in self.pieces:
            if done < piece.num_bytes:
                return piece
            done -= piece.num_bytes
        return self.pieces[-1]


def plan_chunks(entries: Iterable[Entry], chunk_bytes: int) -> list[Chunk]:
    """Chunks of up to `chunk_bytes` that hold every byte of `entries` exactly once, in the order of the files.

    Empty tensors are in no chunk.
    """
    size = max(chunk_bytes - chunk_bytes % ALIGN, ALIGN)
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    file, begin, end = "", 0, 0

    def close() -> None:
        if pieces:
            chunks.append(Chunk(file, begin, end - begin, tuple(pieces)))
            pieces.clear()

    for entry in sorted(entries, key=lambda entry: (entry.file, entry.offset)):
        start = 0
        while start < entry.num_bytes:
            offset = entry.offset + start
            if (entry.file, offset) != (file, end) or len(pieces) == MAX_PIECES:
                close()
            rest = entry.num_bytes - start
            count = min(size - (end - begin if pieces else 0), rest)
            if count < rest:
                count -= count % ALIGN
            if not count:
                close()
                continue
            if not pieces:
                file, begin = entry.file, offset
            pieces.append(Piece(entry.name, start, count))
            start, end = start + count, offset + count
    close()
    return chunks
