"""Reads chunks of files into memory: through the page cache, past it, or from a mapping."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from typing import Literal

from omni.errors import UsageError
from stages.policies.load.chunks import Chunk

Method = Literal["buffered", "direct"]
"""Through the page cache, or past it."""
BLOCK = 4096
"""What reads past the page cache are aligned to, in the file and in memory, in bytes."""
CLOSE_SECONDS = 5.0
MAP_NORESERVE = 0x4000
"""Memory for private pages is asked for when one is written, so that files may be larger than it; mmap has no name."""
POPULATE_READ = 22
"""MADV_POPULATE_READ: read pages and enter them into the page table at once. The mmap module has no name for it."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
"""mmap's own madvise keeps the interpreter to itself while it waits for the disk; ctypes lets other threads run."""
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Mapping:
    """A whole file in memory, private: what is written there never reaches the file."""

    def __init__(self, file: str) -> None:
        descriptor = _open(file, os.O_RDONLY)
        try:
            self.map = mmap.mmap(
                descriptor, 0, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        finally:
            os.close(descriptor)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def populate(self, offset: int, num_bytes: int) -> None:
        """Have these bytes in memory, and no page fault later. Raises OSError as a read would."""
        begin = offset - offset % mmap.PAGESIZE
        if _libc.madvise(self._address + begin, offset + num_bytes - begin, POPULATE_READ):
            code = ctypes.get_errno()
            if code == errno.EFAULT:  # what the disk could not give, or the file does not have any more
                code = errno.EIO
            if code != errno.EINVAL:  # a kernel before 5.14: pages then come when they are used
                raise OSError(code, os.strerror(code))

    def copy(self, offset: int, num_bytes: int, address: int) -> None:
        """Copy these bytes, which are in memory, to `address`."""
        _libc.memcpy(address, self._address + offset, num_bytes)

    def release(self, offset: int, num_bytes: int) -> None:
        """Let go of the pages that lie in these bytes as a whole; they stay in the page cache."""
        begin = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            _libc.madvise(self._address + begin, end - begin, mmap.MADV_DONTNEED)


class Files:
    """The open files of one load, shared by all its threads."""

    def __init__(self, method: Method, *, cached: bool = False) -> None:
        self.method = method
        self.cached = cached
        """Whether the page cache holds them."""
        self._descriptors: dict[str, int] = {}
        self._mappings: dict[str, Mapping] = {}
        self._lock = threading.Lock()

    def mapping(self, file: str) -> Mapping:
        """`file`, mapped once. Raises UsageError."""
        with self._lock:
            if file not in self._mappings:
                self._mappings[file] = Mapping(file)
            return self._mappings[file]

    def populate(self, chunk: Chunk) -> None:
        """Read the chunk into its mapping. Raises UsageError."""
        try:
            self.mapping(chunk.file).populate(chunk.offset, chunk.num_bytes)
        except OSError as error:
            raise _failure(chunk, 0, error) from error

    def release(self, chunk: Chunk) -> None:
        """The chunk is read out of its mapping: its pages count as this process's memory no longer."""
        self.mapping(chunk.file).release(chunk.offset, chunk.num_bytes)

    def scatter(self, chunk: Chunk, views: list[memoryview]) -> None:
        """Read the chunk's pieces each into its view. Raises UsageError with file and tensor."""
        self._read(chunk, views, chunk.offset, chunk.num_bytes)

    def read(self, chunk: Chunk, buffer: memoryview) -> int:
        """Read the chunk into `buffer` (2 * BLOCK longer than chunks, aligned); returns where its bytes begin there:
        as far behind a page's begin as in the file, since the processor copies quickest between equal places of pages.

        Raises UsageError with file and tensor.
        """
        begin = chunk.offset % BLOCK
        end = begin + chunk.num_bytes
        if self.method == "direct":
            self._read(chunk, [buffer[: -(-end // BLOCK) * BLOCK]], chunk.offset - begin, end)
        else:
            self._read(chunk, [buffer[begin:end]], chunk.offset, chunk.num_bytes)
        return begin

    def close(self) -> None:
        """Close the files; mappings live as long as tensors use them."""
        if not self._lock.acquire(timeout=CLOSE_SECONDS):
            return  # a thread hangs in opening a file, and the load has failed for that
        try:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._mappings.clear()
        finally:
            self._lock.release()

    def _read(self, chunk: Chunk, views: list[memoryview], offset: int, needed: int) -> None:
        done = 0
        descriptor = self._descriptor(chunk.file)
        while done < needed:
            try:
                count = os.preadv(descriptor, views, offset + done)
            except OSError as error:
                raise _failure(chunk, done, error) from error
            if count == 0:
                raise UsageError(
                    f"{chunk.file}: cut short in tensor '{chunk.piece_at(done).name}': fetch the file again"
                )
            done += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = _open(file, os.O_RDONLY | (os.O_DIRECT if self.method == "direct" else 0))
            return self._descriptors[file]


def _open(file: str, flags: int) -> int:
    try:
        return os.open(file, flags)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error


def _failure(chunk: Chunk, done: int, error: OSError) -> UsageError:
    return UsageError(f"{chunk.file}: tensor '{chunk.piece_at(done).name}' cannot be read: {error.strerror}")
