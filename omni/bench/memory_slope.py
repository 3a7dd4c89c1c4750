"""Whether a server's memory stays flat under load: its slope over the requests that it has answered."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from statistics import linear_regression
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from omni.bench.report import Table

SETTLE_SHARE = 0.2
"""The first part of the requests does not count: caches and the allocator's arenas fill."""
MAX_BYTES_PER_REQUEST = 400.0
"""A request that stays in memory takes several times this: its task, events and strings alone are some kilobytes."""
MIN_SAMPLES = 5
MIB = 1024**2


class Memory(msgspec.Struct, frozen=True):
    """Memory over requests."""

    samples: list[tuple[int, int]]
    """(Requests answered, bytes)."""
    bytes_per_request: float
    """Slope by least squares, after the first part."""

    @property
    def is_flat(self) -> bool:
        """Whether no request leaves anything behind."""
        return self.bytes_per_request <= MAX_BYTES_PER_REQUEST

    @property
    def words(self) -> str:
        """The slope and its limit, in words."""
        return f"{self.bytes_per_request:+.0f} bytes a request, limit {MAX_BYTES_PER_REQUEST:.0f}"

    def table(self) -> Table:
        """For the report."""
        from omni.bench.report import Table

        sizes = [num_bytes / MIB for _, num_bytes in self.samples]
        columns = ("first MiB", "last MiB", "most MiB", "bytes a request")
        row = (sizes[0], sizes[-1], max(sizes), self.bytes_per_request)
        return Table(title="memory of the server, resident", columns=columns, rows={"soak": row})


def read_memory(samples: Sequence[tuple[float, int]], ends: Sequence[float]) -> Memory | None:
    """Memory by (instant, bytes) and the instants of answers, on one clock; None for too few samples."""
    ordered = sorted(ends)
    counted = [(bisect_right(ordered, instant), num_bytes) for instant, num_bytes in samples]
    settled = [point for point in counted if point[0] >= SETTLE_SHARE * len(ordered)]
    if len({count for count, _ in settled}) < MIN_SAMPLES:
        return None
    slope = linear_regression([float(count) for count, _ in settled], [float(size) for _, size in settled]).slope
    return Memory(counted, slope)
