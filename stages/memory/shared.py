"""One copy of the same bytes for all processes of a user on one host: a file in shared memory, kept by file locks.

The first process to come holds the file's exclusive lock while it fills it; users hold a shared lock each. The kernel
drops the locks of a process that dies, so that what nobody locks is left over, and the next start removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
import time
from pathlib import Path

from omni.sizes import format_bytes
from stages.memory.limits import host_room

SHARED_FOLDER = Path("/dev/shm")
WAIT_SECONDS = 1800.0
"""How long another process may take to fill the file."""
POLL_SECONDS = 0.02
_MARK = struct.Struct("<16sQ")
_FILLED = b"omni-filled-v001"


class NoRoom(Exception):
    """The bytes cannot be shared here; the message says why."""


class SharedFile:
    """The open, mapped, locked file of one key."""

    def __init__(
        self, key: str, num_bytes: int, wait_seconds: float = WAIT_SECONDS, folder: Path | None = None
    ) -> None:
        """Blocks while another process fills the file. Raises NoRoom, or TimeoutError after `wait_seconds`."""
        folder = SHARED_FOLDER if folder is None else folder
        name = hashlib.sha256(f"{num_bytes}:{key}".encode()).hexdigest()[:32]
        self._path = folder / f"{_prefix()}{name}"
        self._num_bytes = num_bytes
        self._mark_at = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        sweep(folder, keep=self._path.name)
        self._descriptor = self._lock(time.monotonic() + wait_seconds)
        try:
            self.is_filled = self._is_marked()
            if not self.is_filled:
                self._reserve(folder)
            self.map = mmap.mmap(self._descriptor, self._mark_at + mmap.PAGESIZE, flags=mmap.MAP_SHARED)
        except BaseException:
            self._remove()
            os.close(self._descriptor)
            raise

    def filled(self) -> None:
        """The contents are complete: let the waiting processes in."""
        if not self.is_filled:
            os.pwrite(self._descriptor, _MARK.pack(_FILLED, self._num_bytes), self._mark_at)
            self.is_filled = True
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Give the lock back; the last user, or a filler that gave up, removes the file."""
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove()
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # the map has a duplicate of the descriptor, which keeps the lock
        os.close(self._descriptor)

    def _lock(self, deadline: float) -> int:
        """A descriptor with the shared lock of the filled file, or the exclusive lock of one that is to be filled."""
        while True:
            descriptor = self._open()
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, self._path):
                    self._descriptor = descriptor
                    if self._is_marked():  # its users are gone, and it is whole
                        fcntl.flock(descriptor, fcntl.LOCK_SH)
                        if _is_at(descriptor, self._path):
                            return descriptor
                    else:
                        return descriptor
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                self._descriptor = descriptor
                if _is_at(descriptor, self._path) and self._is_marked():
                    return descriptor
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process holds {self._path} and has not filled it in time; end it")
            time.sleep(POLL_SECONDS)

    def _open(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NoRoom(f"{self._path} cannot be opened: {error.strerror}") from error
        if os.fstat(descriptor).st_uid != os.getuid():  # anyone may write into the folder
            os.close(descriptor)
            raise NoRoom(f"{self._path} belongs to another user")
        return descriptor

    def _is_marked(self) -> bool:
        mark = os.pread(self._descriptor, _MARK.size, self._mark_at)
        return len(mark) == _MARK.size and _MARK.unpack(mark) == (_FILLED, self._num_bytes)

    def _reserve(self, folder: Path) -> None:
        """Take the pages now: a mapped page that cannot be had later would kill the process."""
        needed = self._mark_at + mmap.PAGESIZE
        os.ftruncate(self._descriptor, 0)
        usage = os.statvfs(folder)
        free = usage.f_bavail * usage.f_frsize
        room = host_room()
        if needed > free:
            raise NoRoom(f"{folder} has room for {format_bytes(free)}, and {format_bytes(needed)} are needed")
        if needed > room.available_bytes:
            raise NoRoom(f"{format_bytes(room.available_bytes)} are available ({room.source})")
        try:
            os.posix_fallocate(self._descriptor, 0, needed)
        except OSError as error:
            raise NoRoom(f"{folder} cannot hold {format_bytes(needed)}: {error.strerror}") from error

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if _is_at(self._descriptor, self._path):
                self._path.unlink()


def sweep(folder: Path, keep: str = "") -> list[str]:
    """Remove the files of this user that nobody locks (their processes have died); returns their names."""
    removed = []
    for path in folder.glob(f"{_prefix()}*"):
        if path.name == keep:
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, path):
                    path.unlink()
                    removed.append(path.name)
            finally:
                os.close(descriptor)
    return removed


def _prefix() -> str:
    return f"omni-{os.getuid()}-"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still leads to the open file: another process may have removed it in between."""
    with contextlib.suppress(FileNotFoundError):
        there, here = os.stat(path), os.fstat(descriptor)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
    return False
