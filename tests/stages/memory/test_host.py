"""Regions of host memory: exact size, pinned in pieces by a driver that is played here, shared, refused."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from omni.errors import UsageError
from stages.memory import host, limits, shared
from stages.memory.host import HostMemory, pieces, region_of
from stages.memory.limits import Room
from tests.stages.memory.conftest import Driver


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stands in for /dev/shm."""
    monkeypatch.setattr(shared, "SHARED_FOLDER", tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_region_has_its_exact_size() -> None:
    region = HostMemory(12345)
    assert region.bytes.shape == (12345,)
    assert region.bytes.dtype == torch.uint8
    assert region.bytes.data_ptr() % mmap.PAGESIZE == 0
    assert not region.is_pinned
    assert not region.is_shared
    region.close()
    region.close()


def test_an_empty_region_is_one_too(driver: Driver) -> None:
    region = HostMemory(0, pin=True, key="nothing")
    assert region.bytes.numel() == 0
    region.close()


def test_tensors_outlive_the_region() -> None:
    region = HostMemory(4096)
    view = region.bytes.view(torch.float32)
    view.fill_(3.0)
    region.close()
    del region
    assert float(view.sum()) == 3.0 * 1024


def test_the_region_of_a_tensor() -> None:
    region, other = HostMemory(4096), torch.zeros(4)
    assert region_of(region.bytes[100:200].view(torch.float32)) is region
    assert region_of(other) is None
    view = region.bytes
    region.close()
    assert region_of(view) is None


def test_pinning_is_in_pieces_and_copies_do_not_cross_them(driver: Driver) -> None:
    size = mmap.PAGESIZE
    region = HostMemory(2 * size + 100, pin=True)
    assert region.is_pinned
    assert sorted(driver.registered.values()) == [100, size, size]
    assert pieces(region.bytes) == [(0, size), (size, 2 * size), (2 * size, 2 * size + 100)]
    assert pieces(region.bytes[10:20]) == [(0, 10)]
    assert pieces(region.bytes[size - 1 : size + 1]) == [(0, 1), (1, 2)]
    assert pieces(region.bytes[size : 2 * size]) == [(0, size)]
    region.pin()
    assert len(driver.registered) == 3
    region.close()
    assert driver.registered == {}
    assert pieces(region.bytes) == [(0, 2 * size + 100)]


def test_a_driver_that_refuses_leaves_nothing_pinned(driver: Driver) -> None:
    driver.room = 2
    region = HostMemory(3 * mmap.PAGESIZE)
    with pytest.raises(UsageError, match=r"cannot pin .* \(out of memory\).*offload.policy: disk"):
        region.pin()
    assert driver.registered == {}
    assert not region.is_pinned
    region.close()


def test_too_much_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "host_room", lambda: Room(1 << 20, "a small machine"))
    with pytest.raises(UsageError, match="a small machine"):
        HostMemory(host.CHECK_BYTES)


def test_regions_of_one_key_share_their_pages(folder: Path) -> None:
    first = HostMemory(5000, key="model 1")
    assert first.is_shared
    assert not first.is_filled
    first.bytes.fill_(7)
    first.filled()
    second = HostMemory(5000, key="model 1")
    assert second.is_filled
    assert second.bytes.data_ptr() != first.bytes.data_ptr()
    assert int(second.bytes.sum()) == 35000
    first.close()
    assert int(second.bytes.sum()) == 35000
    second.close()


def test_without_room_to_share_the_region_is_private_and_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "host_room", lambda: Room(4096, "a small machine"))
    region = HostMemory(5000, key="model 1")
    assert not region.is_shared
    assert not region.is_filled
    assert "a small machine" in region.private_reason
    region.filled()
    region.bytes.fill_(1)
    region.close()


def test_a_region_may_be_closed_while_its_lock_is_held() -> None:
    """As the garbage collector does when it finds a module in the middle of a copy."""
    region = HostMemory(64)

    def collect() -> None:
        with host._lock:
            region.close()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert host.region_of(region.bytes) is None
