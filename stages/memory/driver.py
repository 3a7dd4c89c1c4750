"""The CUDA driver's own copy, for loops in which a call through torch costs too much."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

CopyBytes = Callable[[int, int, int], None]
"""(address on the device, address in pinned host memory, bytes): queues one copy."""


def host_to_device(stream: torch.cuda.Stream) -> CopyBytes | None:
    """What queues copies on `stream`, whose device is the calling thread's current one; None without CUDA's driver.

    The call keeps the interpreter to itself for the few microseconds that it takes. A call through torch lets other
    threads run for each view and each copy, and gets its turn back only after a wake-up; with 16 threads, these waits
    take longer than the copies.
    """
    library = _library()
    if library is None:
        return None
    copy, handle = library.cuMemcpyHtoDAsync_v2, stream.cuda_stream

    def copy_bytes(target: int, source: int, num_bytes: int) -> None:
        if code := copy(target, source, num_bytes, handle):
            raise RuntimeError(f"CUDA error {code} while {num_bytes} bytes were copied to the GPU")

    return copy_bytes


@functools.cache
def _library() -> ctypes.PyDLL | None:
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.PyDLL("libcuda.so.1")
    except OSError:
        return None
    library.cuMemcpyHtoDAsync_v2.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return library
