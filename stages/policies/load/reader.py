"""The reader threads: one pool that works on the chunks of all components at once."""

from __future__ import annotations

import abc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec
import torch

from omni.errors import UsageError
from stages.policies.load.chunks import Chunk
from stages.policies.load.files import Files
from stages.policies.load.staging import Destination, Part, Staging, convert, cut

Progress = Callable[[str, int, int], None]
"""(component, bytes done, bytes in all)."""
Targets = Mapping[str, Destination]
"""By the names of the file's tensors."""

REPORT_SECONDS = 0.1
"""How often progress is told."""
CACHE_LINE_BYTES = 64
STALL_SECONDS = 300.0
"""A load that reads nothing for so long has failed: a network file system that does not answer."""


class Lane:
    """What one thread has for itself."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._stagings: dict[Callable[[], Staging], Staging] = {}

    def staging(self, make: Callable[[], Staging]) -> Staging:
        """This thread's staging of one kind, made when it is first needed."""
        if make not in self._stagings:
            self._stagings[make] = make()
        return self._stagings[make]

    def finish(self) -> None:
        """Wait until all that was staged has arrived."""
        for staging in self._stagings.values():
            staging.finish()


class Route(abc.ABC):
    """How the chunks of a component get to their tensors."""

    @abc.abstractmethod
    def carry(self, chunk: Chunk, lane: Lane) -> None:
        """Read one chunk and bring it to its tensors. Raises UsageError with file and tensor."""


class PopulateRoute(Route):
    """The tensors are mapped; their pages are read."""

    def carry(self, chunk: Chunk, lane: Lane) -> None:
        lane.files.populate(chunk)


class LeaveRoute(Route):
    """The tensors are mapped; their pages are read when they are used."""

    def carry(self, chunk: Chunk, lane: Lane) -> None:
        """Nothing to do."""


class FillRoute(Route):
    """Straight into the tensors' memory.

    The kernel copies from the page cache with one instruction, which takes up to four times as long where source and
    destination lie at different places of their cache lines. Headers of files have any length, so that this is the
    rule; there, the bytes are copied from the mapped file, as the C library knows how to.
    """

    def __init__(self, targets: Targets) -> None:
        self._addresses = {name: to.address for name, to in targets.items()}
        self._views = {name: memoryview(to.tensor.view(torch.uint8).numpy()) for name, to in targets.items()}

    def carry(self, chunk: Chunk, lane: Lane) -> None:
        if lane.files.cached and self._is_askew(chunk):
            lane.files.populate(chunk)
            mapping, offset = lane.files.mapping(chunk.file), chunk.offset
            for piece in chunk.pieces:
                mapping.copy(offset, piece.num_bytes, self._addresses[piece.name] + piece.start)
                offset += piece.num_bytes
            lane.files.release(chunk)
            return
        views = [self._views[piece.name][piece.start : piece.start + piece.num_bytes] for piece in chunk.pieces]
        lane.files.scatter(chunk, views)

    def _is_askew(self, chunk: Chunk) -> bool:
        first = chunk.pieces[0]
        return bool((self._addresses[first.name] + first.start - chunk.offset) % CACHE_LINE_BYTES)


class ConvertRoute(Route):
    """From mapped files to another dtype in the CPU's memory.

    Pages of the page cache are converted where they lie: to read them first would be one more copy.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets

    def carry(self, chunk: Chunk, lane: Lane) -> None:
        lane.files.populate(chunk)
        mapped = torch.frombuffer(lane.files.mapping(chunk.file).map, dtype=torch.uint8)
        for part, to in _parts(chunk, chunk.offset, self._targets):
            convert(*cut(mapped, part, to))
        lane.files.release(chunk)


class StagedRoute(Route):
    """Through a buffer: to a device, or past the page cache."""

    def __init__(self, targets: Targets, make_staging: Callable[[], Staging]) -> None:
        self._targets = targets
        self._make_staging = make_staging

    def carry(self, chunk: Chunk, lane: Lane) -> None:
        staging = lane.staging(self._make_staging)
        buffer = staging.buffer()
        begin = lane.files.read(chunk, buffer.view)
        for part, to in _parts(chunk, begin, self._targets):
            staging.deliver(buffer, part, to)
        staging.submit()


def _parts(chunk: Chunk, begin: int, targets: Targets) -> Iterator[tuple[Part, Destination]]:
    """Each piece of a chunk that lies in memory from byte `begin` on, and where it goes."""
    for piece in chunk.pieces:
        yield Part(begin, piece.num_bytes, piece.start), targets[piece.name]
        begin += piece.num_bytes


class Job(msgspec.Struct, frozen=True):
    """One chunk of one component."""

    component: str
    chunk: Chunk
    route: Route
    landed: Callable[[], None] | None = None
    """Called by the thread that has carried the chunk."""


class _Pool:
    """What the threads of one load share."""

    def __init__(self, jobs: Iterable[Job], files: Files) -> None:
        self._jobs = deque(jobs)
        self._files = files
        self._changed = threading.Condition()
        self._running = 0
        self.done: dict[str, int] = {}
        self.failure: BaseException | None = None
        self.reading: dict[str, Chunk] = {}
        """Thread -> what it has taken last."""

    def start(self, num_threads: int) -> list[threading.Thread]:
        """Start the threads. They are daemons: one that hangs in a read does not keep the process alive."""
        self._running = num_threads
        threads = [
            threading.Thread(target=self._work, name=f"load-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in threads:
            thread.start()
        return threads

    def stop(self, failure: BaseException) -> None:
        """Let no thread take another chunk."""
        with self._changed:
            self.failure = self.failure or failure
            self._jobs.clear()

    def wait(self, seconds: float) -> bool:
        """Whether all threads have ended, after at most `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, seconds)

    def _take(self) -> Iterator[Job]:
        while True:
            try:
                yield self._jobs.popleft()
            except IndexError:
                return

    def _work(self) -> None:
        lane = Lane(self._files)
        try:
            name = threading.current_thread().name
            for job in self._take():
                self.reading[name] = job.chunk
                job.route.carry(job.chunk, lane)
                if job.landed is not None:
                    job.landed()
                with self._changed:
                    self.done[job.component] = self.done.get(job.component, 0) + job.chunk.num_bytes
        except (OSError, RuntimeError, ValueError, MemoryError, UsageError) as error:
            self.stop(error)
        finally:
            try:
                lane.finish()
            except RuntimeError as error:
                self.stop(error)
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


def read_all(jobs: list[Job], files: Files, num_threads: int, totals: Mapping[str, int], progress: Progress) -> None:
    """Carry out all jobs with `num_threads` threads, and return when every byte is where it belongs.

    `progress` is called by the calling thread only. Raises what the first thread to fail raised, after the others have
    stopped; UsageError when nothing at all is read for STALL_SECONDS.
    """
    pool = _Pool(jobs, files)
    num_bytes = sum(job.chunk.num_bytes for job in jobs)
    threads = pool.start(max(1, min(num_threads, len(jobs))) if jobs else 0)
    told = dict.fromkeys(totals, -1)
    moved = time.monotonic()
    try:
        while True:
            ended = pool.wait(REPORT_SECONDS)
            for component, total in totals.items():
                done = pool.done.get(component, 0)
                if done != told[component]:
                    told[component], moved = done, time.monotonic()
                    progress(component, done, total)
            if ended:
                break
            if time.monotonic() - moved > STALL_SECONDS:
                files = ", ".join(sorted({chunk.file for chunk in pool.reading.values()}))
                raise UsageError(f"{files}: nothing was read for {STALL_SECONDS:.0f} s: is the file system there?")
    except BaseException as error:
        pool.stop(error)
        pool.wait(REPORT_SECONDS)
        raise
    for thread in threads:
        thread.join(REPORT_SECONDS)
    if pool.failure is not None:
        raise pool.failure
    if (done := sum(pool.done.values())) != num_bytes:  # a thread ended in a way that nobody thought of
        raise UsageError(f"only {done} of {num_bytes} bytes were read, see the log: load again")
