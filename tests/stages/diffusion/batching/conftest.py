"""Requests at once on stages with and without batching, and what the tests found about each family."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omni.messages import StageItem
from omni.spec import BatchingSpec
from omni.stage import StageCall
from stages.diffusion.batching.meeting import Meeting
from stages.diffusion.stage import DiffusionStage
from tests.stages.diffusion.conftest import build_stage


def run_at_once(
    stage: DiffusionStage, requests: list[dict[str, Any]], preview_every: int = 0, *, together: bool = True
) -> list[list[StageItem] | BaseException]:
    """Requests with seeds 0, 1, 2 ..., all at the same time: what each gave, or its error.

    `together`: they meet in their first call of the denoiser.
    """

    async def collect(inputs: dict[str, Any], seed: int) -> list[StageItem]:
        call = StageCall(f"request-{seed}", inputs, seed, preview_every)
        return [item async for item in stage.run(call)]

    async def gather() -> list[list[StageItem] | BaseException]:
        runs = (collect(inputs, seed) for seed, inputs in enumerate(requests))
        return await asyncio.gather(*runs, return_exceptions=True)

    assert stage.built is not None
    assert stage.built.meeting is not None
    if not together:
        return asyncio.run(gather())
    with meeting_at_first(stage.built.meeting, len(requests)):
        return asyncio.run(gather())


@contextlib.contextmanager
def meeting_at_first(meeting: Meeting, count: int) -> Iterator[None]:
    """So many requests wait for each other before their first calls, and each then counts as about to come."""
    run, guests = meeting.run, set[Any]()
    barrier = threading.Barrier(count, lambda: meeting._coming.update(guests))

    def first(guest: Any, *arguments: Any) -> Any:
        if guest not in guests:
            guests.add(guest)
            barrier.wait(30)
        return run(guest, *arguments)

    meeting.run = first  # type: ignore[method-assign]
    try:
        yield
    finally:
        del meeting.run


@pytest.fixture
def batched(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., DiffusionStage]]:
    """Family -> a stage that batches; requests wait for each other longer than any step takes."""
    stages: list[DiffusionStage] = []

    def build(family: str, **limits: Any) -> DiffusionStage:
        batching = BatchingSpec(**{"max_requests": 8, "wait": "2s", **limits})
        stages.append(build_stage(family, checkpoint(family), batching=batching))
        return stages[-1]

    yield build
    for stage in stages:
        stage.unload()
