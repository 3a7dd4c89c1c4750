"""Chunks cover every byte of every tensor once, whatever the sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stages.policies.load.catalog import Entry
from stages.policies.load.chunks import ALIGN, MAX_PIECES, plan_chunks

SIZES = st.lists(st.tuples(st.integers(0, 700), st.integers(0, 9), st.integers(0, 2)), max_size=30)
"""(elements of 2 bytes, bytes of gap before it, number of the file)."""


def entries_of(sizes: list[tuple[int, int, int]]) -> list[Entry]:
    ends = [8, 8, 8]
    entries = []
    for number, (count, gap, file) in enumerate(sizes):
        offset = ends[file] + gap
        ends[file] = offset + 2 * count
        entries.append(Entry(f"t{number}", f"file{file}", offset, 2 * count, "BF16", (count,)))
    return entries


@given(sizes=SIZES, chunk_bytes=st.integers(1, 2000), reverse=st.booleans())
def test_every_byte_once(sizes: list[tuple[int, int, int]], chunk_bytes: int, reverse: bool) -> None:
    entries = entries_of(sizes)
    by_name = {entry.name: entry for entry in entries}
    chunks = plan_chunks(reversed(entries) if reverse else entries, chunk_bytes)
    covered: dict[str, int] = dict.fromkeys(by_name, 0)
    for chunk in chunks:
        assert 0 < chunk.num_bytes <= max(chunk_bytes, ALIGN)
        assert chunk.num_bytes == sum(piece.num_bytes for piece in chunk.pieces)
        offset = chunk.offset
        for piece in chunk.pieces:
            entry = by_name[piece.name]
            assert entry.file == chunk.file
            assert offset == entry.offset + piece.start
            assert piece.start == covered[piece.name]
            assert piece.start % ALIGN == 0
            assert piece.num_bytes > 0
            covered[piece.name] += piece.num_bytes
            offset += piece.num_bytes
    assert covered == {entry.name: entry.num_bytes for entry in entries}


def test_small_tensors_share_chunks() -> None:
    entries = entries_of([(10, 0, 0)] * 40)
    assert [len(chunk.pieces) for chunk in plan_chunks(entries, 1 << 20)] == [40]


def test_pieces_of_a_chunk_are_bounded() -> None:
    chunks = plan_chunks(entries_of([(1, 0, 0)] * (MAX_PIECES + 1)), 1 << 20)
    assert [len(chunk.pieces) for chunk in chunks] == [MAX_PIECES, 1]


def test_the_piece_at_a_byte() -> None:
    (chunk,) = plan_chunks(entries_of([(10, 0, 0), (0, 0, 0), (5, 0, 0)]), 1 << 20)
    assert [chunk.piece_at(done).name for done in (0, 19, 20, 29, 99)] == ["t0", "t0", "t2", "t2", "t2"]
