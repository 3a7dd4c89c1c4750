"""Buffers between files and tensors: what is delivered arrives, and no buffer is used again too early."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.policies.load.files import BLOCK
from stages.policies.load.staging import SERIAL_ELEMENTS, HostStaging, Link, RingStaging


class LateLink(Link):
    """Copies as late as it may: when somebody waits for a mark. Shows every buffer that is overwritten before."""

    def __init__(self) -> None:
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_waits = 0

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.queue.append((source, target))

    def mark(self) -> Callable[[], None]:
        queued = list(self.queue)

        def wait() -> None:
            self.num_waits += 1
            for source, target in queued:
                if any(source is other for other, _ in self.queue):
                    target.copy_(source)
            self.queue = [(s, t) for s, t in self.queue if not any(s is other for other, _ in queued)]

        return wait


def test_a_ring_waits_before_it_reads_into_a_buffer_again() -> None:
    link = LateLink()
    ring = RingStaging(link, 256, pin=False)
    targets = [torch.zeros(256, dtype=torch.uint8) for _ in range(7)]
    for number, target in enumerate(targets):
        buffer = ring.buffer()
        assert len(link.queue) < RingStaging.NUM_BUFFERS
        buffer[:256] = number + 1
        ring.deliver(buffer[:256], target)
        ring.submit()
    assert link.queue
    ring.finish()
    assert [set(target.tolist()) for target in targets] == [{number + 1} for number in range(7)]


def test_buffers_are_aligned_and_long_enough() -> None:
    for staging in (HostStaging(1000), RingStaging(LateLink(), 1000, pin=False)):
        for _ in range(3):
            buffer = staging.buffer()
            assert buffer.data_ptr() % BLOCK == 0
            assert buffer.numel() >= 1000 + 2 * BLOCK
            staging.submit()


@given(count=st.integers(0, 3 * SERIAL_ELEMENTS + 5))
def test_host_staging_converts_every_element(count: int) -> None:
    source = torch.arange(count, dtype=torch.float32)
    target = torch.full((count,), -1, dtype=torch.bfloat16)
    HostStaging(64).deliver(source, target)
    assert torch.equal(target, source.bfloat16())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64])
def test_host_staging_copies(dtype: torch.dtype) -> None:
    source = torch.arange(100).to(dtype)
    target = torch.zeros(100, dtype=dtype)
    HostStaging(64).deliver(source, target)
    assert torch.equal(target, source)
