"""Host memory for weights: one region of exact size, pinned once where a GPU will copy from it.

torch's pinned allocator rounds every block up to a power of two; a region of our own, registered with the driver in
large pieces, takes what the weights take. With a key, all processes of a user on one host share one copy.
"""

from __future__ import annotations

import atexit
import bisect
import itertools
import mmap
import threading
import weakref

import torch

from omni.errors import UsageError
from stages.memory.limits import check_room, free_bytes
from stages.memory.shared import WAIT_SECONDS, NoRoom, SharedFile

REGISTER_BYTES = 1 << 30
"""Registered at once; the driver pins page by page, and larger pieces gain nothing."""
HUGE_PAGES_SPARE = 1.5
"""Free memory, in sizes of the region, from which on huge pages are asked for."""
CHECK_BYTES = 64 << 20
"""Smaller regions are taken without a look at the machine's limits."""

_lock = threading.RLock()
"""Reentrant: the garbage collector may close a region in the middle of anything."""
_open: weakref.WeakValueDictionary[int, HostMemory] = weakref.WeakValueDictionary()
"""Address -> region, for all that are alive and not closed."""
_held: set[HostMemory] = set()
"""Those that are pinned or shared: pins and locks outlive the object that asked for them, until `close`."""
_edges: list[int] = []
"""Where one registered piece ends and another may begin, sorted; a copy must not cross one."""


class HostMemory:
    """`num_bytes` of host memory, page aligned.

    With `key`, a copy that all processes of this user on this host share: whoever comes first fills it and says
    `filled()`, the others wait for that and find `is_filled` set. The key names the contents, down to their version.
    Only `close` gives back pins and the shared file; the memory itself lives as long as a tensor uses it.
    """

    def __init__(
        self, num_bytes: int, *, pin: bool = False, key: str | None = None, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        """Raises UsageError when the host has less memory than that, TimeoutError when the filler takes too long."""
        self.num_bytes = num_bytes
        self.is_pinned = False
        self._pieces: set[int] = set()
        """Those that are registered."""
        self.private_reason = ""
        """Why the memory is not shared although there is a key."""
        self._file: SharedFile | None = None
        if key is not None and num_bytes:
            try:
                self._file = SharedFile(key, num_bytes, wait_seconds)
            except NoRoom as error:
                self.private_reason = str(error)
        if self._file is None:
            if num_bytes >= CHECK_BYTES:
                check_room(num_bytes, "a copy of the weights")
            region = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # Huge pages are filled and pinned two to three times as fast, but beside a full page cache the kernel
            # compacts memory to make them, which takes two to four times as long.
            if hasattr(mmap, "MADV_HUGEPAGE") and free_bytes() > HUGE_PAGES_SPARE * num_bytes:
                region.madvise(mmap.MADV_HUGEPAGE)
        else:
            region = self._file.map
        with torch.inference_mode(False):  # tensors of that mode could not be written outside of it
            self.bytes = (
                torch.frombuffer(region, dtype=torch.uint8, count=num_bytes)
                if num_bytes
                else torch.empty(0, dtype=torch.uint8)
            )
            """All of it, as uint8."""
        with _lock:
            if num_bytes:
                _open[self.bytes.data_ptr()] = self
            if self._file is not None:
                _held.add(self)
        if pin:
            self.pin()

    @property
    def is_shared(self) -> bool:
        """Whether other processes may use the same pages."""
        return self._file is not None

    @property
    def is_filled(self) -> bool:
        """Whether the contents are there already, written by whoever came first; nothing may be written then."""
        return self._file is not None and self._file.is_filled

    def filled(self) -> None:
        """All is written: let the others in."""
        if self._file is not None:
            self._file.filled()

    def pin(self) -> None:
        """Register the region with the CUDA driver, so that copies from it run at full speed and in the background.

        Fill it first: the driver takes five times as long, and one thread at a time, when it has to make the pages.
        Raises UsageError when the driver refuses.
        """
        if self.is_pinned or not self.num_bytes:
            return
        for number in range(self.num_pieces):
            self.pin_piece(number)
        begin = self.bytes.data_ptr()
        with _lock:
            for address in (*range(begin, begin + self.num_bytes, REGISTER_BYTES), begin + self.num_bytes):
                bisect.insort(_edges, address)
        self.is_pinned = True

    @property
    def num_pieces(self) -> int:
        """How many pieces `pin` registers, each REGISTER_BYTES long but for the last."""
        return -(-self.num_bytes // REGISTER_BYTES)

    def pin_piece(self, number: int) -> None:
        """Register one piece ahead of `pin`, which does the rest: while others are still filled. Once is enough.

        Raises UsageError when the driver refuses; nothing is registered then.
        """
        if number in self._pieces:
            return
        offset = number * REGISTER_BYTES
        size = min(REGISTER_BYTES, self.num_bytes - offset)
        try:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr() + offset, size, 0)))
        except RuntimeError as error:
            self._unpin()
            raise UsageError(
                f"the CUDA driver cannot pin {self.num_bytes} bytes of host memory ({error}): free memory, raise the "
                "limit of locked memory, or set offload.policy: disk"
            ) from error
        self._pieces.add(number)
        with _lock:
            _held.add(self)

    def close(self) -> None:
        """Unpin, and give the shared file back; the last user removes it. Tensors in the region stay valid."""
        begin = self.bytes.data_ptr()
        with _lock:
            if _open.get(begin) is not self:
                return
            del _open[begin]
            _held.discard(self)
        if self.is_pinned:
            with _lock:
                for address in (*range(begin, begin + self.num_bytes, REGISTER_BYTES), begin + self.num_bytes):
                    _edges.remove(address)
            self.is_pinned = False
        self._unpin()
        if self._file is not None:
            self._file.close()

    def _unpin(self) -> None:
        while self._pieces:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr() + self._pieces.pop() * REGISTER_BYTES)


def region_of(tensor: torch.Tensor) -> HostMemory | None:
    """The open region that holds all of a tensor's storage, if any does."""
    storage = tensor.untyped_storage()
    with _lock:
        region = _open.get(storage.data_ptr())
    return region if region is not None and storage.nbytes() <= region.num_bytes else None


def pieces(source: torch.Tensor) -> list[tuple[int, int]]:
    """Parts (begin, end) of a flat uint8 tensor that each lie in one registered piece."""
    begin = source.data_ptr()
    end = begin + source.numel()
    with _lock:
        inside = _edges[bisect.bisect_right(_edges, begin) : bisect.bisect_left(_edges, end)]
    cuts = [0, *(edge - begin for edge in inside), source.numel()]
    return list(itertools.pairwise(cuts))


@atexit.register
def _close_all() -> None:
    """A process that ends in order leaves no shared file behind."""
    for region in list(_held):
        region.close()
