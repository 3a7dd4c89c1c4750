"""Regions that are pinned piece by piece while they fill."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from omni.errors import UsageError
from stages.memory.host import HostMemory
from stages.policies.load import pinning
from stages.policies.load.chunks import Chunk, Piece
from stages.policies.load.pinning import PinAsFilled
from stages.policies.load.reader import Job, LeaveRoute
from stages.policies.load.staging import Destination

PIECE = 1000


class Region(HostMemory):
    """Host memory that remembers which of its pieces were pinned, and may refuse one."""

    def __init__(self, num_bytes: int, refuses: int = -1) -> None:
        super().__init__(num_bytes)
        self.refuses = refuses
        self.pinned: list[int] = []

    def pin_piece(self, number: int) -> None:
        if number == self.refuses:
            raise UsageError("cannot pin")
        self.pinned.append(number)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "REGISTER_BYTES", PIECE)


def jobs_over(region: HostMemory, places: list[tuple[int, int]], dtype: torch.dtype = torch.uint8) -> tuple[Any, Any]:
    """Jobs that fill (begin, bytes) of the region, each from a tensor of `dtype`; and their destinations."""
    targets = {
        f"t{number}": Destination.of(dtype, region.bytes[begin : begin + size])
        for number, (begin, size) in enumerate(places)
    }
    jobs = [
        Job("part", Chunk("file", 0, size, (Piece(f"t{number}", 0, size * dtype.itemsize),)), LeaveRoute())
        for number, (_, size) in enumerate(places)
    ]
    return jobs, targets


def land(job: Job) -> None:
    assert job.landed is not None
    job.landed()


def test_each_piece_is_pinned_when_its_last_read_has_landed() -> None:
    region, pins = Region(2500), PinAsFilled()
    watched = pins.watch(*reorder(jobs_over(region, [(900, 300), (0, 900), (1200, 1300)]), region))
    assert [job.chunk.pieces[0].name for job in watched] == ["t1", "t0", "t2"]  # in the order of the region
    land(watched[0])
    assert region.pinned == []
    land(watched[1])
    land(watched[2])
    pins.finish()
    assert sorted(region.pinned) == [0, 1, 2]


def reorder(made: tuple[Any, Any], region: HostMemory) -> tuple[Any, HostMemory, Any]:
    jobs, targets = made
    return jobs, region, targets


def test_a_piece_that_is_not_full_is_left() -> None:
    region, pins = Region(3000), PinAsFilled()
    watched = pins.watch(*reorder(jobs_over(region, [(0, 500), (500, 500), (1000, 2000)]), region))
    land(watched[0])
    land(watched[2])
    pins.finish()
    assert sorted(region.pinned) == [1, 2]


def test_any_order_pins_every_piece_once() -> None:
    rng = random.Random(5)
    for _ in range(50):
        region, pins, places, begin = Region(7300), PinAsFilled(), [], 0
        while begin < region.num_bytes:
            size = min(rng.randint(1, 2300), region.num_bytes - begin)
            places.append((begin, size))
            begin += size
        watched = pins.watch(*reorder(jobs_over(region, places), region))
        rng.shuffle(watched)
        for job in watched:
            land(job)
        pins.finish()
        assert sorted(region.pinned) == list(range(8))


def test_other_dtypes_count_by_their_place_in_the_region() -> None:
    region, pins = Region(2000), PinAsFilled()
    watched = pins.watch(*reorder(jobs_over(region, [(0, 1000), (1000, 1000)], torch.float32), region))
    land(watched[1])
    pins.finish()
    assert region.pinned == [1]


def test_a_refusal_fails_the_load() -> None:
    region, pins = Region(1500, refuses=1), PinAsFilled()
    for job in pins.watch(*reorder(jobs_over(region, [(0, 1500)]), region)):
        land(job)
    with pytest.raises(UsageError, match="cannot pin"):
        pins.finish()


def test_nothing_is_pinned_after_it_was_cancelled() -> None:
    region, pins = Region(1500), PinAsFilled()
    watched = pins.watch(*reorder(jobs_over(region, [(0, 1500)]), region))
    pins.cancel()
    land(watched[0])
    assert region.pinned == []
