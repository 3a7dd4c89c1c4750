"""One behaviour suite over both runners: whatever a graph does inline, it does on Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from omni import registry
from omni.api import AsyncOmni
from omni.errors import InputError, RequestAborted, RequestFailed
from omni.messages import (
    Aborted,
    Done,
    Event,
    Failed,
    Final,
    HopFinished,
    Queued,
    StageFinished,
    StagePreview,
    StageProgress,
    StageStarted,
)
from omni.testing import doubles, release_deaf

RUNNERS = ["inline", "ray"]
WAIT_SECONDS = 60


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with doubles():
        yield
    assert "double" not in registry.BUILT_IN


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return str(request.param)


def double(inputs: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    ports = {name: fields.pop("type", "any") for name in inputs or {}} or {"prompt": "text"}
    return {"kind": "double", "inputs": inputs or {}, "ports": ports, **fields}


CHAIN = {"a": double(), "b": double({"x": "a.text"}), "c": double({"x": "b.text"})}
DIAMOND = {
    "a": double(),
    "b": double({"x": "a.text"}),
    "c": double({"x": "a.text"}),
    "d": double({"x": "b.text", "y": "c.text"}),
}
GATHER = {"a": double(), "b": double(), "c": double({"x": ["a.text", "b.text"]})}
SHAPES = {"chain": CHAIN, "diamond": DIAMOND, "gather": GATHER}


def run_graph(runner: str, stages: dict[str, Any], work: Any, **options: Any) -> Any:
    """Start the graph, run `work(omni)` on it under a deadline, stop it, and check that nothing is left."""

    async def main() -> Any:
        async with AsyncOmni({"stages": stages, **options}, runner=runner) as omni:  # type: ignore[arg-type]
            result = await asyncio.wait_for(work(omni), WAIT_SECONDS)
            assert omni._runner is not None
            assert omni._runner.num_requests() == 0
            return result

    return asyncio.run(main())


async def collect(omni: AsyncOmni, **fields: Any) -> list[Event]:
    return [event async for event in omni.stream(**fields)]


def changed(stages: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    return {**stages, name: {**stages[name], **fields}}


@pytest.mark.parametrize("shape", SHAPES)
def test_events_come_in_order_and_end_once(runner: str, shape: str) -> None:
    events = run_graph(runner, SHAPES[shape], lambda omni: collect(omni, prompt="hello", seed=1))
    assert isinstance(events[0], Queued)
    assert isinstance(events[-1], Done)
    assert sum(isinstance(event, Final) for event in events) == 1
    for stage in SHAPES[shape]:
        own = [event for event in events if getattr(event, "stage", None) == stage]
        assert isinstance(own[0], StageStarted)
        assert isinstance(own[-1], StageFinished)
        assert [event.step for event in own if isinstance(event, StageProgress)] == [1, 2]
    hops = {(event.source, event.target) for event in events if isinstance(event, HopFinished)}
    expected = {"chain": 2, "diamond": 4, "gather": 2}[shape]
    assert len(hops) == expected
    assert all(event.bytes > 0 and event.seconds >= 0 for event in events if isinstance(event, HopFinished))


def test_previews_come_when_they_are_asked_for(runner: str) -> None:
    stages = {"a": double(steps=5), "b": double({"x": "a.text"}, steps=5)}

    async def work(omni: AsyncOmni) -> list[list[Event]]:
        return [await collect(omni, prompt="hello", seed=1, preview_every=every) for every in (0, 2)]

    without, events = run_graph(runner, stages, work)
    assert not [event for event in without if isinstance(event, StagePreview)]
    previews = [event for event in events if isinstance(event, StagePreview)]
    assert [(event.stage, event.step, event.num_steps) for event in previews] == [
        (stage, step, 5) for stage in "ab" for step in (2, 4)
    ]
    assert {(event.image.mode, event.image.size) for event in previews} == {("RGB", (4, 2))}
    assert previews[0].image.tobytes() != previews[2].image.tobytes()


def test_peaks_and_load_times_are_told(runner: str) -> None:
    result = run_graph(runner, CHAIN, lambda omni: omni.generate(prompt="hello", seed=1))
    for stage in CHAIN:
        finished, load = result.timings.stages[stage], result.timings.loads[stage]
        assert finished.peak_host_bytes >= load.peak_host_bytes > 2**20
        assert finished.peak_device_bytes == load.peak_device_bytes == 0
        assert (load.state, 0 < load.load_seconds < WAIT_SECONDS) == ("ready", True)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_runners_give_the_same(shape: str, ray_cluster: object) -> None:
    texts = [
        run_graph(runner, SHAPES[shape], lambda omni: omni.generate(prompt="hello", seed=7)).outputs["text"]
        for runner in RUNNERS
    ]
    assert texts[0] == texts[1]


def test_fifty_requests_at_once(runner: str) -> None:
    async def work(omni: AsyncOmni) -> list[str]:
        serial = [(await omni.generate(prompt=f"p{i}", seed=i)).text for i in (0, 49)]
        many = await asyncio.gather(*(omni.generate(prompt=f"p{i}", seed=i) for i in range(50)))
        assert [many[0].text, many[49].text] == serial
        return [result.text for result in many]

    assert len(set(run_graph(runner, DIAMOND, work))) == 50


@pytest.mark.parametrize("position", ["a", "b", "d"])
def test_a_failure_in_any_position_fails_its_request_alone(runner: str, position: str) -> None:
    stages = changed(DIAMOND, position, fail_in="run", fail_on="" if position != "a" else "bad")

    async def work(omni: AsyncOmni) -> None:
        with pytest.raises(RequestFailed) as caught:
            await omni.generate(prompt="bad", seed=1)
        assert caught.value.error.stage == position
        assert caught.value.error.cause == "RuntimeError: the double fails in run"
        assert "fails in run" in caught.value.error.details
        if position == "a":
            assert len((await omni.generate(prompt="good", seed=1)).text) == 64

    run_graph(runner, stages, work)


def test_a_failure_stops_the_other_branch(runner: str) -> None:
    stages = changed(changed(DIAMOND, "b", fail_in="run"), "c", hold=True)
    events = run_graph(runner, stages, lambda omni: collect(omni, prompt="x", seed=1))
    assert isinstance(events[-1], Failed)
    assert events[-1].error.stage == "b"
    assert not any(isinstance(event, StageStarted) and event.stage == "d" for event in events)


@pytest.mark.parametrize("fault", [{}, {"fail_in": "abort", "timeouts": {"abort_seconds": 0.2}}], ids=["", "failing"])
@pytest.mark.parametrize("position", ["a", "b", "d"])
def test_an_abort_in_any_position(runner: str, position: str, fault: dict[str, Any]) -> None:
    async def work(omni: AsyncOmni) -> None:
        events: list[Event] = []
        async for event in omni.stream(prompt="x", seed=1, request_id="r1"):
            events.append(event)
            if isinstance(event, StageStarted) and event.stage == position:
                assert await omni.abort("r1")
        assert isinstance(events[-1], Aborted)
        assert not await omni.abort("r1")

    run_graph(runner, changed(DIAMOND, position, hold=True, **fault), work)


def test_an_abort_before_anything_has_started(runner: str) -> None:
    async def work(omni: AsyncOmni) -> None:
        task = asyncio.create_task(omni.generate(prompt="y", seed=2, request_id="r2"))
        while not await omni.abort("r2"):
            await asyncio.sleep(0)
        with pytest.raises(RequestAborted):
            await task

    run_graph(runner, changed(DIAMOND, "a", hold=True), work)


def test_an_abort_while_waiting_for_a_turn_is_immediate(runner: str) -> None:
    async def work(omni: AsyncOmni) -> None:
        first = omni.stream(prompt="first", seed=1, request_id="first")
        async for event in first:
            if isinstance(event, StageStarted):
                break
        waiting = asyncio.create_task(collect(omni, prompt="second", seed=2, request_id="second"))
        while not await omni.abort("second"):
            await asyncio.sleep(0)
        events = await waiting
        assert isinstance(events[-1], Aborted)
        assert not any(isinstance(event, StageStarted) for event in events)
        assert await omni.abort("first")
        await first.aclose()
        while omni._runner.num_requests():  # type: ignore[union-attr]
            await asyncio.sleep(0)

    run_graph(runner, {"a": double(hold=True)}, work)


def test_a_caller_that_leaves_aborts_its_request(runner: str) -> None:
    async def work(omni: AsyncOmni) -> None:
        events = omni.stream(prompt="x", seed=1)
        async for event in events:
            if isinstance(event, StageStarted) and event.stage == "b":
                break
        await events.aclose()
        while omni._runner.num_requests():  # type: ignore[union-attr]
            await asyncio.sleep(0)

    run_graph(runner, changed(CHAIN, "b", hold=True), work)


def test_slow_and_fast_consumers_of_one_payload(runner: str) -> None:
    stages = {
        "a": double(gives="tensor", num_bytes=4_000_000),
        "fast": double({"x": "a.tensor"}),
        "slow": double({"x": "a.tensor"}, step_seconds=0.05),
        "end": double({"x": "fast.text", "y": "slow.text"}),
    }

    async def work(omni: AsyncOmni) -> None:
        results = await asyncio.gather(*(omni.generate(prompt=f"p{i}", seed=i) for i in range(6)))
        assert len({result.text for result in results}) == 6

    run_graph(runner, stages, work)


def test_big_tensors_arrive_whole(runner: str) -> None:
    stages = {"a": double(gives="tensor", num_bytes=64_000_000), "b": double({"x": "a.tensor"})}

    async def work(omni: AsyncOmni) -> tuple[str, str]:
        result = await omni.generate(prompt="big", seed=3)
        assert result.timings.hops[0].bytes == 64_000_000
        return result.timings.hops[0].transport, result.text  # the text is a digest of the tensor that arrived

    assert run_graph("inline", stages, work)[0] == "local"
    transport, text = run_graph(runner, stages, work)
    assert transport == ("local" if runner == "inline" else "object_store")
    assert text == run_graph("inline", stages, work)[1]


def test_lists_join_when_they_are_gathered(runner: str) -> None:
    stages = {
        "a": double(gives="image"),
        "b": {"kind": "function", "call": "stages.function.library:add_border", "inputs": {"image": "a.image"}},
        "sheet": {
            "kind": "function",
            "call": "stages.function.library:grid",
            "inputs": {"images": ["a.image", "b.image", "image"]},
        },
    }

    async def work(omni: AsyncOmni) -> Any:
        from PIL import Image

        with pytest.raises(InputError, match="input 'image' is missing: stage 'sheet' needs it"):
            await omni.generate(prompt="x", seed=1)
        result = await omni.generate(prompt="x", seed=1, image=Image.new("RGB", (8, 8), "red"))
        return result.image[0]

    sheet = run_graph(runner, stages, work, outputs={"image": "sheet.image"})
    assert sheet.size == (2 * 36 + 4, 2 * 34 + 4)  # cells of the largest, the framed 4x2 picture
    assert sheet.getpixel((18, 36 + 4 + 17 - 2)) == (255, 0, 0)


def test_a_stage_that_writes_into_a_shared_input_is_caught(runner: str) -> None:
    stages = {"a": double(gives="tensor", num_bytes=2_000_000), "b": double({"x": "a.tensor"}, writes_input=True)}
    events = run_graph(runner, stages, lambda omni: collect(omni, prompt="x", seed=1))
    assert isinstance(events[-1], Failed)
    assert events[-1].error.cause == "wrote into its input 'x', which other readers share"
    assert "mutates_inputs" in events[-1].error.remedy


def paint_black(image: Any) -> Any:
    """Writes into its input."""
    image.paste((0, 0, 0), (0, 0, image.width, image.height))
    return image


def test_images_are_shared_without_seeing_each_others_writes(runner: str) -> None:
    call = "tests.runner.test_behaviour:paint_black"
    stages = {
        "a": double(gives="image"),
        "b": {"kind": "function", "call": call, "inputs": {"image": "a.image"}, "input_types": {"image": "image"}}
        | {"outputs": {"image": "image"}},
        "c": double({"x": "a.image", "y": "b.image"}),
    }

    async def work(omni: AsyncOmni) -> tuple[bytes, bytes]:
        result = await omni.generate(prompt="x", seed=1)
        return result.white[0].tobytes(), result.black[0].tobytes()

    kept, painted = run_graph(runner, stages, work, outputs={"white": "a.image", "black": "b.image"})
    assert set(painted) == {0}
    assert set(kept) != {0}


def test_a_hop_does_not_count_the_wait_for_other_inputs(runner: str) -> None:
    stages = {
        "quick": double(),
        "slow": double(step_seconds=0.2, steps=2),
        "end": double({"x": "quick.text", "y": "slow.text"}),
    }
    events = run_graph(runner, stages, lambda omni: collect(omni, prompt="x", seed=1))
    hops = {event.source: event.seconds for event in events if isinstance(event, HopFinished)}
    slow = next(event.seconds for event in events if isinstance(event, StageFinished) and event.stage == "slow")
    assert hops["quick.text"] == hops["slow.text"] < slow


def test_what_cannot_be_carried_fails_its_request(runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(omni: AsyncOmni) -> None:
        assert omni._runner is not None
        monkeypatch.setattr(omni._runner, "_build_call", lambda state, stage: 1 / 0)
        events = await collect(omni, prompt="x", seed=1)
        assert isinstance(events[-1], Failed)
        assert events[-1].error.cause == "ZeroDivisionError: division by zero"
        monkeypatch.undo()
        assert isinstance((await collect(omni, prompt="x", seed=1))[-1], Done)

    run_graph(runner, CHAIN, work)


def test_a_stage_that_does_not_stop_is_refused_until_it_has() -> None:
    stages = {"a": double(deaf=True, hold=True, timeouts={"abort_seconds": 0.1})}
    release_deaf.clear()

    async def work(omni: AsyncOmni) -> None:
        events = omni.stream(prompt="x", seed=1, request_id="stuck")
        async for event in events:
            if isinstance(event, StageStarted):
                await omni.abort("stuck")
        refused = (await collect(omni, prompt="y", seed=1))[-1]
        assert isinstance(refused, Failed)
        assert refused.error.cause.startswith("an earlier request is stuck in it")
        release_deaf.set()
        while isinstance((last := (await collect(omni, prompt="z", seed=1))[-1]), Failed):
            assert last.error.cause == refused.error.cause
        assert isinstance(last, Aborted)  # the double of a request that is held ends as if aborted

    run_graph("inline", stages, work)


def test_a_stage_that_gives_no_port_is_named(runner: str) -> None:
    events = run_graph(runner, changed(CHAIN, "a", fail_in="port"), lambda omni: collect(omni, prompt="x", seed=1))
    assert isinstance(events[-1], Failed)
    assert events[-1].error.cause == "gave no 'text'; it gave nothing"


def test_a_run_past_its_deadline_fails_and_is_named(runner: str) -> None:
    stages = {
        "a": double(hold=True, fail_on="x", timeouts={"run_seconds": 0.2, "abort_seconds": 5}),
    }

    async def work(omni: AsyncOmni) -> None:
        events = await collect(omni, prompt="x", seed=1)
        assert isinstance(events[-1], Failed)
        assert events[-1].error.cause == "did not finish within 0.2 s"
        assert events[-1].error.remedy == "raise stages.a.timeouts.run_seconds, or ask for less"

    run_graph(runner, stages, work)


def test_two_requests_cannot_share_an_id(runner: str) -> None:
    async def work(omni: AsyncOmni) -> None:
        stream = omni.stream(prompt="x", seed=1, request_id="same")
        await anext(stream)
        with pytest.raises(Exception, match="id 'same' is running already"):
            await omni.generate(prompt="y", seed=1, request_id="same")
        await stream.aclose()
        while omni._runner.num_requests():  # type: ignore[union-attr]
            await asyncio.sleep(0)

    run_graph(runner, CHAIN, work)
