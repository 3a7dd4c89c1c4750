"""Pins the pieces of host regions as soon as each is full, beside the reading of the others."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from stages.memory.host import REGISTER_BYTES, HostMemory
from stages.policies.load.chunks import Piece
from stages.policies.load.reader import Job, Targets
from stages.policies.load.staging import Destination


class PinAsFilled:
    """One thread that pins; the driver gains nothing from more. First `watch`, then the reads, then `finish`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pin")
        self._lock = threading.Lock()
        self._awaited: Counter[tuple[HostMemory, int]] = Counter()
        """Reads that a piece of a region still waits for."""
        self._pinned: list[Future[None]] = []

    def watch(self, jobs: Iterable[Job], memory: HostMemory, targets: Targets) -> list[Job]:
        """The jobs that fill `memory`, in the order of its addresses, so that one piece after another is full."""
        watched = []
        for job in jobs:
            spans = [_offsets(piece, targets[piece.name], memory) for piece in job.chunk.pieces]
            watched.append((min(spans), self._watch(job, memory, spans)))
        return [job for _, job in sorted(watched, key=lambda pair: pair[0])]

    def _watch(self, job: Job, memory: HostMemory, spans: Iterable[tuple[int, int]]) -> Job:
        pieces = {
            (memory, number)
            for begin, end in spans
            for number in range(begin // REGISTER_BYTES, -(-end // REGISTER_BYTES))
        }
        self._awaited.update(pieces)
        return msgspec.structs.replace(job, landed=functools.partial(self._landed, pieces))

    def finish(self) -> None:
        """Wait for the pieces that are full. Raises UsageError when the driver has refused one."""
        self._pool.shutdown()
        for pinned in self._pinned:
            pinned.result()

    def cancel(self) -> None:
        """Pin nothing more."""
        with self._lock:
            self._awaited.clear()  # so that no piece will be full
        self._pool.shutdown(cancel_futures=True)

    def _landed(self, pieces: set[tuple[HostMemory, int]]) -> None:
        with self._lock:
            self._awaited.subtract(pieces)
            full = [piece for piece in pieces if not self._awaited[piece]]
            self._pinned += [self._pool.submit(memory.pin_piece, number) for memory, number in full]


def _offsets(piece: Piece, to: Destination, memory: HostMemory) -> tuple[int, int]:
    """First byte of a piece in `memory`, and the byte after its last one."""
    size, itemsize = to.tensor.element_size(), to.dtype.itemsize
    begin = to.address - memory.bytes.data_ptr() + piece.start // itemsize * size
    return begin, begin + piece.num_bytes // itemsize * size
