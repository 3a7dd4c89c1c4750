"""The actor's shell, called as a plain object: aborts that come early, failures as items, threads."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from omni.errors import OmniError, RequestAborted, StageError, StageSetupError
from omni.messages import LoadProgress, StageFinished, StageStarted
from omni.runner.actor import MAX_EARLY_ABORTS, Header, RunMessage, StageActor
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
        needed_ports=("text",),
        keep=False,
        send=fields.pop("send", True),
    )
    return pickle.dumps(RunMessage(number=number, call=call, sent=fields.get("sent", ())))


async def items_of(batches: AsyncGenerator[Any, None]) -> list[Any]:
    return [item async for batch in batches for item in pickle.loads(batch)]


async def ready(stage: StageActor) -> StageActor:
    assert all(isinstance(item, LoadProgress) for item in await items_of(stage.setup()))
    return stage


async def test_a_run_ends_with_its_packed_payload() -> None:
    stage = await ready(actor())
    items = await items_of(stage.run(message(0)))
    assert isinstance(items[0], StageStarted)
    assert isinstance(items[-2], StageFinished)
    assert isinstance(items[-1], Header)
    assert list(items[-1].packed.unpack()) == ["text"]
    assert not items[-1].follows
    assert (await stage.ping()).num_running == 0


async def test_a_payload_that_nobody_wants_elsewhere_is_not_sent() -> None:
    items = await items_of((await ready(actor())).run(message(0, send=False)))
    assert items[-1].packed is None
    assert not items[-1].follows


async def test_packed_and_plain_inputs_are_told_apart() -> None:
    stage = await ready(actor(ports={"x": "any", "y": "any"}))
    inputs = {name: Port(stage=name, port="text", produced_at=0.0, sent=i) for i, name in enumerate("xy")}
    packed = object_store.pack({"text": "small"})
    runs = [
        stage.run(message(0, inputs, sent=(packed, None)), {"text": "large"}),
        stage.run(message(1, inputs, sent=(packed, packed))),
    ]
    digests = [(await items_of(run))[-1].packed.unpack()["text"] for run in runs]
    assert digests[0] != digests[1]


async def test_an_abort_that_comes_before_its_run() -> None:
    stage = await ready(actor())
    await stage.abort(7)
    items = await items_of(stage.run(message(7)))
    assert [type(item) for item in items] == [RequestAborted]
    assert isinstance((await items_of(stage.run(message(8))))[-1], Header)


async def test_aborts_of_runs_that_never_come_are_forgotten() -> None:
    stage = actor()
    for number in range(2 * MAX_EARLY_ABORTS):
        await stage.abort(number)
    assert len(stage._early_aborts) == MAX_EARLY_ABORTS


async def test_an_abort_while_it_runs() -> None:
    stage = await ready(actor(hold=True))
    run = stage.run(message(0))
    await anext(run)
    await stage.abort(0)
    assert isinstance((await items_of(run))[-1], RequestAborted)


async def test_failures_are_items() -> None:
    stage = await ready(actor(fail_in="run"))
    error = (await items_of(stage.run(message(0))))[-1]
    assert type(error) is StageError
    assert error.cause == "RuntimeError: the double fails in run"
    assert "Traceback" in error.details
    failed = (await items_of(actor(fail_in="setup").setup()))[-1]
    assert type(failed) is StageSetupError


async def test_an_input_that_was_lost_is_named() -> None:
    stage = await ready(actor(ports={"x": "any"}))
    lost = {"x": Port(stage="gone", port="text", produced_at=0.0)}
    error = (await items_of(stage.run(message(0, lost))))[-1]
    assert isinstance(error, OmniError)
    assert str(error) == "stage 'a': its input from 'gone' was lost when their process died (ask again)"


async def test_a_caller_that_leaves_ends_the_run() -> None:
    stage = await ready(actor(hold=True))
    run = stage.run(message(0))
    await anext(run)
    await run.aclose()
    assert (await stage.ping()).num_running == 0
    again = asyncio.create_task(anext(stage.run(message(1))))  # its thread is free for the next
    assert pickle.loads(await asyncio.wait_for(again, 30))


def test_threads_are_limited_before_torch_is_imported() -> None:
    context = StageContext(name="a", spec=DoubleSpec(), base_dir=".")
    launch = StageLaunch(context=context, target="omni.testing:DoubleStage")
    StageActor((launch,), num_threads=3)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    StageActor((launch,), num_threads=0)
    assert "OMP_NUM_THREADS" not in os.environ
