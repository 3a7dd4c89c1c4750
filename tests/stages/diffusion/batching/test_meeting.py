"""Requests that meet: who joins, who waits, who leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from omni.errors import RequestAborted
from stages.diffusion.batching.join import Joiner
from stages.diffusion.batching.meeting import Meeting

SECONDS = 30.0


class Guest:
    """A request."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        self.stop = threading.Event()

    def raise_if_aborted(self) -> None:
        if self.stop.is_set():
            raise RequestAborted("gone")


class Denoiser(torch.nn.Module):
    """Adds one; the first call waits until the test opens the door."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[float]] = []
        self.inside, self.door = threading.Event(), threading.Event()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.batches.append(hidden_states[:, 0].tolist())
        self.inside.set()
        assert self.door.wait(SECONDS)
        return hidden_states + 1


class Party:
    """A meeting with its denoiser and threads."""

    def __init__(self, pool: ThreadPoolExecutor, **limits: Any) -> None:
        self.denoiser = Denoiser()
        self.meeting = Meeting(**{"max_requests": 8, "max_pixels": 1e9, "wait_seconds": 0.0, **limits})
        self._joiner, self._pool = Joiner(self.denoiser, self.denoiser.forward), pool
        shape = self._joiner.form((torch.zeros(1, 2),), {})
        assert shape is not None
        self.meeting.batches._agrees["denoiser", shape.structure] = True  # tried before

    def call(self, value: float, guest: Guest | None = None, width: int = 2) -> Future[float]:
        sample = torch.full((1, width), value)
        form = self._joiner.form((sample,), {})

        def run() -> float:
            answer = self.meeting.run(guest or Guest(), "denoiser", form, self.denoiser.forward, ((sample,), {}), width)
            return float(answer[0, 0])

        return self._pool.submit(run)

    def wait_for(self, count: int) -> None:
        """Until so many calls wait."""
        arrived = threading.Event()
        while len(self.meeting._waiting) < count:
            arrived.wait(0.001)


@pytest.fixture
def party() -> Any:
    with ThreadPoolExecutor(12) as pool:
        parties: list[Party] = []

        def make(**limits: Any) -> Party:
            parties.append(Party(pool, **limits))
            return parties[-1]

        yield make
        for one in parties:
            one.denoiser.door.set()


Make = Callable[..., Party]


def gather(party: Party, calls: list[Callable[[], Future[float]]]) -> list[Future[float]]:
    """A first call holds the denoiser, and the others come meanwhile, one after another."""
    first = party.call(100)
    assert party.denoiser.inside.wait(SECONDS)
    futures = []
    for number, call in enumerate(calls, start=1):
        futures.append(call())
        party.wait_for(number)
    return [first, *futures]


def test_who_is_ready_joins_the_next_call(party: Make) -> None:
    one = party()
    futures = gather(one, [lambda n=n: one.call(n) for n in range(3)])  # type: ignore[misc]
    one.denoiser.door.set()
    assert [future.result(SECONDS) for future in futures] == [101, 1, 2, 3]
    assert one.denoiser.batches == [[100], [0, 1, 2]]


def test_no_more_than_the_limits(party: Make) -> None:
    for limits in ({"max_requests": 2}, {"max_pixels": 4}):
        one = party(**limits)
        futures = gather(one, [lambda n=n, one=one: one.call(n) for n in range(3)])  # type: ignore[misc]
        one.denoiser.door.set()
        assert [future.result(SECONDS) for future in futures] == [101, 1, 2, 3]
        assert one.denoiser.batches == [[100], [0, 1], [2]]


def test_other_shapes_run_by_themselves_in_turns(party: Make) -> None:
    one = party()
    futures = gather(one, [lambda n=n: one.call(n, width=2 + n % 2) for n in range(4)])  # type: ignore[misc]
    one.denoiser.door.set()
    assert [future.result(SECONDS) for future in futures] == [101, 1, 2, 3, 4]
    assert sorted(one.denoiser.batches[1:]) == [[0, 2], [1, 3]]


def test_higher_priority_first(party: Make) -> None:
    one = party(max_requests=2)
    guests = [Guest(), Guest(), Guest(5)]
    futures = gather(one, [lambda n=n: one.call(n, guests[n]) for n in range(3)])  # type: ignore[misc]
    one.denoiser.door.set()
    assert [future.result(SECONDS) for future in futures] == [101, 1, 2, 3]
    assert one.denoiser.batches == [[100], [2, 0], [1]]


def test_aborted_requests_leave_at_once_and_disturb_nobody(party: Make) -> None:
    one, guest = party(), Guest()
    futures = gather(one, [lambda: one.call(1, guest), lambda: one.call(2)])
    guest.stop.set()
    with pytest.raises(RequestAborted):
        futures[1].result(SECONDS)  # while the first call still holds the denoiser
    one.denoiser.door.set()
    assert [futures[0].result(SECONDS), futures[2].result(SECONDS)] == [101, 3]
    assert one.denoiser.batches == [[100], [2]]


def test_requests_between_steps_are_waited_for(party: Make) -> None:
    one, guests = party(wait_seconds=SECONDS), [Guest(), Guest()]
    futures = gather(one, [])
    one.denoiser.door.set()
    assert futures[0].result(SECONDS) == 101
    one.meeting._coming.clear()
    one.meeting._coming.update(guests)
    first = one.call(1, guests[0])
    one.wait_for(1)
    second = one.call(2, guests[1])
    assert [first.result(SECONDS), second.result(SECONDS)] == [2, 3]
    assert one.denoiser.batches[1:] == [[1, 2]]


def test_nobody_waits_for_a_request_whose_loop_has_ended(party: Make) -> None:
    one, ended = party(wait_seconds=10 * SECONDS), Guest()
    one.denoiser.door.set()
    one.meeting._coming.add(ended)
    future = one.call(1)
    one.wait_for(1)
    one.meeting.leave(ended)
    assert future.result(SECONDS) == 2


def test_late_requests_are_not_waited_for_twice(party: Make) -> None:
    one = party(wait_seconds=0.001)
    one.denoiser.door.set()
    one.meeting._coming.add(Guest())
    assert one.call(1).result(SECONDS) == 2
    assert len(one.meeting._coming) == 1  # the one that just had its answer
