"""CUDA's driver itself, for loops in which calls through torch cost too much.

torch lets other threads run during each of its calls, and a thread gets its turn back only after a wake-up; with 16
threads these waits take longer than the copies. These calls keep the interpreter to themselves for the few microseconds
that they take.
"""

from __future__ import annotations

import ctypes
import functools

import torch


class CopyQueue:
    """Copies to a device on one stream; the device is the calling thread's current one."""

    def __init__(self, library: ctypes.PyDLL, stream: torch.cuda.Stream) -> None:
        self._library = library
        self._stream = stream.cuda_stream

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Queue a copy between two addresses, from pinned host memory."""
        _check(self._library.cuMemcpyHtoDAsync_v2(target, source, num_bytes, self._stream))

    def record(self, event: torch.cuda.Event) -> None:
        """Have `event`, which was recorded through torch once, pass when all that was queued so far is done."""
        _check(self._library.cuEventRecord(event.cuda_event, self._stream))

    def has_passed(self, event: torch.cuda.Event) -> bool:
        """Whether the event has passed."""
        code = self._library.cuEventQuery(event.cuda_event)
        if code not in (0, NOT_READY):
            _check(code)
        return not code


NOT_READY = 600
"""CUDA_ERROR_NOT_READY."""


def copy_queue(stream: torch.cuda.Stream) -> CopyQueue | None:
    """The queue of `stream`; None where there is no CUDA driver (other makers' GPUs, through the same torch module)."""
    library = _library()
    return CopyQueue(library, stream) if library is not None else None


@functools.cache
def _library() -> ctypes.PyDLL | None:
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.PyDLL("libcuda.so.1")
    except OSError:
        return None
    library.cuMemcpyHtoDAsync_v2.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    library.cuEventRecord.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.cuEventQuery.argtypes = (ctypes.c_void_p,)
    return library


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"the CUDA driver failed with error {code}")
