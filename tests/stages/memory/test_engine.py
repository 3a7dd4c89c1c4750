"""Engines: what they count, and how strictly the one that plays a device watches over the order of things."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from stages.memory import engine as engines
from stages.memory import staging
from stages.memory.engine import Counters, CudaEngine, HostEngine, Ready, engine_for


def source(num_bytes: int, value: int = 7) -> torch.Tensor:
    return torch.full((num_bytes,), value, dtype=torch.uint8)


def test_memory_is_counted() -> None:
    engine = HostEngine()
    first, second = engine.allocate(100), engine.allocate(50)
    assert engine.device_bytes == 150
    engine.free(first)
    assert engine.device_bytes == 50
    engine.free(second)
    assert engine.device_bytes == 0


def test_copies_are_counted() -> None:
    engine = HostEngine()
    memory = engine.allocate(100)
    engine.wait(engine.copy_in(memory, source(100)))
    engine.copy_out(torch.empty(100, dtype=torch.uint8), memory)
    assert engine.counters == Counters(num_copies_in=1, bytes_in=100, num_copies_out=1, bytes_out=100)
    assert memory.eq(7).all()


def test_memory_without_contents_is_nan() -> None:
    engine = HostEngine()
    memory = engine.allocate(64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert memory.view(dtype).float().isnan().all()
        assert engine.stale(dtype).float().isnan().all()
        assert engine.stale(dtype).dtype == dtype


def test_a_copy_arrives_when_somebody_waits_and_not_before() -> None:
    engine = HostEngine()
    memory, other = engine.allocate(8), engine.allocate(8)
    first, second = engine.copy_in(memory, source(8)), engine.copy_in(other, source(8))
    assert memory.view(torch.float32).isnan().all()
    engine.wait(second)  # the copy stream does one after another
    assert memory.eq(7).all()
    assert other.eq(7).all()
    engine.wait(first)


def test_memory_in_use_is_not_copied_into() -> None:
    engine = HostEngine()
    memory = engine.allocate(8)
    earlier = engine.record()
    engine.wait(engine.copy_in(memory, source(8)))
    with pytest.raises(AssertionError, match="in use"):
        engine.copy_in(memory, source(8))
    with pytest.raises(AssertionError, match="in use"):
        engine.copy_in(memory[2:4], source(2), (earlier,))
    engine.wait(engine.copy_in(memory, source(8, 9), (engine.record(),)))
    assert memory.eq(9).all()


@pytest.mark.parametrize("num_bytes", [1, 4096, 5 * 4096 + 17])
def test_staged_copies_pass_through_buffers_in_order(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", 4096)
    monkeypatch.setattr(staging, "NUM_BUFFERS", 2)
    engine = HostEngine()
    memory = engine.allocate(num_bytes)
    contents = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    engine.copy_in(memory, source(num_bytes), staged=True)
    engine.wait(engine.copy_in(memory, contents, staged=True))
    assert torch.equal(memory, contents)
    assert engine.counters.num_copies_in == 2
    engine.close()
    engine.close()


def test_staged_copies_of_a_mapped_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", 1000)
    contents = torch.randint(0, 256, (9999,), dtype=torch.uint8)
    (tmp_path / "weights").write_bytes(contents.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=9999, dtype=torch.uint8)
    engine = HostEngine()
    memory = engine.allocate(9000)
    engine.wait(engine.copy_in(memory, mapped[999:], staged=True))
    assert torch.equal(memory, contents[999:])
    engine.close()


def test_the_engine_of_a_device() -> None:
    assert isinstance(engine_for("cpu"), HostEngine)


@pytest.mark.gpu
def test_a_gpu_copies_pinned_and_pageable_memory() -> None:
    from stages.memory.host import HostMemory

    engine = engine_for("cuda")
    assert isinstance(engine, CudaEngine)
    region = HostMemory(40 << 20, pin=True)
    region.bytes.copy_(torch.randint(0, 256, (40 << 20,), dtype=torch.uint8))
    memory = engine.allocate(40 << 20)
    for contents in (region.bytes, region.bytes.clone()):
        memory.zero_()
        engine.wait(engine.copy_in(memory, contents, (engine.record(),)))
        assert torch.equal(memory.cpu(), contents)
    assert engine.counters.num_copies_out == 0
    region.close()
    engine.close()


@pytest.mark.gpu
def test_a_copy_may_cross_the_pieces_in_which_memory_was_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.memory import host

    monkeypatch.setattr(host, "REGISTER_BYTES", 1 << 20)
    engine = engine_for("cuda")
    region = host.HostMemory(5 << 20, pin=True)
    region.bytes.copy_(torch.randint(0, 256, (5 << 20,), dtype=torch.uint8))
    memory = engine.allocate(3 << 20)
    engine.wait(engine.copy_in(memory, region.bytes[1 << 19 : 7 << 19]))
    assert torch.equal(memory.cpu(), region.bytes[1 << 19 : 7 << 19])
    region.close()


@pytest.mark.gpu
def test_copies_run_beside_kernels() -> None:
    """A copy and kernels of about the same length take little more than one of them."""
    from stages.memory.host import HostMemory

    engine = engine_for("cuda")
    region, memory = HostMemory(1 << 30, pin=True), engine.allocate(1 << 30)
    region.bytes.fill_(1)
    factor = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def seconds(copies: int, products: int) -> float:
        engine.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        ready = [engine.copy_in(memory, region.bytes, (engine.record(),)) for _ in range(copies)]
        for _ in range(products):
            factor @ factor
        for one in ready:
            engine.wait(one)
        end.record()
        engine.synchronize()
        return begin.elapsed_time(end) / 1000

    seconds(1, 1)
    copying = seconds(4, 0)
    products = max(1, round(copying / (seconds(0, 20) / 20)))
    computing, both = seconds(0, products), seconds(4, products)
    assert both < 0.75 * (copying + computing)
    region.close()


def test_synchronize_waits_for_staged_copies_that_wait_for_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    release, issued = threading.Event(), []
    engine = HostEngine()
    send = staging.StagingRing._send

    def late(*arguments: Any) -> Any:
        assert release.wait(20)
        event = send(*arguments)
        issued.append(event)
        return event

    monkeypatch.setattr(staging.StagingRing, "_send", late)
    memory = engine.allocate(64)
    engine.copy_in(memory, source(64), staged=True)
    waiting = threading.Thread(target=engine.synchronize, daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    release.set()
    waiting.join(20)
    assert not waiting.is_alive()
    assert len(issued) == 1
    assert memory.eq(7).all()
    engine.close()


def test_a_copy_that_nobody_reads_in_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "STAGED_SECONDS", 0.01)
    engine = HostEngine()
    with pytest.raises(RuntimeError, match=r"weights were not read within 0 s: is the disk there\?"):
        engine.wait(Ready(issued=Future()))
