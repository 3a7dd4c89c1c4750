"""Copies weights from host memory to a device and keeps count, behind one interface for GPUs and for machines without.

Two lines of work: the copy stream, where copies run one after another, and the compute stream, where kernels run.
Neither waits for the other but through events:

    ready = engine.copy_in(slot, master, after=(free,))   # the copy starts when `free` has passed
    engine.wait(ready)                                     # what is computed from now on sees the copy
    ...
    free = engine.record()                                 # passes when all that was computed so far is done
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import torch

from stages.memory.host import pieces
from stages.memory.staging import StagingRing

STALE_BYTE = 0xFF
"""Fills memory without contents: NaN in every float type, so that whoever reads it shows it."""
STAGED_SECONDS = 600.0
"""How long one staged copy may take; disks that are slower are broken."""


class Counters(msgspec.Struct, frozen=True):
    """What an engine has copied so far. A copy of one span of memory counts once, however it was cut."""

    num_copies_in: int = 0
    """Host to device."""
    bytes_in: int = 0
    num_copies_out: int = 0
    """Device to host."""
    bytes_out: int = 0


class Ready:
    """One copy: `event` is what its engine waits on; `issued` is set where a thread reads the source first."""

    __slots__ = ("event", "issued")

    def __init__(self, event: Any = None, issued: Future[Any] | None = None) -> None:
        self.event = event
        self.issued = issued


def _issued(copy: Future[Any]) -> Any:
    """The event of a staged copy, once its source is read. Raises RuntimeError when it takes too long."""
    try:
        return copy.result(timeout=STAGED_SECONDS)
    except TimeoutError as error:
        raise RuntimeError(f"weights were not read within {STAGED_SECONDS:.0f} s: is the disk there?") from error


class CopyEngine(ABC):
    """A device's memory and the way into it. Several threads may use one engine, if each memory has one user at a time.

    `wait` and `record` act on the calling thread's current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.device_bytes = 0
        """What `allocate` has given out and `free` has not taken back."""
        self._counts = [0, 0, 0, 0]
        self._lock = threading.Lock()
        self._staging: StagingRing | None = None
        self._stale: dict[torch.dtype, torch.Tensor] = {}

    @property
    def counters(self) -> Counters:
        """Copies and bytes so far."""
        return Counters(*self._counts)

    @property
    @abstractmethod
    def pins(self) -> bool:
        """Whether copies are quick only from pinned memory."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Device memory, uint8, without contents. Raises torch.OutOfMemoryError."""
        with torch.inference_mode(False):  # tensors of that mode could not be written outside of it
            memory = self._allocate(num_bytes)
        with self._lock:
            self.device_bytes += num_bytes
        return memory

    def free(self, memory: torch.Tensor) -> None:
        """Take back what `allocate` gave, whole; the caller drops its references and has called `synchronize`."""
        with self._lock:
            self.device_bytes -= memory.numel()

    def copy_in(
        self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any] = (), *, staged: bool = False
    ) -> Ready:
        """Copy `source` (host) to `target` (device), both uint8 of one length, once all events of `after` have passed.

        Returns at once. `staged`: the source is mapped from a file or not pinned, so threads read it piece by piece
        into pinned buffers, beside the computing.
        """
        with self._lock:
            self._counts[0] += 1
            self._counts[1] += source.numel()
        if staged or (self.pins and not source.is_pinned()):
            return self._stage(target, source, after)
        return self._copy(target, source, after)

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy `source` (device) to `target` (host) of the same shape and dtype, and wait for it."""
        with self._lock:
            self._counts[2] += 1
            self._counts[3] += source.numel() * source.element_size()
        target.copy_(source)

    def wait(self, ready: Ready) -> None:
        """What is computed from now on comes after this copy."""
        if ready.issued is not None:
            ready.event = _issued(ready.issued)
        self._wait(ready)

    @abstractmethod
    def record(self) -> Any:
        """An event that passes when all that was computed so far is done."""

    def synchronize(self) -> None:
        """Wait until the device has done everything, staged copies included."""
        if self._staging is not None:
            self._staging.drain(STAGED_SECONDS)
        self._synchronize()

    @abstractmethod
    def _synchronize(self) -> None: ...

    def evict(self, memory: torch.Tensor) -> None:
        """Nobody will read what is in `memory`."""

    def stale(self, dtype: torch.dtype) -> torch.Tensor:
        """One device element that stands in for weights that are elsewhere: NaN, where the dtype has one."""
        if dtype not in self._stale:
            with torch.inference_mode(False):
                element = torch.full((dtype.itemsize,), STALE_BYTE, dtype=torch.uint8, device=self.device)
                self._stale[dtype] = element.view(dtype)
        return self._stale[dtype]

    def peak_activation_bytes(self) -> int:
        """The most memory that was in use at once beside what `allocate` gave; 0 where nobody counts."""
        return 0

    def begin_measuring(self, *, beside_all: bool = True) -> None:
        """From now on `peak_activation_bytes` tells the most since now, beside all that is allocated at the moment.

        Without `beside_all`, beside what was there when the engine was made. Nothing may compute meanwhile.
        """

    def close(self) -> None:
        """Stop the reader threads."""
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def _stage(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> Ready:
        with self._lock:
            if self._staging is None:
                self._staging = StagingRing(self._issue, self._finish, pin=self.pins)
        return Ready(issued=self._staging.submit(target, source, after))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> Ready:
        return Ready(self._issue(target, source, after))

    @abstractmethod
    def _allocate(self, num_bytes: int) -> torch.Tensor: ...

    @abstractmethod
    def _issue(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> Any:
        """Put one copy on the copy stream; returns its event. From any thread."""

    @abstractmethod
    def _finish(self, event: Any) -> None:
        """Block until the copy of this event is done."""

    @abstractmethod
    def _wait(self, ready: Ready) -> None: ...


class CudaEngine(CopyEngine):
    """A CUDA GPU. Memory that both streams use is allocated once and never given back to torch while copies run."""

    pins = True

    def __init__(self, device: str | torch.device) -> None:
        chosen = torch.device(device)
        if chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
        super().__init__(chosen)
        self._stream = torch.cuda.Stream(chosen)
        self._base_bytes = torch.cuda.memory_allocated(chosen)
        torch.cuda.reset_peak_memory_stats(chosen)

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def peak_activation_bytes(self) -> int:
        peak = int(torch.cuda.max_memory_allocated(self.device))
        return max(0, peak - self.device_bytes - int(self._base_bytes))

    def begin_measuring(self, *, beside_all: bool = True) -> None:
        if beside_all:
            self._base_bytes = torch.cuda.memory_allocated(self.device) - self.device_bytes
        torch.cuda.reset_peak_memory_stats(self.device)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        # The allocator may hand out what kernels queued on the compute stream still read; the copy stream must not
        # overtake them.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return memory

    def _issue(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> torch.cuda.Event:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            for event in after:
                self._stream.wait_event(event)
            for begin, end in pieces(source):
                target[begin:end].copy_(source[begin:end], non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return ready

    def _finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def _wait(self, ready: Ready) -> None:
        torch.cuda.current_stream(self.device).wait_event(ready.event)


def engine_for(device: str) -> CopyEngine:
    """The engine of a GPU; for `cpu`, one that plays a device in host memory."""
    return HostEngine(poison=False) if torch.device(device).type == "cpu" else CudaEngine(device)


class HostEngine(CopyEngine):
    """Plays a device in host memory, for machines without one, and is stricter than a device.

    With `poison`, memory without contents holds NaN, a copy arrives at the last moment allowed (when someone waits
    for it), and a copy into memory that may be in use raises AssertionError. `log` tells what was asked for, in order:
    ("copy", address of the target), ("wait", address), ("record", number).
    """

    pins = False

    def __init__(self, *, poison: bool = True) -> None:
        super().__init__(torch.device("cpu"))
        self.poison = poison
        self.log: list[tuple[str, int]] = []
        self.activation_bytes = 0
        """What `peak_activation_bytes` tells: nobody counts in host memory."""
        self._clock = 0
        self._used: list[tuple[int, int, int]] = []
        """(begin, end, clock): memory that somebody waited for, so that it may be read until a later record."""
        self._pending: list[tuple[Ready, torch.Tensor, torch.Tensor]] = []
        self._steps = threading.RLock()

    def record(self) -> int:
        with self._steps:
            self._clock += 1
            self.log.append(("record", self._clock))
            return self._clock

    def _synchronize(self) -> None:
        with self._steps:
            self._run_pending(None)
            self._used.clear()

    def peak_activation_bytes(self) -> int:
        return self.activation_bytes

    def evict(self, memory: torch.Tensor) -> None:
        if self.poison:
            memory.fill_(STALE_BYTE)

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        self.evict(memory)
        return memory

    def _stage(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> Ready:
        self._begin(target, after)
        ready = super()._stage(target, source, ())
        ready.event = _range(target)
        return ready

    def _copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> Ready:
        self._begin(target, after)
        ready = Ready(_range(target))
        if not self.poison:
            target.copy_(source)
            return ready
        with self._steps:
            self._pending.append((ready, target, source))
        return ready

    def wait(self, ready: Ready) -> None:
        if ready.issued is not None:
            _issued(ready.issued)
        self._wait(ready)

    def _begin(self, target: torch.Tensor, after: Sequence[Any]) -> None:
        begin, end = _range(target)
        with self._steps:
            self.log.append(("copy", begin))
            freed = max(after, default=0)
            in_use = [span for span in self._used if span[0] < end and begin < span[1] and span[2] >= freed]
            assert not in_use, "a copy into memory that may be in use"
        self.evict(target)

    def _issue(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> None:
        target.copy_(source)

    def _finish(self, event: Any) -> None:
        pass

    def _wait(self, ready: Ready) -> None:
        begin, end = ready.event
        with self._steps:
            self.log.append(("wait", begin))
            self._run_pending(ready)
            self._used = [span for span in self._used if span[1] <= begin or end <= span[0]]
            self._used.append((begin, end, self._clock))

    def _run_pending(self, until: Ready | None) -> None:
        """The copies up to and with `until`, in order, as the copy stream does; all with None."""
        if until is not None and all(entry[0] is not until for entry in self._pending):
            return
        while self._pending:
            ready, target, source = self._pending.pop(0)
            target.copy_(source)
            if ready is until:
                return


def _range(memory: torch.Tensor) -> tuple[int, int]:
    return memory.data_ptr(), memory.data_ptr() + memory.numel()
