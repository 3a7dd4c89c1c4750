"""Buffers between files and tensors: what is delivered arrives, and no buffer is used again too early."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.policies.load.files import BLOCK
from stages.policies.load.staging import (
    SERIAL_ELEMENTS,
    Buffer,
    Destination,
    HostStaging,
    Link,
    Part,
    RingStaging,
    Staging,
    cut,
)


class LateLink(Link):
    """Copies as late as it may: when somebody waits for a mark. Shows every buffer that is overwritten before."""

    def __init__(self) -> None:
        self.queue: list[tuple[Buffer, Part, Destination]] = []

    def copy(self, buffer: Buffer, part: Part, to: Destination) -> None:
        self.queue.append((buffer, part, to))

    def mark(self) -> Callable[[], None]:
        queued = list(self.queue)

        def wait() -> None:
            for copy in queued:
                if any(copy is other for other in self.queue):
                    source, target = cut(copy[0].bytes, *copy[1:])
                    target.copy_(source)
            self.queue = [copy for copy in self.queue if not any(copy is other for other in queued)]

        return wait


def deliver_all(staging: Staging, source: torch.Tensor, target: torch.Tensor) -> None:
    """One chunk: all of `source` through the staging into `target`."""
    buffer, size = staging.buffer(), source.nbytes
    buffer.view[:size] = memoryview(source.view(torch.uint8).numpy())
    staging.deliver(buffer, Part(0, size, 0), Destination.of(source.dtype, target))
    staging.submit()


def test_a_ring_waits_before_it_reads_into_a_buffer_again() -> None:
    link = LateLink()
    ring = RingStaging(link, 256, pin=False)
    targets = [torch.zeros(256, dtype=torch.uint8) for _ in range(7)]
    for number, target in enumerate(targets):
        ring.buffer()
        assert len(link.queue) < RingStaging.NUM_BUFFERS
        deliver_all(ring, torch.full((256,), number + 1, dtype=torch.uint8), target)
    assert link.queue
    ring.finish()
    assert [set(target.tolist()) for target in targets] == [{number + 1} for number in range(7)]


def test_buffers_are_aligned_and_long_enough() -> None:
    for staging in (HostStaging(1000), RingStaging(LateLink(), 1000, pin=False)):
        for _ in range(3):
            buffer = staging.buffer()
            assert buffer.address == buffer.bytes.data_ptr()
            assert buffer.address % BLOCK == 0
            assert len(buffer.view) == buffer.bytes.numel() >= 1000 + 2 * BLOCK
            staging.submit()


@given(count=st.integers(0, 3 * SERIAL_ELEMENTS + 5))
def test_host_staging_converts_every_element(count: int) -> None:
    source = torch.arange(count, dtype=torch.float32)
    target = torch.full((count,), -1, dtype=torch.bfloat16)
    deliver_all(HostStaging(source.nbytes), source, target)
    assert torch.equal(target, source.bfloat16())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64])
def test_host_staging_copies(dtype: torch.dtype) -> None:
    source = torch.arange(100).to(dtype)
    target = torch.zeros(100, dtype=dtype)
    deliver_all(HostStaging(source.nbytes), source, target)
    assert torch.equal(target, source)


def test_a_part_lies_anywhere_in_chunk_and_tensor() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    memory[3:11] = torch.tensor([1.0, 2.0, 3.0, 4.0]).bfloat16().view(torch.uint8)
    target = torch.zeros(10)
    source, place = cut(memory, Part(3, 8, 12), Destination.of(torch.bfloat16, target))
    place.copy_(source)
    assert target.tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]
