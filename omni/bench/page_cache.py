"""Files into the page cache and out of it, what of them is there, and free memory that is really there."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

READ_BYTES = 16 << 20
PROBE_BYTES = 1 << 20
NUM_PROBES = 16
COLD_SHARE = 0.02
"""Of a cold file's pages, so many may be cached."""
COLD_FACTOR = 3.0
"""Where the system does not tell what is cached: cold bytes take so many times longer than the same bytes again."""


WAKE = """
import ctypes, mmap, sys
num_bytes = int(sys.argv[1])
memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if hasattr(mmap, "MADV_HUGEPAGE"):
    memory.madvise(mmap.MADV_HUGEPAGE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
madvise = ctypes.CDLL(None).madvise
if madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), 23):  # MADV_POPULATE_WRITE, since Linux 5.14
    for start in range(0, num_bytes, mmap.PAGESIZE):
        memory[start] = 1
"""
WAKE_SHARE = 0.9
"""Of the memory that nothing uses, so much is woken at most: the page cache stays."""
WAKE_SECONDS = 300.0


def wake_memory(num_bytes: int) -> None:
    """Touch as much free memory, and give it back at once.

    A virtual machine may return free memory to its host after some seconds; the next touch then takes 20 times longer,
    which would be measured in whichever row comes first. A process of its own does it, so that this one's peak stays.
    """
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree:")), 0)
    size = min(num_bytes, int(free * WAKE_SHARE))
    if size > 0:
        subprocess.run([sys.executable, "-S", "-c", WAKE, str(size)], check=True, timeout=WAKE_SECONDS)


def make_warm(files: Sequence[Path]) -> None:
    """Read all files once, with a thread for each core."""
    places = [(file, start) for file in files for start in range(0, file.stat().st_size, READ_BYTES)]

    def read(place: tuple[Path, int]) -> None:
        with place[0].open("rb", buffering=0) as stream:
            stream.seek(place[1])
            stream.read(READ_BYTES)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(read, places))


def make_cold(files: Sequence[Path]) -> str:
    """Drop the files from the page cache; returns what speaks against their being gone, or nothing."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if _is_cold(files):
        return ""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")
    if _is_cold(files) or _reads_cold(files):
        return ""
    share = cached_share(files)
    return "not cold: " + (f"{share:.0%} of the files stayed cached" if share is not None else "read as fast as before")


def cached_share(files: Iterable[Path]) -> float | None:
    """Which part of the files' pages is in the page cache, 0 to 1; None where the system does not tell."""
    import numpy as np

    libc = ctypes.CDLL(None, use_errno=True)
    cached = total = 0
    for file in files:
        if not file.stat().st_size:
            continue
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            data = np.frombuffer(view, np.uint8)
            pages = np.zeros(-(-data.nbytes // mmap.PAGESIZE), np.uint8)
            failed = libc.mincore(
                ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes), pages.ctypes.data_as(ctypes.c_void_p)
            )
            del data
            if failed:
                return None
        cached, total = cached + int((pages & 1).sum()), total + len(pages)
    return cached / total if total else None


def _is_cold(files: Sequence[Path]) -> bool:
    share = cached_share(files)
    return share is not None and share <= COLD_SHARE


def _reads_cold(files: Sequence[Path]) -> bool:
    """Whether a few places of the largest file take longer to read than the same places again."""
    file = max(files, key=lambda file: file.stat().st_size)
    step = file.stat().st_size // NUM_PROBES
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            for number in range(NUM_PROBES):
                os.pread(descriptor, min(PROBE_BYTES, step), number * step)
            seconds.append(time.perf_counter() - begin)
    finally:
        os.close(descriptor)
    return seconds[0] > COLD_FACTOR * seconds[1]
