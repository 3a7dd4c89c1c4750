"""How much host memory may still be taken, by what the machine has and what its control groups allow."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from omni.errors import UsageError
from omni.sizes import format_bytes

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED_BYTES = 1 << 60
"""Control groups of version 1 say "no limit" with a number near 2**63."""


class Room(msgspec.Struct, frozen=True):
    """Bytes that may still be taken, and what sets that limit."""

    available_bytes: int
    source: str


def host_room(proc: Path = PROC, cgroups: Path = CGROUPS) -> Room:
    """The smallest of the kernel's MemAvailable and what each control group around this process has left.

    File pages in a control group count as available: the kernel drops them when memory is asked for.
    """
    rooms = [_machine(proc), *_version_2(proc, cgroups), *_version_1(proc, cgroups)]
    return min((room for room in rooms if room is not None), key=lambda room: room.available_bytes)


def check_room(num_bytes: int, purpose: str) -> None:
    """Raise UsageError with needed, available and the remedy when `num_bytes` of host memory are not to be had."""
    room = host_room()
    if num_bytes > room.available_bytes:
        raise UsageError(
            f"{purpose} needs {format_bytes(num_bytes)} of host memory, and {format_bytes(room.available_bytes)} are "
            f"available ({room.source}): set offload.policy: disk, take a smaller dtype, or raise that limit"
        )


def free_bytes(proc: Path = PROC) -> int:
    """Memory that nothing uses, not even the page cache; 0 where the kernel does not say."""
    return _meminfo(proc, "MemFree") or 0


def available_bytes(proc: Path = PROC) -> int:
    """Memory that can be had without swapping, the page cache counted in; UNLIMITED_BYTES where nobody says."""
    return _machine(proc).available_bytes


def _meminfo(proc: Path, name: str) -> int | None:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _machine(proc: Path) -> Room:
    available = _meminfo(proc, "MemAvailable")
    if available is None:
        return Room(UNLIMITED_BYTES, "a kernel that does not say MemAvailable")
    return Room(available, "MemAvailable of this machine")


def _groups(proc: Path, controller: str) -> list[str]:
    """Paths of this process's control groups for `controller`, from the innermost out; "" is version 2."""
    with contextlib.suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                inner = Path(path.lstrip("/"))
                return [str(folder) for folder in (inner, *inner.parents)]
    return []


def _version_2(proc: Path, cgroups: Path) -> list[Room]:
    return _limits(cgroups, _groups(proc, ""), "memory.max", "memory.current", ("inactive_file", "active_file"))


def _version_1(proc: Path, cgroups: Path) -> list[Room]:
    names = ("total_inactive_file", "total_active_file")
    groups = _groups(proc, "memory")
    return _limits(cgroups / "memory", groups, "memory.limit_in_bytes", "memory.usage_in_bytes", names)


def _limits(root: Path, groups: list[str], limit: str, usage: str, file_pages: tuple[str, ...]) -> list[Room]:
    """Rooms of the groups that have a limit. A container may see its own group at the root, whatever its path says."""
    rooms = []
    for folder in dict.fromkeys(root / group for group in groups):
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text())
            if most >= UNLIMITED_BYTES:
                continue
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            dropped = sum(int(stat.get(name, 0)) for name in file_pages)
            rooms.append(Room(max(0, most - max(0, used - dropped)), f"{limit} of the control group {folder}"))
    return rooms
