"""The actor's shell, called as a plain object: ends of runs, events, aborts that come early, failures, threads."""

from __future__ import annotations

import asyncio
import os
import pickle
from typing import Any

import pytest

from omni.errors import OmniError, RequestAborted, StageError, StageSetupError
from omni.messages import StageFinished, StageProgress, StageStarted
from omni.runner.actor import MAX_EARLY_ABORTS, RunEnd, RunMessage, StageActor
from omni.runner.process import Port, RunCall, StageLaunch, Value
from omni.stage import StageContext
from omni.testing import DoubleSpec
from omni.transport import object_store


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))


def actor(**fields: Any) -> StageActor:
    context = StageContext(name="a", spec=DoubleSpec(**fields), base_dir=".")
    return StageActor((StageLaunch(context=context, target="omni.testing:DoubleStage"),), num_threads=0)


def message(number: int, inputs: dict[str, Any] | None = None, **fields: Any) -> bytes:
    call = RunCall(
        request_id=f"r{number}",
        stage="a",
        seed=1,
        inputs=inputs or {"prompt": Value(value="x")},
        needed_ports=fields.pop("ports", ("text",)),
        keep=False,
        send=fields.pop("send", True),
    )
    return pickle.dumps(RunMessage(number=number, call=call, sent=fields.get("sent", ())))


async def end_of(stage: StageActor, data: bytes, *arguments: Any) -> RunEnd:
    end = pickle.loads(await stage.run(data, *arguments))
    assert isinstance(end, RunEnd)
    return end


async def ready(stage: StageActor) -> StageActor:
    end = pickle.loads(await stage.setup())
    assert end.error is None
    assert [progress.state for progress in end.events] == ["ready"]
    return stage


async def test_a_quick_run_is_one_message() -> None:
    stage = await ready(actor())
    end = await end_of(stage, message(0))
    assert end.num_streamed == 0
    assert isinstance(end.events[0], StageStarted)
    assert isinstance(end.events[-1], StageFinished)
    assert end.error is None
    assert end.packed is not None
    assert list(end.packed.unpack()) == ["text"]
    assert not end.is_large
    assert (await stage.ping()).num_running == 0


async def test_events_of_a_long_run_are_streamed_and_counted() -> None:
    stage = await ready(actor(hold=True, steps=3))
    stream = stage.events()
    run = asyncio.create_task(stage.run(message(4)))
    streamed: list[Any] = []
    while not any(isinstance(event, StageProgress) and event.step == 2 for _, event in streamed):
        streamed += pickle.loads(await asyncio.wait_for(anext(stream), 30))
    events = [event for number, event in streamed if number == 4]
    assert isinstance(events[0], StageStarted)
    await stage.abort(4)
    end = pickle.loads(await run)
    assert end.num_streamed == len(events)
    assert end.events == ()
    assert isinstance(end.error, RequestAborted)


async def test_a_payload_that_nobody_wants_elsewhere_is_not_sent() -> None:
    end = await end_of(await ready(actor()), message(0, send=False))
    assert end.packed is None
    assert not end.is_large


async def test_a_large_payload_is_taken_once() -> None:
    stage = await ready(actor(gives="tensor", num_bytes=1_000_000))
    end = await end_of(stage, message(0, ports=("tensor",)))
    assert end.packed is None
    assert end.is_large
    written, payload = await stage.take(0)
    assert written is None
    assert payload["tensor"].numel() == 1_000_000
    with pytest.raises(KeyError):
        await stage.take(0)


async def test_a_large_payload_that_nobody_waits_for_is_dropped() -> None:
    stage = await ready(actor(gives="tensor", num_bytes=1_000_000))
    await end_of(stage, message(0, ports=("tensor",)))
    await stage.abandon(0)
    with pytest.raises(KeyError):
        await stage.take(0)


async def test_packed_and_plain_inputs_are_told_apart() -> None:
    stage = await ready(actor(ports={"x": "any", "y": "any"}))
    inputs = {name: Port(stage=name, port="text", produced_at=0.0, sent=i) for i, name in enumerate("xy")}
    packed = object_store.pack({"text": "small"})
    ends = [
        await end_of(stage, message(0, inputs, sent=(packed, None)), {"text": "large"}),
        await end_of(stage, message(1, inputs, sent=(packed, packed))),
    ]
    digests = [end.packed.unpack()["text"] for end in ends if end.packed is not None]
    assert len(set(digests)) == 2


async def test_an_abort_that_comes_before_its_run() -> None:
    stage = await ready(actor())
    await stage.abort(7)
    assert isinstance((await end_of(stage, message(7))).error, RequestAborted)
    assert (await end_of(stage, message(8))).error is None


async def test_aborts_of_runs_that_never_come_are_forgotten() -> None:
    stage = actor()
    for number in range(2 * MAX_EARLY_ABORTS):
        await stage.abort(number)
    assert len(stage._early_aborts) == MAX_EARLY_ABORTS


async def started(stage: StageActor) -> None:
    """Wait until a run's first event is there."""
    await asyncio.wait_for(anext(stage.events()), 30)


async def test_an_abort_while_it_runs() -> None:
    stage = await ready(actor(hold=True))
    run = asyncio.create_task(end_of(stage, message(0)))
    await started(stage)
    await stage.abort(0)
    assert isinstance((await run).error, RequestAborted)


async def test_failures_are_part_of_the_end() -> None:
    stage = await ready(actor(fail_in="run"))
    error = (await end_of(stage, message(0))).error
    assert type(error) is StageError
    assert error.cause == "RuntimeError: the double fails in run"
    assert "Traceback" in error.details
    assert type(pickle.loads(await actor(fail_in="setup").setup()).error) is StageSetupError


async def test_an_input_that_was_lost_is_named() -> None:
    stage = await ready(actor(ports={"x": "any"}))
    lost = {"x": Port(stage="gone", port="text", produced_at=0.0)}
    error = (await end_of(stage, message(0, lost))).error
    assert isinstance(error, OmniError)
    assert str(error) == "stage 'a': its input from 'gone' was lost when their process died (ask again)"


async def test_a_run_that_nobody_waits_for_stops() -> None:
    stage = await ready(actor(hold=True))
    run = asyncio.create_task(end_of(stage, message(0)))
    await started(stage)
    await stage.abandon(0)
    await asyncio.wait_for(run, 30)
    assert (await stage.ping()).num_running == 0


def test_threads_are_limited_before_torch_is_imported() -> None:
    context = StageContext(name="a", spec=DoubleSpec(), base_dir=".")
    launch = StageLaunch(context=context, target="omni.testing:DoubleStage")
    StageActor((launch,), num_threads=3)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    StageActor((launch,), num_threads=0)
    assert "OMP_NUM_THREADS" not in os.environ
