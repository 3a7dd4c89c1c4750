"""Buffers that chunks pass through on their way to another dtype or another device."""

from __future__ import annotations

import abc
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from stages.memory import driver
from stages.memory.host import HostMemory
from stages.policies.load.files import BLOCK

SERIAL_ELEMENTS = 32767
"""torch gives the elements of one operation to several threads from 32768 on."""


class Destination(NamedTuple):
    """Where the elements of one tensor of a file go."""

    dtype: torch.dtype
    """In the file."""
    tensor: torch.Tensor
    """As one dimension, of any dtype and device."""
    address: int
    """Of `tensor`, looked up once: calls into torch are what a chunk spends its time on."""

    @classmethod
    def of(cls, dtype: torch.dtype, tensor: torch.Tensor) -> Destination:
        """`tensor` (contiguous), flat."""
        return cls(dtype, tensor.view(-1), tensor.data_ptr())


class Buffer(NamedTuple):
    """Memory that a chunk is read into: page aligned, 2 * BLOCK longer than a chunk."""

    bytes: torch.Tensor
    """uint8, on the CPU."""
    view: memoryview
    address: int

    @classmethod
    def of(cls, memory: torch.Tensor) -> Buffer:
        """`memory` (uint8) as a buffer."""
        return cls(memory, memoryview(memory.numpy()), memory.data_ptr())


class Part(NamedTuple):
    """`num_bytes` of a chunk, from byte `begin` of its buffer on, that belong to a tensor from its byte `start` on."""

    begin: int
    num_bytes: int
    start: int


class Staging(abc.ABC):
    """What one thread reads into. For each chunk: `buffer`, then `deliver` for each part, then `submit`."""

    @abc.abstractmethod
    def buffer(self) -> Buffer:
        """What a chunk may be read into now."""

    @abc.abstractmethod
    def deliver(self, buffer: Buffer, part: Part, to: Destination) -> None:
        """Have the part copied to its place."""

    def submit(self) -> None:
        """All parts of this chunk are delivered."""

    def finish(self) -> None:
        """Wait until every delivery has arrived, and give the buffers back."""


def cut(memory: torch.Tensor, part: Part, to: Destination) -> tuple[torch.Tensor, torch.Tensor]:
    """The elements of a part in `memory` (uint8), and their place in the tensor: both 1-D, each in its own dtype."""
    source = memory[part.begin : part.begin + part.num_bytes]
    if part.begin % to.dtype.itemsize:
        source = source.clone()  # elements that are not aligned in the file
    first = part.start // to.dtype.itemsize
    return source.view(to.dtype), to.tensor[first : first + part.num_bytes // to.dtype.itemsize]


class HostStaging(Staging):
    """Delivers at once, by the thread itself."""

    def __init__(self, chunk_bytes: int) -> None:
        self._buffer = Buffer.of(HostMemory(chunk_bytes + 2 * BLOCK).bytes)

    def buffer(self) -> Buffer:
        return self._buffer

    def deliver(self, buffer: Buffer, part: Part, to: Destination) -> None:
        convert(*cut(buffer.bytes, part, to))


def convert(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy to another dtype on the CPU, by the calling thread alone: each reader has a chunk of its own to work on."""
    torch._foreach_copy_(target.split(SERIAL_ELEMENTS), source.split(SERIAL_ELEMENTS))


class Link(abc.ABC):
    """Asynchronous copies from host memory, in order: one thread's own queue to a device."""

    @abc.abstractmethod
    def copy(self, buffer: Buffer, part: Part, to: Destination) -> None:
        """Queue the copy; the buffer stays as it is until the next mark is reached."""

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
        events = [torch.cuda.Event(blocking=True) for _ in range(self.NUM_EVENTS)]
        for event in events:
            event.record(self._stream)
        self._events = itertools.cycle(events)
        self._driver = driver.copy_queue(self._stream)

    def copy(self, buffer: Buffer, part: Part, to: Destination) -> None:
        if to.dtype == to.tensor.dtype and self._driver is not None:
            self._driver.copy(to.address + part.start, buffer.address + part.begin, part.num_bytes)
            return
        source, target = cut(buffer.bytes, part, to)
        if source.dtype != target.dtype:
            source = source.to(target.device, non_blocking=True)
        target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        event = next(self._events)
        if self._driver is None:
            event.record(self._stream)
            return event.synchronize
        self._driver.record(event)
        return functools.partial(self._wait, self._driver, event)

    @staticmethod
    def _wait(queue: driver.CopyQueue, event: torch.cuda.Event) -> None:
        if not queue.has_passed(event):
            event.synchronize()


class RingStaging(Staging):
    """A ring of buffers: while one is copied to the device, the next one is read into."""

    NUM_BUFFERS = 2

    def __init__(self, link: Link, chunk_bytes: int, *, pin: bool) -> None:
        self._link = link
        size = -(-chunk_bytes // BLOCK) * BLOCK + 2 * BLOCK
        self._memory = HostMemory(size * self.NUM_BUFFERS, pin=pin)
        self._buffers = [Buffer.of(memory) for memory in self._memory.bytes.split(size)]
        self._waits: list[Callable[[], None]] = [_nothing] * self.NUM_BUFFERS
        self._next = 0

    def buffer(self) -> Buffer:
        self._waits[self._next]()
        return self._buffers[self._next]

    def deliver(self, buffer: Buffer, part: Part, to: Destination) -> None:
        self._link.copy(buffer, part, to)

    def submit(self) -> None:
        self._waits[self._next] = self._link.mark()
        self._next = (self._next + 1) % len(self._buffers)

    def finish(self) -> None:
        for wait in self._waits:
            wait()
        self._memory.close()


def _nothing() -> None:
    """No copy to wait for."""
