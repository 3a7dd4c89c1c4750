"""Requests at once on stages with and without batching, and what the tests found about each family."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from omni.messages import StageItem
from omni.spec import BatchingSpec
from omni.stage import StageCall
from stages.diffusion.stage import DiffusionStage
from tests.stages.diffusion.conftest import build_stage


def run_at_once(
    stage: DiffusionStage, requests: list[dict[str, Any]], preview_every: int = 0
) -> list[list[StageItem] | BaseException]:
    """Requests with seeds 0, 1, 2 ..., all at the same time: what each gave, or its error."""

    async def collect(inputs: dict[str, Any], seed: int) -> list[StageItem]:
        call = StageCall(f"request-{seed}", inputs, seed, preview_every)
        return [item async for item in stage.run(call)]

    async def gather() -> list[list[StageItem] | BaseException]:
        runs = (collect(inputs, seed) for seed, inputs in enumerate(requests))
        return await asyncio.gather(*runs, return_exceptions=True)

    return asyncio.run(gather())


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
