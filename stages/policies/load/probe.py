"""What `reader: auto` looks at: are files in the page cache, and is reading past it possible and fast."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence

from stages.policies.load.files import BLOCK

NUM_SAMPLES = 64
CACHED_SHARE = 0.5
"""From this share of sampled pages on, files count as cached."""
PROBE_BYTES = 8 << 20
FAST_BYTES_PER_SECOND = 3e8
"""Of one read. Below this a disk is no faster past the page cache, and what stays in the cache helps the next load."""


def cached_share(files: Sequence[str], num_samples: int = NUM_SAMPLES) -> float:
    """Share of sampled pages that the page cache holds. Raises OSError when a file cannot be opened."""
    page = bytearray(1)
    found = asked = 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            for number in range(max(1, num_samples // len(files))):
                asked += 1
                try:
                    found += os.preadv(descriptor, [page], size * number * len(files) // num_samples, os.RWF_NOWAIT) > 0
                except OSError:  # not there without a wait, or not to be had: the read itself will say why
                    continue
        finally:
            os.close(descriptor)
    return found / asked if asked else 1.0


def direct_rate(file: str) -> float | str:
    """Bytes per second of one read past the page cache, or why there can be none."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        return f"the file system refuses O_DIRECT ({error.strerror})"
    try:
        view = memoryview(mmap.mmap(-1, PROBE_BYTES))
        os.preadv(descriptor, [view[:BLOCK]], 0)
        begin = time.perf_counter()
        size = os.preadv(descriptor, [view], 0)
        return size / max(time.perf_counter() - begin, 1e-9)
    except OSError as error:
        return f"the file system refuses O_DIRECT ({error.strerror})"
    finally:
        os.close(descriptor)
