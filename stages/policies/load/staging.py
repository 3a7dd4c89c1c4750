"""Buffers that chunks pass through on their way to another dtype or another device."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable

import torch

from stages.memory.host import HostMemory
from stages.policies.load.files import BLOCK

SERIAL_ELEMENTS = 32767
"""torch gives the elements of one operation to several threads from 32768 on."""


class Staging(abc.ABC):
    """What one thread reads into. For each chunk: `buffer`, then `deliver` for each piece, then `submit`."""

    @abc.abstractmethod
    def buffer(self) -> torch.Tensor:
        """Memory that a chunk may be read into now: uint8 on the CPU, page aligned, 2 * BLOCK longer than a chunk."""

    @abc.abstractmethod
    def deliver(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Have `source` (1-D, in the buffer) copied to `target` (1-D, as long, of any dtype and device)."""

    def submit(self) -> None:
        """All pieces of this chunk are delivered."""

    def finish(self) -> None:
        """Wait until every delivery has arrived, and give the buffers back."""


class HostStaging(Staging):
    """Delivers at once, by the thread itself."""

    def __init__(self, chunk_bytes: int) -> None:
        self._buffer = HostMemory(chunk_bytes + 2 * BLOCK).bytes

    def buffer(self) -> torch.Tensor:
        return self._buffer

    def deliver(self, source: torch.Tensor, target: torch.Tensor) -> None:
        convert(source, target)


def convert(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy to another dtype on the CPU, by the calling thread alone: each reader has a chunk of its own to work on."""
    torch._foreach_copy_(target.split(SERIAL_ELEMENTS), source.split(SERIAL_ELEMENTS))


class Link(abc.ABC):
    """Asynchronous copies from host memory, in order: one thread's own queue to a device."""

    @abc.abstractmethod
    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Queue the copy; `source` stays as it is until the next mark is reached."""

    @abc.abstractmethod
    def mark(self) -> Callable[[], None]:
        """What waits until all copies queued so far are done."""


class CudaLink(Link):
    """A CUDA stream of its own, the calling thread's current one from now on. The GPU converts to other dtypes."""

    NUM_EVENTS = 4
    """More than the marks that are ever waited for at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        # Once, and not for each copy: chunks come by the thousand, and all threads share one interpreter.
        torch.cuda.set_stream(self._stream)
        self._events = itertools.cycle([torch.cuda.Event() for _ in range(self.NUM_EVENTS)])

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.dtype != target.dtype:
            source = source.to(target.device, non_blocking=True)
        target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        event = next(self._events)
        event.record(self._stream)
        return event.synchronize


class RingStaging(Staging):
    """A ring of buffers: while one is copied to the device, the next one is read into."""

    NUM_BUFFERS = 2

    def __init__(self, link: Link, chunk_bytes: int, *, pin: bool) -> None:
        self._link = link
        size = -(-chunk_bytes // BLOCK) * BLOCK + 2 * BLOCK
        self._memory = HostMemory(size * self.NUM_BUFFERS, pin=pin)
        self._buffers = self._memory.bytes.split(size)
        self._waits: list[Callable[[], None]] = [_nothing] * self.NUM_BUFFERS
        self._next = 0

    def buffer(self) -> torch.Tensor:
        self._waits[self._next]()
        return self._buffers[self._next]

    def deliver(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._link.copy(source, target)

    def submit(self) -> None:
        self._waits[self._next] = self._link.mark()
        self._next = (self._next + 1) % len(self._buffers)

    def finish(self) -> None:
        for wait in self._waits:
            wait()
        self._memory.close()


def _nothing() -> None:
    """No copy to wait for."""
