"""Flat memory is told from a leak, whatever the first requests take."""

from __future__ import annotations

import random

import pytest

from omni.bench.memory_slope import read_memory

ENDS = [float(second) / 100 for second in range(5000)]
INSTANTS = [second / 2 for second in range(101)]
PAGE = 4096


def grown(bytes_per_request: float) -> list[tuple[float, int]]:
    """Memory that fills caches first, then grows so fast, with some noise."""
    noise = random.Random(5)
    base = 100 * 1024**2
    return [
        (
            instant,
            base
            + round(min(instant, 8.0) * 2**20)
            + round(bytes_per_request * 100 * instant)
            + noise.randint(-20, 20) * PAGE,
        )
        for instant in INSTANTS
    ]


@pytest.mark.parametrize(("growth", "is_flat"), [(0.0, True), (100.0, True), (1000.0, False), (5000.0, False)])
def test_a_leak_is_found(growth: float, is_flat: bool) -> None:
    memory = read_memory(grown(growth), ENDS)
    assert memory is not None
    assert memory.bytes_per_request == pytest.approx(growth, abs=50)
    assert memory.is_flat is is_flat
    assert memory.table().rows["soak"][3] == memory.bytes_per_request


def test_too_few_samples_say_nothing() -> None:
    assert read_memory(grown(0.0)[:2], ENDS) is None
    assert read_memory([], []) is None
