"""Component (module-wise): whole components take turns in one stretch of device memory.

The host copy stays the master, so leaving the device is forgetting, and nothing is ever copied back. The component that
is expected next is fetched while the current one computes, if both have room.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from stages.memory.engine import CopyEngine, Ready
from stages.policies.offload.gates import (
    ENTRY_METHODS,
    LONG_METHODS,
    WAIT_SECONDS,
    CallLock,
    Gate,
    conversions_refused,
    entries,
    scoped,
)
from stages.policies.offload.placed import Placed
from stages.policies.offload.units import ALIGN_BYTES, Parts, Unit, outside_blocks


class Seat:
    """One component that takes turns."""

    def __init__(self, name: str, parts: Parts, engine: CopyEngine, *, staged: bool = False) -> None:
        """With `staged`, it comes from mapped files. Raises torch.OutOfMemoryError when its buffers have no room."""
        self.name = name
        self.staged = staged
        self.lock = CallLock(name)
        self.module = parts.module
        self.placed = Placed(name, engine, parts, parts.shared)
        self.unit = Unit(name, [*parts.rest, *(p for parameters in parts.block_parameters for p in parameters)])
        self.num_bytes = -(-self.unit.num_bytes // ALIGN_BYTES) * ALIGN_BYTES
        self.begin: int | None = None
        """Where in the arena its weights are or will be soon; None for nowhere."""
        self.ready: list[Ready] = []
        self.free: Any = None
        """Passes when its last call is done."""
        self.thread: int | None = None
        """Who is calling it."""
        self._gates: list[Gate] = []
        self._blocks = [block for _, block in parts.blocks]

    def open(self, turns: Turns) -> None:
        """Put gates wherever the component may be entered: as a whole, or by a call of one of its modules."""
        scope = scoped(_SeatScope(turns, self))
        inner = list(outside_blocks(self.module, set(map(id, self._blocks))))[1:]
        self._gates = [
            Gate(self.module, entry, scope) for entry in entries(self.module, (*ENTRY_METHODS, *LONG_METHODS))
        ]
        self._gates += [Gate(module, "forward", scope) for module in (*inner, *self._blocks)]
        self._gates.append(
            Gate(self.module, "_apply", conversions_refused(self.name, self.module, turns.engine.device))
        )

    def reset(self) -> None:
        """Back to a plain CPU module; no call may be under way."""
        for gate in reversed(self._gates):
            gate.remove()
        self.unit.restore()
        self.placed.restore()


class Turns:
    """The arena and who is in it."""

    def __init__(self, engine: CopyEngine, seats: Sequence[Seat], arena_bytes: int, order: Sequence[str]) -> None:
        """`order`: the expected order of calls; what is not in it comes last. Raises torch.OutOfMemoryError."""
        self.engine = engine
        self.seats = list(seats)
        self._condition = threading.Condition()
        self._arena = self._allocate(arena_bytes)
        named = {seat.name: seat for seat in seats}
        chain = list(dict.fromkeys([named[name] for name in order if name in named] + self.seats))
        self._next = dict(zip(chain, [*chain[1:], *chain[:1]], strict=True)) if len(chain) > 1 else {}
        """Who was called after whom the last time."""
        self._current: Seat | None = None
        for seat in self.seats:
            seat.unit.unbind(engine)
            seat.open(self)
        if chain:
            self._bring(chain[0], keep=None)

    @property
    def arena_bytes(self) -> int:
        """Device memory for all turns."""
        num_bytes: int = self._arena.numel()
        return num_bytes

    @property
    def least_bytes(self) -> int:
        """Device memory without which the largest component has no room."""
        return max((seat.num_bytes for seat in self.seats), default=0)

    def enter(self, seat: Seat) -> None:
        """A call of `seat` begins: waits for room, fetches it if it is not there, then fetches the next."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self._condition:
            while not self._bring(seat, keep=None):
                self._wait_for_room(seat, deadline)
            seat.thread = threading.get_ident()
            try:
                for ready in seat.ready:
                    self.engine.wait(ready)
                seat.unit.bind(self._arena[seat.begin :])
                if self._current is not None and self._current is not seat:
                    self._next[self._current] = seat
                self._current = seat
                following = self._next.get(seat)
                if following is not None:
                    self._bring(following, keep=seat)
            except BaseException:
                seat.thread = None
                seat.free = self.engine.record()
                self._evict(seat)
                self._condition.notify_all()
                raise

    def leave(self, seat: Seat) -> None:
        """The call is over, in whatever way."""
        with self._condition:
            seat.free = self.engine.record()
            seat.thread = None
            self._condition.notify_all()

    def resize(self, arena_bytes: int) -> None:
        """Take another amount of device memory, at least what the largest component needs; waits for running calls.

        Raises torch.OutOfMemoryError, with the smallest arena taken.
        """
        if self._bounded(arena_bytes) == self.arena_bytes:
            return
        deadline = time.monotonic() + WAIT_SECONDS
        with self._condition:
            while any(seat.thread is not None for seat in self.seats):
                if not self._condition.wait(timeout=max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"components were in use for {WAIT_SECONDS:.0f} s")
            self._clear()
            try:
                self._arena = self._allocate(arena_bytes)
            except torch.OutOfMemoryError:
                self._arena = self._allocate(0)
                raise

    def reset(self) -> None:
        """All components back to plain CPU modules; waits for running calls."""
        with contextlib.ExitStack() as locks:
            for seat in self.seats:
                locks.enter_context(seat.lock)
            self._clear()
            for seat in self.seats:
                seat.reset()

    def _clear(self) -> None:
        self.engine.synchronize()
        for seat in self.seats:
            if seat.begin is not None:
                self._evict(seat)
        self.engine.free(self._arena)
        self._arena = self._arena[:0].clone()

    def _allocate(self, arena_bytes: int) -> torch.Tensor:
        return self.engine.allocate(self._bounded(arena_bytes))

    def _bounded(self, arena_bytes: int) -> int:
        """At least the largest component, at most all of them."""
        return min(sum(seat.num_bytes for seat in self.seats), max(arena_bytes, self.least_bytes))

    def _wait_for_room(self, seat: Seat, deadline: float) -> None:
        mine = threading.get_ident()
        holders = [other for other in self.seats if other.thread is not None]
        if all(other.thread == mine for other in holders):
            names = ", ".join(other.name for other in holders)
            raise RuntimeError(
                f"'{seat.name}' is called from within {names} and has no room beside it: "
                "set offload.policy: layerwise, or a larger offload.vram"
            )
        if not self._condition.wait(timeout=max(0.0, deadline - time.monotonic())):
            raise RuntimeError(f"'{seat.name}' found no room on the device for {WAIT_SECONDS:.0f} s")

    # The arena ----------------------------------------------------------------------------------------------------

    def _bring(self, seat: Seat, keep: Seat | None) -> bool:
        """Give `seat` a place and start its copy, evicting others but `keep` and those in use; False for no room."""
        if seat.begin is not None:
            return True
        staying = [other for other in self._inside() if other.thread is not None or other is keep]
        if self._gap(seat.num_bytes, staying) is None:
            return False
        while (begin := self._gap(seat.num_bytes, self._inside())) is None:
            victims = [other for other in self._inside() if other not in staying]
            victim = max(victims, key=lambda other: self._turns_until(other))
            self._evict(victim)
        # Earlier calls of anyone may have read this part of the arena; the copy follows them all.
        events = [other.free for other in self.seats if other.free is not None]
        seat.begin = begin
        arena = self._arena[begin : begin + seat.num_bytes]
        seat.ready = seat.unit.copy_in(self.engine, arena, events, staged=seat.staged)
        return True

    def _evict(self, seat: Seat) -> None:
        seat.unit.unbind(self.engine)
        assert seat.begin is not None
        self.engine.evict(self._arena[seat.begin : seat.begin + seat.num_bytes])
        seat.begin = None

    def _inside(self) -> list[Seat]:
        return sorted((seat for seat in self.seats if seat.begin is not None), key=lambda seat: seat.begin or 0)

    def _gap(self, num_bytes: int, inside: Sequence[Seat]) -> int | None:
        """Where `num_bytes` fit between `inside`, or None."""
        begin = 0
        for seat in sorted(inside, key=lambda seat: seat.begin or 0):
            assert seat.begin is not None
            if seat.begin - begin >= num_bytes:
                return begin
            begin = seat.begin + seat.num_bytes
        return begin if self._arena.numel() - begin >= num_bytes else None

    def _turns_until(self, seat: Seat) -> int:
        """How many turns away its next call is, as far as one knows."""
        at = self._current
        for turns in range(1, len(self.seats) + 1):
            at = self._next.get(at) if at is not None else None
            if at is seat:
                return turns
        return len(self.seats) + 1


class _SeatScope:
    """One call of one component or of a module inside it; calls within calls cost next to nothing."""

    __slots__ = ("_seat", "_turns")

    def __init__(self, turns: Turns, seat: Seat) -> None:
        self._turns, self._seat = turns, seat

    def __enter__(self) -> None:
        lock = self._seat.lock
        lock.__enter__()
        if lock.depth == 1:
            try:
                self._turns.enter(self._seat)
            except BaseException:
                lock.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        lock = self._seat.lock
        try:
            if lock.depth == 1:
                self._turns.leave(self._seat)
        finally:
            lock.__exit__()
