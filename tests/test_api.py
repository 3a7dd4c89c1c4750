"""The Python API over the inline runner; what all runners share is in tests/runner/test_behaviour.py."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omni import AsyncOmni, Omni, Result
from omni.api import ResultBuilder
from omni.errors import GraphError, InputError, RequestAborted, RequestFailed, RunnerError, StageSetupError
from omni.messages import Aborted, Done, Failed, Final, LoadProgress, Queued, StageStarted
from omni.spec import GraphSpec
from omni.testing import DoubleSpec, doubles

WAIT_SECONDS = 60
PAIR: dict[str, Any] = {
    "stages": {
        "rewrite": {"kind": "double"},
        "draw": {"kind": "double", "gives": "image", "inputs": {"prompt": "rewrite.text"}},
    },
    "outputs": {"image": "draw.image", "caption": "rewrite.text"},
}


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with doubles():
        yield


def single(**fields: Any) -> dict[str, Any]:
    return {"stages": {"a": {"kind": "double", **fields}}}


def test_outputs_come_by_name() -> None:
    with Omni(PAIR, runner="inline") as omni:
        result = omni.generate(prompt="a snowman", seed=3)
    assert isinstance(result, Result)
    assert [type(image) for image in result.outputs["image"]] == [Image.Image]
    assert result.image is result.outputs["image"]
    assert result.caption == result.outputs["caption"]
    assert result.seed == 3
    assert result.graph.spec.stages.keys() == {"rewrite", "draw"}
    assert list(result.timings.stages) == ["rewrite", "draw"]
    assert [(hop.source, hop.target) for hop in result.timings.hops] == [("rewrite.text", "draw.prompt")]
    assert 0 < result.timings.stages["draw"].seconds <= result.timings.seconds
    assert repr(result).startswith("Result(outputs=['caption', 'image'], seed=3, seconds=")


def test_a_missing_output_is_an_attribute_error() -> None:
    with Omni(single(), runner="inline") as omni:
        result = omni.generate()
    with pytest.raises(AttributeError, match="no output 'picture'; this result has"):
        _ = result.picture
    assert not hasattr(result, "__deepcopy__")


def test_seeds_repeat() -> None:
    with Omni(single(), runner="inline") as omni:
        first, other = omni.generate(prompt="x", seed=1), omni.generate(prompt="x", seed=2)
        again = omni.generate(prompt="x", seed=first.seed)
    assert first.outputs == again.outputs != other.outputs


def test_graphs_may_be_files_specs_and_documents(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text("stages:\n  a: {kind: double}\n")
    graphs = [tmp_path / "g.yaml", str(tmp_path / "g.yaml"), single(), GraphSpec(stages={"a": DoubleSpec()})]
    results = []
    for graph in graphs:
        with Omni(graph, runner="inline") as omni:
            results.append(omni.generate(prompt="x", seed=1).outputs)
    assert results == [results[0]] * len(graphs)


def test_overrides_change_the_graph() -> None:
    assert Omni(single(), overrides=["stages.a.steps=7"]).loaded.document["stages"]["a"]["steps"] == 7
    with pytest.raises(GraphError, match=r"stages\.a\.stepps"):
        Omni(single(), overrides=["stages.a.stepps=7"])


def test_a_plan_is_there_before_the_start() -> None:
    omni = Omni(single(), runner="inline", hardware="cpu16")
    assert omni.plan.runner == "inline"
    assert omni.plan.hardware.name == "cpu16"
    assert list(omni.graph.order) == ["a"]


def test_streams_end_with_one_final_event() -> None:
    with Omni(PAIR, runner="inline") as omni:
        events = list(omni.stream(prompt="x", seed=1))
    assert isinstance(events[0], Queued)
    assert [event for event in events if isinstance(event, Final)] == [events[-1]]
    assert isinstance(events[-1], Done)
    assert isinstance(events[-1].outputs["image"], list)


def test_a_request_can_be_made_first() -> None:
    with Omni(single(), runner="inline") as omni:
        request = omni.request(prompt="x", seed=5, request_id="mine")
        assert omni.generate(request).outputs == omni.generate(prompt="x", seed=5).outputs
        assert {event.request_id for event in omni.stream(request)} == {"mine"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promt": "x"}, "unknown input 'promt', did you mean 'prompt'"),
        ({"prompt": 3}, "input 'prompt' must be text, not int"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_wrong_inputs_are_told_before_anything_runs(fields: dict[str, Any], message: str) -> None:
    with Omni(single(), runner="inline") as omni:
        for call in (omni.generate, omni.request, lambda **f: next(omni.stream(**f))):
            with pytest.raises(InputError, match=message):
                call(**fields)


def test_a_failed_request_leaves_the_runner_healthy() -> None:
    with Omni(single(fail_in="run", fail_on="bad"), runner="inline") as omni:
        with pytest.raises(RequestFailed, match="stage 'a': RuntimeError: the double fails in run") as caught:
            omni.generate(prompt="bad")
        assert caught.value.error.stage == "a"
        assert "Traceback" in caught.value.error.details
        assert isinstance(list(omni.stream(prompt="bad"))[-1], Failed)
        assert omni.generate(prompt="good").text


def test_threads_may_share_one_omni() -> None:
    with Omni(PAIR, runner="inline") as omni, ThreadPoolExecutor(8) as pool:
        alone = [omni.generate(prompt=f"p{n}", seed=n).caption for n in range(16)]
        together = list(pool.map(lambda n: omni.generate(prompt=f"p{n}", seed=n).caption, range(16)))
    assert together == alone


def test_another_thread_can_abort() -> None:
    with Omni(single(hold=True), runner="inline") as omni, ThreadPoolExecutor(1) as pool:
        started = threading.Event()

        def follow() -> list[Any]:
            events = []
            for event in omni.stream(prompt="x", request_id="r"):
                events.append(event)
                if isinstance(event, StageStarted):
                    started.set()
            return events

        following = pool.submit(follow)
        assert started.wait(WAIT_SECONDS)
        assert omni.abort("r")
        assert isinstance(following.result(WAIT_SECONDS)[-1], Aborted)
        assert not omni.abort("r")
        assert not omni.abort("unknown")


def test_an_aborted_generate_raises() -> None:
    with Omni(single(hold=True), runner="inline") as omni, ThreadPoolExecutor(1) as pool:
        work = pool.submit(omni.generate, prompt="x", request_id="r")
        while not omni.abort("r"):
            assert not work.done()
        with pytest.raises(RequestAborted, match="request r: aborted by the caller"):
            work.result(WAIT_SECONDS)


def test_leaving_a_stream_aborts_its_request() -> None:
    with Omni(single(hold=True), runner="inline") as omni:
        for event in omni.stream(prompt="x"):
            if isinstance(event, StageStarted):
                break
        runner = omni._omni._runner
        assert runner is not None

        async def emptied() -> None:
            while runner.num_requests():
                await asyncio.sleep(0)

        omni._call(emptied(), WAIT_SECONDS)


def test_a_stage_that_cannot_load_is_told() -> None:
    omni = Omni(single(fail_in="setup"), runner="inline")
    with pytest.raises(StageSetupError, match="stage 'a': RuntimeError: the double fails in setup"):
        omni.start()
    omni.stop()


def test_loading_is_reported() -> None:
    reports: list[LoadProgress] = []
    with Omni(single(), runner="inline", report=reports.append):
        pass
    assert [(report.stage, report.state) for report in reports] == [("a", "ready")]


def test_use_outside_of_start_and_stop_is_told() -> None:
    omni = Omni(single(), runner="inline")
    with pytest.raises(RunnerError, match="not started"):
        omni.generate(prompt="x")
    with omni:
        omni.start()
        assert omni.generate(prompt="x").text
    omni.stop()
    with pytest.raises(RunnerError, match="not started"):
        omni.generate(prompt="x")
    with omni:
        assert omni.generate(prompt="x").text


async def test_tasks_may_share_one_async_omni() -> None:
    async with AsyncOmni(PAIR, runner="inline") as omni:
        alone = [(await omni.generate(prompt=f"p{n}", seed=n)).caption for n in range(8)]
        results = await asyncio.gather(*(omni.generate(prompt=f"p{n}", seed=n) for n in range(8)))
    assert [result.caption for result in results] == alone


async def test_a_cancelled_task_aborts_its_request() -> None:
    async with AsyncOmni(single(hold=True), runner="inline") as omni:
        started = asyncio.Event()

        async def follow() -> None:
            async for event in omni.stream(prompt="x"):
                if isinstance(event, StageStarted):
                    started.set()

        task = asyncio.create_task(follow())
        await asyncio.wait_for(started.wait(), WAIT_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert omni._runner is not None
        async with asyncio.timeout(WAIT_SECONDS):
            while omni._runner.num_requests():
                await asyncio.sleep(0)


async def test_async_use_outside_of_start_and_stop_is_told() -> None:
    omni = AsyncOmni(single(), runner="inline")
    with pytest.raises(RunnerError, match="use it as a context manager, or call start"):
        await omni.generate(prompt="x")
    await omni.stop()


def test_a_builder_raises_what_went_wrong() -> None:
    omni = Omni(single(), runner="inline")
    builder = ResultBuilder(omni.request(prompt="x", request_id="r"), omni.loaded)
    assert builder.add(Queued(request_id="r")) is None
    with pytest.raises(RequestAborted, match="request r: enough"):
        builder.add(Aborted(request_id="r", reason="enough"))
