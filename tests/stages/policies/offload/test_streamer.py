"""The streamer: right weights at the right time in any order of calls, no copy too many, copies ahead of the calls."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from stages.memory.engine import HostEngine
from stages.policies.offload.streamer import Streamer, choose_resident
from stages.policies.offload.units import Unit


def make_units(sizes: list[int]) -> tuple[list[Unit], list[torch.Tensor]]:
    """Units of two parameters each, and what the parameters hold."""
    units, values = [], []
    for number, size in enumerate(sizes):
        parameters = [Parameter(torch.full((size,), number + part / 2), requires_grad=False) for part in (0, 1)]
        values.append(torch.cat([parameter.data.clone() for parameter in parameters]))
        units.append(Unit(f"block {number}", parameters))
    return units, values


def shown(unit: Unit) -> torch.Tensor:
    ordered = sorted(unit.parameters, key=lambda parameter: float(parameter.data[0]))
    return torch.cat([parameter.data for parameter in ordered])


class Machine:
    """A streamer whose blocks check that they see their weights."""

    def __init__(self, sizes: list[int], resident: set[int], ahead: int, *, staged: bool = False) -> None:
        self.units, self.values = make_units(sizes)
        self.engine = HostEngine()
        self.streamer = Streamer(self.engine, self.units, resident, ahead, staged=staged)
        self.setup_copies = self.engine.counters.num_copies_in

    @property
    def num_copies(self) -> int:
        """Copies of blocks since the set-up; each is of two spans."""
        return (self.engine.counters.num_copies_in - self.setup_copies) // 2

    def call(self, number: int, *, fails: bool = False) -> None:
        if number in self.streamer.resident:
            assert torch.equal(shown(self.units[number]), self.values[number])
            return
        self.streamer.enter(number)
        try:
            if fails:
                raise ZeroDivisionError
            assert torch.equal(shown(self.units[number]), self.values[number])
        finally:
            self.streamer.leave(number)

    def held(self) -> set[int]:
        return set(self.streamer._holding)


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[int], set[int], int, list[int]]:
    sizes = draw(st.lists(st.integers(1, 300), min_size=1, max_size=9))
    resident = draw(st.sets(st.integers(0, len(sizes) - 1)))
    return sizes, resident, draw(st.integers(1, 4)), draw(st.lists(st.integers(0, len(sizes) - 1), max_size=60))


@given(machines())
def test_any_order_of_calls_sees_its_weights(drawn: tuple[list[int], set[int], int, list[int]]) -> None:
    sizes, resident, ahead, calls = drawn
    machine = Machine(sizes, resident, ahead)
    num_slots = machine.streamer.num_slots
    assert num_slots == min(ahead + 1, len(sizes) - len(resident))
    for number in calls:
        before = machine.num_copies
        was_held = number in machine.held()
        machine.call(number)
        # A hit copies at most what follows, a miss one more; never anything that is there already.
        most = 0 if number in resident else num_slots - was_held
        assert machine.num_copies - before <= most
        assert len(machine.held()) <= num_slots
        assert not machine.held() & resident
    if len(sizes) - len(resident) <= num_slots:  # all have room: each is copied once
        assert machine.num_copies <= len(sizes) - len(resident)
    machine.streamer.close()
    assert machine.engine.device_bytes == 0


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.permutations(range(12)),
)
def test_rounds_copy_each_block_once(sizes: list[int], ahead: int, num_rounds: int, order: list[int]) -> None:
    machine = Machine(sizes, set(), ahead)
    order = [number for number in order if number < len(sizes)]
    length, num_slots = len(sizes), machine.streamer.num_slots
    for _ in range(2):  # the first round is spent learning the order
        for number in order:
            machine.call(number)
    before = machine.num_copies
    for _ in range(num_rounds):
        for position, number in enumerate(order):
            machine.call(number)
            following = {order[(position + step) % length] for step in range(num_slots)}
            assert machine.held() == following
    assert machine.num_copies - before == (num_rounds * length if length > num_slots else 0)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_blocks_in_order_need_no_learning(ahead: int) -> None:
    machine = Machine([10] * 7, set(), ahead)
    for _ in range(3):
        for number in range(7):
            machine.call(number)
    assert machine.num_copies == 3 * 7 + ahead  # the last ones are for the next round


def test_the_next_blocks_are_on_their_way_before_a_block_computes() -> None:
    machine = Machine([10] * 6, set(), 2)
    for number in range(6):
        machine.streamer.enter(number)
        assert machine.held() == {number, (number + 1) % 6, (number + 2) % 6}
        machine.streamer.leave(number)


def test_copies_are_asked_for_before_the_block_ahead_of_them_computes() -> None:
    """As the engine's log has it: what block i + 1 will wait for was asked for before block i was done."""
    machine = Machine([10] * 6, set(), 1)
    log = machine.engine.log
    for number in [*range(6), *range(6)]:
        machine.streamer.enter(number)
        following = machine.streamer._holding[(number + 1) % 6].memory.data_ptr()
        assert ("copy", following) in log
        done = len(log)
        machine.streamer.leave(number)
        assert [kind for kind, _ in log[done:]] == ["record"]
        log.clear()


def test_a_skipped_round_copies_nothing() -> None:
    """A step cache calls the first block, and skips the others when it finds that little has changed."""
    machine = Machine([10] * 6, set(), 2)
    for number in range(6):
        machine.call(number)
    machine.call(0)
    before = machine.num_copies
    for _ in range(5):
        machine.call(0)
    assert machine.num_copies == before


def test_blocks_that_are_never_called_are_not_fetched_again() -> None:
    """A text encoder that can also see: without pictures its vision blocks are never called."""
    machine = Machine([10] * 8, set(), 2)
    for _ in range(2):
        for number in (4, 5, 6, 7):
            machine.call(number)
    before = machine.num_copies
    for _ in range(3):
        for number in (4, 5, 6, 7):
            machine.call(number)
    assert machine.num_copies - before == 3 * 4


def test_a_failed_call_leaves_all_in_order() -> None:
    machine = Machine([10] * 5, set(), 1)
    for number in range(3):
        machine.call(number)
    with pytest.raises(ZeroDivisionError):
        machine.call(3, fails=True)
    for number in (0, 1, 2, 3, 4, 0):
        machine.call(number)


def test_staged_copies_arrive_too() -> None:
    machine = Machine([3000] * 5, {1}, 2, staged=True)
    for _ in range(2):
        for number in range(5):
            machine.call(number)
    machine.engine.close()


def test_a_staged_copy_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([10] * 5, set(), 1, staged=True)
    issue, faults = machine.engine._issue, [ZeroDivisionError()]

    def broken(*arguments: Any) -> Any:
        if faults:
            raise faults.pop()
        return issue(*arguments)

    monkeypatch.setattr(machine.engine, "_issue", broken)
    with pytest.raises(ZeroDivisionError):
        machine.streamer.enter(0)
    for number in range(5):
        machine.call(number)
    machine.engine.close()


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(0, 40000))
def test_resident_blocks_fit(sizes: list[int], resident_bytes: int) -> None:
    resident = choose_resident(sizes, resident_bytes)
    assert sum(sizes[number] for number in resident) <= resident_bytes
    assert len(resident) == len(sizes) or sum(sizes) > resident_bytes


@pytest.mark.parametrize("num_resident", [0, 15, 20, 30, 40, 60])
def test_resident_blocks_are_spread_evenly(num_resident: int) -> None:
    resident = sorted(choose_resident([100] * 60, num_resident * 100 + 99))
    assert len(resident) == num_resident
    gaps = {after - before for before, after in itertools.pairwise(resident)}
    assert not gaps or max(gaps) - min(gaps) <= 1
