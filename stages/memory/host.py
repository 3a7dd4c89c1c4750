"""Host memory for weights: one region of exact size, pinned once where a GPU will copy from it.

torch's pinned allocator rounds every block up to a power of two; a region of our own, registered with the driver in
large pieces, takes what the weights take.
"""

from __future__ import annotations

import mmap

import torch

REGISTER_BYTES = 1 << 30
"""Registered at once; the driver pins page by page, and larger pieces gain nothing."""


class HostMemory:
    """`num_bytes` of fresh memory, page aligned. Close it when no tensor uses it any more."""

    def __init__(self, num_bytes: int, *, pin: bool = False) -> None:
        self._map = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = (
            torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes)
            if num_bytes
            else torch.empty(0, dtype=torch.uint8)
        )
        """All of it, as uint8."""
        self.is_pinned = False
        if pin:
            self.pin()

    def pin(self) -> None:
        """Register the region with the CUDA driver, so that copies from it run at full speed and in the background."""
        runtime = torch.cuda.cudart()
        begin, end = self.bytes.data_ptr(), self.bytes.data_ptr() + self.bytes.numel()
        for address in range(begin, end, REGISTER_BYTES):
            torch.cuda.check_error(int(runtime.cudaHostRegister(address, min(REGISTER_BYTES, end - address), 0)))
        self.is_pinned = True

    def close(self) -> None:
        """Unregister the region; its memory goes when the last tensor that uses it goes."""
        if self.is_pinned:
            runtime = torch.cuda.cudart()
            begin, end = self.bytes.data_ptr(), self.bytes.data_ptr() + self.bytes.numel()
            for address in range(begin, end, REGISTER_BYTES):
                torch.cuda.check_error(int(runtime.cudaHostUnregister(address)))
            self.is_pinned = False
