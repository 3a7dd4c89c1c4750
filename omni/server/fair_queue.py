"""Who runs next, as a pure data structure: no clock, no I/O.

Of the requests of a graph that may run, the highest `priority` goes first; among its keys the one of which the fewest
run in this graph, then the one that was served the longest time ago; of a key's requests the oldest.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Hashable
from typing import TypeVar

import msgspec

T = TypeVar("T", bound=Hashable)


class Entry(msgspec.Struct, frozen=True, kw_only=True, order=False):
    """One request that waits or runs."""

    id: str
    graph: str
    key: str = ""
    priority: int = 0
    age: tuple[float, str] = (0.0, "")
    """Smaller is older: when it was made, and what tells equal times apart."""
    suspect: bool = False
    """Whether a server died while it ran. Suspects run one at a time, so that the guilty one is found."""


class FairQueue:
    """Entries by graph, priority and key; `take` moves the next one from waiting to running."""

    def __init__(self, slots: dict[str, int], max_running_per_key: int | None = None) -> None:
        self._slots = slots
        self._cap = max_running_per_key
        self._lanes: dict[str, dict[int, dict[str, list[Entry]]]] = {graph: {} for graph in slots}
        """Graph -> priority -> key -> entries, the oldest first."""
        self._waiting: dict[str, Entry] = {}
        self._running: dict[str, Entry] = {}
        self._waiting_in: Counter[str] = Counter()
        self._waiting_of: Counter[tuple[str, str]] = Counter()
        self._running_in: Counter[str] = Counter()
        self._running_of: Counter[str] = Counter()
        self._running_for: Counter[tuple[str, str]] = Counter()
        self._suspects = 0
        self._turn = 0
        self._served: dict[tuple[str, str], int] = {}

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._waiting or entry_id in self._running

    def is_waiting(self, entry_id: str) -> bool:
        """Whether it waits."""
        return entry_id in self._waiting

    def waiting(self, graph: str) -> int:
        """How many wait for a graph."""
        return self._waiting_in[graph]

    def waiting_of(self, graph: str, key: str) -> int:
        """How many of a key wait for a graph."""
        return self._waiting_of[graph, key]

    def running(self, graph: str) -> int:
        """How many run in a graph."""
        return self._running_in[graph]

    def waiting_ids(self) -> set[str]:
        """All that wait."""
        return set(self._waiting)

    def add(self, entry: Entry) -> None:
        """Let an entry wait. The graph must have slots, the id must be new."""
        if entry.id in self:
            raise ValueError(f"{entry.id} is in the queue already")
        lane = self._lanes[entry.graph].setdefault(entry.priority, {}).setdefault(entry.key, [])
        bisect.insort(lane, entry, key=lambda other: other.age)
        self._waiting[entry.id] = entry
        self._waiting_in[entry.graph] += 1
        self._waiting_of[entry.graph, entry.key] += 1

    def discard(self, entry_id: str) -> bool:
        """Take a waiting entry out. False when it does not wait."""
        entry = self._waiting.get(entry_id)
        if entry is None:
            return False
        self._leave_lane(entry)
        return True

    def take(self) -> Entry | None:
        """The next entry that may run; it runs from now on, until `release`."""
        # Graphs compete for a key's cap only: the better of their next ones goes first.
        able = [graph for graph, slots in self._slots.items() if self._running_in[graph] < slots]
        found = [entry for graph in able if self._waiting_in[graph] and (entry := self._next(graph)) is not None]
        if not found:
            return None
        entry = min(found, key=lambda each: (-each.priority, each.age))
        self._leave_lane(entry)
        self._start(entry)
        return entry

    def release(self, entry_id: str) -> None:
        """A running entry has ended."""
        entry = self._running.pop(entry_id)
        _count_down(self._running_in, entry.graph)
        _count_down(self._running_of, entry.key)
        _count_down(self._running_for, (entry.graph, entry.key))
        self._suspects -= entry.suspect
        self._forget(entry)

    def _next(self, graph: str) -> Entry | None:
        lanes = self._lanes[graph]
        for priority in sorted(lanes, reverse=True):
            ready = [
                entry
                for key, lane in lanes[priority].items()
                if self._cap is None or self._running_of[key] < self._cap
                if (entry := self._first(lane)) is not None
            ]
            if ready:
                return min(ready, key=self._rank)
        return None

    def _first(self, lane: list[Entry]) -> Entry | None:
        """The oldest entry that may run beside what runs."""
        return next((entry for entry in lane if not (entry.suspect and self._suspects)), None)

    def _rank(self, entry: Entry) -> tuple[int, int, tuple[float, str]]:
        place = (entry.graph, entry.key)
        return (self._running_for[place], self._served.get(place, 0), entry.age)

    def _start(self, entry: Entry) -> None:
        self._running[entry.id] = entry
        self._running_in[entry.graph] += 1
        self._running_of[entry.key] += 1
        self._running_for[entry.graph, entry.key] += 1
        self._suspects += entry.suspect
        self._turn += 1
        self._served[entry.graph, entry.key] = self._turn

    def _leave_lane(self, entry: Entry) -> None:
        del self._waiting[entry.id]
        lanes = self._lanes[entry.graph]
        lane = lanes[entry.priority][entry.key]
        place = bisect.bisect_left(lane, entry.age, key=lambda other: other.age)
        while lane[place].id != entry.id:  # equal ages
            place += 1
        del lane[place]
        if not lane:
            del lanes[entry.priority][entry.key]
        if not lanes[entry.priority]:
            del lanes[entry.priority]
        _count_down(self._waiting_in, entry.graph)
        _count_down(self._waiting_of, (entry.graph, entry.key))
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        """A key without requests has no history: the memory that a queue takes does not grow."""
        place = (entry.graph, entry.key)
        if not self._waiting_of[place] and not self._running_for[place]:
            self._served.pop(place, None)


def _count_down(counter: Counter[T], name: T) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]
