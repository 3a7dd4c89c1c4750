"""Deficit round robin: groups of calls take turns, and what a turn costs decides how many a group gets."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping

FORGOTTEN_AFTER = 64
"""Choices after which a group that did not wait in any of them is new again."""


class RoundRobin:
    """Groups in a ring. In each round a group may spend what the dearest of those waiting costs."""

    def __init__(self) -> None:
        self._ring: deque[Hashable] = deque()
        self._credit: dict[Hashable, float] = {}
        self._seen: dict[Hashable, int] = {}
        self._num_choices = 0

    def choose(self, costs: Mapping[Hashable, float]) -> Hashable:
        """The group whose turn it is. `costs`: each group that waits -> the cost of serving it once."""
        self._num_choices += 1
        for group in costs:
            if group not in self._credit:
                self._credit[group] = 0.0
                self._ring.append(group)
            self._seen[group] = self._num_choices
        self._forget()
        share = max(costs.values())
        while True:
            group = self._ring[0]
            if group in costs and self._credit[group] >= costs[group]:
                self._credit[group] -= costs[group]
                return group
            self._ring.rotate(-1)
            following = self._ring[0]
            if following in costs:
                self._credit[following] = min(self._credit[following] + share, 2 * share)

    def _forget(self) -> None:
        for group in [group for group, seen in self._seen.items() if self._num_choices - seen > FORGOTTEN_AFTER]:
            self._ring.remove(group)
            del self._credit[group], self._seen[group]
