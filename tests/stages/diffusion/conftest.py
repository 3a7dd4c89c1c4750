"""Tiny pipelines on disk and stages that have loaded them, each made once for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from omni.messages import LoadProgress
from omni.spec import DiffusionSpec
from omni.stage import StageContext
from stages.diffusion.stage import DiffusionStage
from tests.stages.diffusion import tiny


@pytest.fixture(scope="session", autouse=True)
def _one_kernel_thread() -> None:
    """The models are so small that threads only cost."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> the folder of its saved pipeline."""
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda family: tiny.save(family, root)


def build_stage(
    family: str, folder: Path, reports: list[LoadProgress] | None = None, workers: int = 1, **changes: Any
) -> DiffusionStage:
    """A loaded stage of the family; `changes` replace keys of its spec."""
    recipe = {**tiny.FAMILIES, **tiny.MORE_FAMILIES}[family]
    call = {**recipe.call, "num_inference_steps": 4, **changes.pop("call", {})}
    spec = DiffusionSpec(**{"model": str(folder), "pipeline": recipe.pipeline, "call": call, **changes})
    stage_class = type("Stage", (DiffusionStage,), {"num_workers": workers})
    stage: DiffusionStage = stage_class(StageContext("draw", spec, "."))
    stage.load((reports if reports is not None else []).append)
    return stage


@pytest.fixture(scope="session")
def loaded(checkpoint: Callable[[str], Path]) -> Iterator[Callable[[str], DiffusionStage]]:
    """Family -> a stage that has loaded it."""
    stages: dict[str, DiffusionStage] = {}

    def load(family: str) -> DiffusionStage:
        if family not in stages:
            stages[family] = build_stage(family, checkpoint(family))
        return stages[family]

    yield load
    for stage in stages.values():
        stage.unload()
