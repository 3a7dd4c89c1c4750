"""Streams blocks through a few slots of device memory, ahead of the calls that need them, in whatever order they come.

The slots are a cache. A block that is called and not there is copied in; the next blocks in the order that was seen so
far follow at once. What makes room is the block whose next call is farthest away. Copies wait for the computing only
where they overwrite what it reads, and the computing waits only for the copy that it needs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from stages.memory.engine import CopyEngine, Ready
from stages.policies.offload.units import Unit


def choose_resident(sizes: Sequence[int], resident_bytes: int) -> set[int]:
    """Which blocks stay on the device, in `resident_bytes` at most: spread evenly, as those between hide the copies."""
    total = sum(sizes)
    if resident_bytes >= total:
        return set(range(len(sizes)))
    resident: set[int] = set()
    credit = 0
    for number, size in enumerate(sizes):
        credit += max(0, resident_bytes) * size
        if credit >= total * size:
            credit -= total * size
            resident.add(number)
    left = resident_bytes - sum(sizes[number] for number in resident)
    for number in sorted(set(range(len(sizes))) - resident, key=lambda number: -sizes[number]):
        if sizes[number] <= left:  # blocks of several sizes: even steps leave gaps
            left -= sizes[number]
            resident.add(number)
    return resident


def slot_bytes(sizes: Sequence[int], resident: Collection[int], ahead: int) -> tuple[int, int]:
    """(number, bytes of each) of the slots for the blocks that are streamed."""
    streamed = [size for number, size in enumerate(sizes) if number not in resident]
    return min(ahead + 1, len(streamed)), max(streamed, default=0)


class Slot:
    """Device memory for one block."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.unit: int | None = None
        """Whose weights are in it or on the way."""
        self.ready: list[Ready] = []
        self.free: Any = None
        """Passes when the last call that read the slot is done."""
        self.num_users = 0


class Streamer:
    """The blocks of one component. One thread at a time: `enter` and `leave` around each call of a streamed block."""

    def __init__(
        self, engine: CopyEngine, units: Sequence[Unit], resident: Collection[int], ahead: int, *, staged: bool = False
    ) -> None:
        """Allocates slots and resident blocks, and starts to fill the latter.

        Raises torch.OutOfMemoryError, with nothing left allocated.
        """
        self._engine, self._units, self._staged, self._ahead = engine, units, staged, ahead
        self.resident = frozenset(resident)
        self._kept: dict[int, torch.Tensor] = {}
        self._slots: list[Slot] = []
        self._holding: dict[int, Slot] = {}
        sizes = [unit.num_bytes for unit in units]
        try:
            for number in sorted(self.resident):
                self._kept[number] = engine.allocate(sizes[number])
            num_slots, num_bytes = slot_bytes(sizes, self.resident, ahead)
            for _ in range(num_slots):
                self._slots.append(Slot(engine.allocate(num_bytes)))
            for number, memory in self._kept.items():
                for ready in units[number].copy_in(engine, memory, staged=staged):
                    engine.wait(ready)
                units[number].bind(memory)
        except BaseException:
            self._free()
            raise
        self._order = [number for number in range(len(units)) if number not in self.resident]
        """Streamed blocks in the order of their calls, as far as it is known."""
        self._place = {number: place for place, number in enumerate(self._order)}
        self._called: set[int] = set()
        self._last: int | None = None
        self._is_learnt = False
        """A first round is over: blocks that were not called in it are not expected."""
        for number in self._order:
            units[number].unbind(engine)

    @property
    def resident_bytes(self) -> int:
        """Device memory of the blocks that stay."""
        return sum(memory.numel() for memory in self._kept.values())

    @property
    def num_slots(self) -> int:
        """Blocks that have room on the device beside those that stay."""
        return len(self._slots)

    @property
    def streamed(self) -> list[int]:
        """Numbers of the blocks that are not resident."""
        return sorted(self._order)

    def enter(self, number: int) -> None:
        """Block `number` is about to compute: its parameters show its weights, and the next blocks are on their way.

        Raises what kept a staged copy from being read.
        """
        if not self._slots:
            raise torch.OutOfMemoryError("the device had no memory left for the weights that stream: out of memory")
        self._learn(number)
        following = self._following(number)
        wanted = {number, *following}
        slot = self._holding.get(number)
        if slot is None:
            slot = self._victim(number, wanted)
            assert slot is not None, "more blocks compute within each other than there are slots"
            self._fetch(number, slot)
        for other in following:
            if other not in self._holding and (room := self._victim(number, wanted)) is not None:
                self._fetch(other, room)
        try:
            for ready in slot.ready:
                self._engine.wait(ready)
        except BaseException:
            self._empty(slot)
            raise
        self._units[number].bind(slot.memory)
        slot.num_users += 1

    def leave(self, number: int) -> None:
        """The call of block `number` is over, in whatever way."""
        slot = self._holding[number]
        slot.num_users -= 1
        slot.free = self._engine.record()

    def close(self) -> None:
        """Free all device memory; the parameters show stand-ins."""
        self._engine.synchronize()
        for unit in self._units:
            unit.unbind(self._engine)
        self.resident = frozenset()
        self._free()

    def _free(self) -> None:
        for memory in [*self._kept.values(), *(slot.memory for slot in self._slots)]:
            self._engine.free(memory)
        self._kept, self._slots, self._holding = {}, [], {}

    def _fetch(self, number: int, slot: Slot) -> None:
        self._empty(slot)
        after = () if slot.free is None else (slot.free,)
        slot.ready = self._units[number].copy_in(self._engine, slot.memory, after, staged=self._staged)
        slot.unit = number
        self._holding[number] = slot

    def _empty(self, slot: Slot) -> None:
        if slot.unit is not None:
            del self._holding[slot.unit]
            slot.unit = None

    def _victim(self, number: int, wanted: set[int]) -> Slot | None:
        """The slot to overwrite: an empty one, or that of the block whose next call is farthest away."""
        free = [slot for slot in self._slots if not slot.num_users and slot.unit not in wanted]
        return max(free, key=lambda slot: self._distance(number, slot.unit), default=None)

    def _distance(self, number: int, other: int | None) -> int:
        if other is None:
            return 2 * len(self._order) + 1
        if self._is_learnt and other not in self._called:
            return 2 * len(self._order)
        return (self._place[other] - self._place[number]) % len(self._order)

    def _following(self, number: int) -> list[int]:
        """The next blocks, as many as there are slots beside the one of `number`."""
        found: list[int] = []
        place, length = self._place[number], len(self._order)
        for step in range(1, length):
            other = self._order[(place + step) % length]
            if not self._is_learnt or other in self._called:
                found.append(other)
            if len(found) == len(self._slots) - 1:
                break
        return found

    def _learn(self, number: int) -> None:
        """A block's first call puts it behind the block that was called before it."""
        if number in self._called:
            self._is_learnt = True
        else:
            self._called.add(number)
            if self._last is not None:
                self._order.remove(number)
                self._order.insert(self._order.index(self._last) + 1, number)
                self._place = {other: place for place, other in enumerate(self._order)}
        self._last = number
