"""Stages whose plan has an offload policy: they load, draw and write the same, and leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni.checkpoint import read_facts
from omni.errors import StageError
from omni.memory import ComponentMemory, MemoryPlan, Policy, Room
from omni.memory_planner import plan_memory
from omni.messages import Output
from omni.registry import CheckpointRef
from omni.spec import DiffusionSpec, LlmSpec, OffloadSpec, SamplingSpec
from omni.stage import StageCall, StageContext, Work
from stages.diffusion.stage import DiffusionStage
from stages.llm.stage import LlmStage
from tests.stages.diffusion import tiny, tiny_images
from tests.stages.diffusion.conftest import checkpoint  # noqa: F401
from tests.stages.llm.conftest import plain_model  # noqa: F401

POLICIES: tuple[Policy, ...] = ("component", "layerwise", "disk")

# Libraries below us, on classes they keep for old checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def draw(family: str, folder: Path, policy: Policy) -> list[np.ndarray]:
    """Two requests with one stage, which is unloaded then."""
    recipe = tiny.FAMILIES[family]
    call = {**recipe.call, "num_inference_steps": 4}
    spec = DiffusionSpec(model=str(folder), pipeline=recipe.pipeline, call=call, offload=OffloadSpec(ahead=1))
    # A plan that names no component of the pipeline: the policy says what becomes of them.
    other = ComponentMemory(name="other", weight_bytes=0, device_bytes=0)
    stage = DiffusionStage(StageContext("draw", spec, ".", memory=MemoryPlan(policy=policy, components=(other,))))
    stage.load(lambda progress: None)
    assert stage.built is not None
    pipeline, offload = stage.built.pipeline, stage.built.offload
    assert (offload is None) == (policy == "none")

    def request(seed: int) -> np.ndarray:
        payload: Any = stage.compute(StageCall("r", recipe.inputs(seed), seed), Work("r", lambda item: None))
        made = payload[recipe.port]
        return np.stack([np.asarray(image) for image in made]) if recipe.port == "images" else made.frames

    drawn = [request(1), request(2)]
    stage.unload()
    if offload is not None:
        assert offload.counters.num_copies_in > 0
        assert offload.counters.num_copies_out == 0
        assert offload.device_bytes == 0
    assert all("forward" not in vars(m) for part in pipeline.components.values() for m in modules_of(part))
    return drawn


def modules_of(part: object) -> list[torch.nn.Module]:
    return list(part.modules()) if isinstance(part, torch.nn.Module) else []


@pytest.mark.parametrize("family", ["qwen", "wan"])
def test_a_diffusion_stage_draws_the_same(family: str, checkpoint: Callable[[str], Path]) -> None:  # noqa: F811
    expected = draw(family, checkpoint(family), "none")
    for policy in POLICIES:
        assert np.array_equal(draw(family, checkpoint(family), policy), expected)


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_request_that_finds_no_memory_is_drawn_once_more(
    num_failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.FAMILIES["qwen"]
    tiny_images.qwen(6).save_pretrained(tmp_path)
    spec = DiffusionSpec(
        model=str(tmp_path),
        dtype="float32",
        call={**recipe.call, "num_inference_steps": 2},
        offload=OffloadSpec(policy="layerwise", resident="400KB"),
    )
    stage = DiffusionStage(
        StageContext("draw", spec, ".", memory=MemoryPlan(policy="layerwise", awaits_checkpoint=True))
    )
    stage.load(lambda progress: None)
    assert stage.built is not None
    assert stage.built.offload is not None
    assert stage.built.correction is not None

    def request() -> np.ndarray:
        payload: Any = stage.compute(StageCall("r", recipe.inputs(1), 1), Work("r", lambda item: None))
        return np.stack([np.asarray(image) for image in payload["images"]])

    expected, resident = request(), stage.built.offload.resident_bytes
    assert resident > 0
    engine: Any = stage.built.offload.engine
    postprocess, failures = stage.built.pipeline.image_processor.postprocess, []

    def fail(*args: Any, **kwargs: Any) -> Any:
        if len(failures) < num_failures:
            failures.append(stage.built and stage.built.offload and stage.built.offload.resident_bytes)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return postprocess(*args, **kwargs)

    monkeypatch.setattr(stage.built.pipeline.image_processor, "postprocess", fail)
    if num_failures == 1:
        assert np.array_equal(request(), expected)
        assert failures == [resident]
    else:
        with pytest.raises(StageError, match="out of memory"):
            request()
        assert failures == [resident, 0]
    engine.activation_bytes = 1000
    assert np.array_equal(request(), expected)
    assert stage.built.offload.resident_bytes == resident
    stage.unload()


def write(model: Path, policy: Policy) -> list[str]:
    """Three requests at once with one stage, which is torn down then."""
    spec = LlmSpec(model=str(model), sampling=SamplingSpec(max_new_tokens=12), offload=OffloadSpec(ahead=1))
    stage = LlmStage(StageContext("rewrite", spec, ".", num_threads=1, memory=MemoryPlan(policy=policy)))

    async def text(prompt: str) -> str:
        items = [item async for item in stage.run(StageCall(prompt, {"prompt": prompt}, 0))]
        assert isinstance(items[-1], Output)
        return str(items[-1].payload["text"])

    async def run() -> list[str]:
        await stage.setup(lambda progress: None)
        offload = stage._offload
        try:
            return list(await asyncio.gather(*(text(prompt) for prompt in ("one", "two two", "3"))))
        finally:
            await stage.teardown()
            assert (offload is None) == (policy == "none")
            assert offload is None or offload.device_bytes == 0

    return asyncio.run(run())


def test_a_language_stage_that_takes_more_than_planned_keeps_less(plain_model: Path) -> None:  # noqa: F811
    offload = OffloadSpec(policy="layerwise", resident="1GiB", ahead=1)
    spec = LlmSpec(model=str(plain_model), dtype="float32", sampling=SamplingSpec(max_new_tokens=4), offload=offload)
    memory = plan_memory(spec, read_facts(CheckpointRef(str(plain_model)), ""), Room(device_bytes=8 << 30))
    stage = LlmStage(StageContext("rewrite", spec, ".", num_threads=1, memory=memory))

    async def run() -> list[int]:
        await stage.setup(lambda progress: None)
        assert stage._offload is not None
        engine: Any = stage._offload.engine
        kept = []
        try:
            for taken in (1, 7 << 30, 1):
                engine.activation_bytes = taken
                assert [item async for item in stage.run(StageCall("r", {"prompt": "one"}, 0))]
                kept.append(stage._offload.resident_bytes)
        finally:
            await stage.teardown()
        return kept

    first, *later = asyncio.run(run())
    assert first > 0
    assert later == [0, 0]


def test_a_language_stage_writes_the_same(plain_model: Path) -> None:  # noqa: F811
    expected = write(plain_model, "none")
    for policy in POLICIES:
        assert write(plain_model, policy) == expected
