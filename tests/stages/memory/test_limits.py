"""Room in host memory, read from invented /proc and /sys/fs/cgroup trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni.errors import UsageError
from stages.memory import limits
from stages.memory.limits import Room, check_room, host_room

GIB = 1 << 30


def write(folder: Path, **contents: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def trees(tmp_path: Path, groups: str) -> tuple[Path, Path]:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo="MemTotal: 99 kB\nMemAvailable:   8388608 kB\nOther: 1 kB")
    write(proc / "self", cgroup=groups)
    cgroups.mkdir()
    return proc, cgroups


def test_without_groups_the_kernel_decides(tmp_path: Path) -> None:
    assert host_room(*trees(tmp_path, "0::/")) == Room(8 * GIB, "MemAvailable of this machine")


def test_the_narrowest_group_of_version_2_decides_and_file_pages_count_as_free(tmp_path: Path) -> None:
    proc, cgroups = trees(tmp_path, "0::/pod/box")
    stat = f"anon 5\ninactive_file {GIB}\nactive_file {GIB}"
    write(cgroups / "pod", memory__max=6 * GIB, memory__current=4 * GIB, memory__stat=stat)
    write(cgroups / "pod" / "box", memory__max="max", memory__current=GIB, memory__stat=stat)
    room = host_room(proc, cgroups)
    assert room.available_bytes == 4 * GIB
    assert "memory.max" in room.source
    assert room.source.endswith("pod")


def test_groups_of_version_1(tmp_path: Path) -> None:
    proc, cgroups = trees(tmp_path, "4:cpu,memory:/box\n0::/")
    stat = f"total_inactive_file {GIB}\ntotal_active_file 0"
    write(cgroups / "memory" / "box", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=2 * GIB, memory__stat=stat)
    write(cgroups / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=0, memory__stat=stat)
    assert host_room(proc, cgroups).available_bytes == 2 * GIB


def test_a_full_group_has_no_room(tmp_path: Path) -> None:
    proc, cgroups = trees(tmp_path, "0::/")
    write(cgroups, memory__max=GIB, memory__current=2 * GIB, memory__stat="inactive_file 0")
    assert host_room(proc, cgroups).available_bytes == 0


def test_too_much_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "host_room", lambda: Room(GIB, "memory.max of the control group x"))
    check_room(GIB, "a copy")
    with pytest.raises(UsageError, match=r"a copy needs 2.0 GiB .* 1.0 GiB .*memory.max.*offload.policy: disk"):
        check_room(2 * GIB, "a copy")


def test_this_machine_has_some_room() -> None:
    assert host_room().available_bytes > 0


def test_available_memory() -> None:
    assert 1 << 20 < limits.available_bytes() < 1 << 50
