"""Copies from memory that a device cannot read at full speed (mapped files, pageable memory), through pinned buffers.

Threads read the source piece by piece, so that waiting for the disk happens beside the computing.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from stages.memory.host import HostMemory

PIECE_BYTES = 16 << 20
NUM_BUFFERS = 6
NUM_READERS = 4
"""A disk needs several reads at once for its full rate."""

Issue = Callable[[torch.Tensor, torch.Tensor, Sequence[Any]], Any]


class StagingRing:
    """A few pinned buffers, the threads that fill them, and one that hands them on in order."""

    def __init__(self, issue: Issue, finish: Callable[[Any], None], *, pin: bool) -> None:
        """`issue(target, source, after)` starts one copy and returns its event; `finish(event)` waits for it."""
        self._issue = issue
        self._finish = finish
        self._memory = HostMemory(PIECE_BYTES * NUM_BUFFERS, pin=pin)
        with torch.inference_mode(False):
            buffers = self._memory.bytes.split(PIECE_BYTES)
        self._free: deque[tuple[torch.Tensor, Any]] = deque((buffer, None) for buffer in buffers)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="staging-read")
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="staging-send")

    def submit(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> Future[Any]:
        """Copy all of `source` to `target` after those before it; the result is the event of the last piece."""
        _will_need(source)
        return self._sender.submit(self._send, target, source, after)

    def drain(self, seconds: float) -> None:
        """Wait until all that was submitted has been issued. Raises TimeoutError."""
        self._sender.submit(lambda: None).result(timeout=seconds)

    def close(self) -> None:
        """Finish what was submitted and stop the threads."""
        self._sender.shutdown()
        self._readers.shutdown()
        self._memory.close()

    def _send(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> Any:
        event: Any = None
        reading: deque[tuple[torch.Tensor, torch.Tensor, Future[Any]]] = deque()
        pieces = deque(zip(target.split(PIECE_BYTES), source.split(PIECE_BYTES), strict=True))
        while pieces or reading:
            if pieces and self._free:
                to_device, from_host = pieces.popleft()
                buffer, busy = self._free.popleft()
                if busy is not None:
                    self._finish(busy)
                part = buffer[: from_host.numel()]
                reading.append((to_device, buffer, self._readers.submit(part.copy_, from_host)))
                continue
            to_device, buffer, read = reading.popleft()
            read.result()
            event = self._issue(to_device, buffer[: to_device.numel()], after)
            self._free.append((buffer, event))
        return event


def _will_need(source: torch.Tensor) -> None:
    """Ask the kernel to begin reading the file behind `source`; of no consequence for other memory."""
    begin = source.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(source.data_ptr() + source.numel() - begin), _WILL_NEED)


_libc = ctypes.CDLL(None, use_errno=True)
_WILL_NEED = getattr(mmap, "MADV_WILLNEED", 3)
