"""ThreadedStage: how what a worker thread tells arrives on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from omni.messages import Output, Payload, Progress, StageItem, Started, TextDelta
from omni.spec import FunctionSpec
from omni.stage import StageCall, StageContext, ThreadedStage, Work

WAIT_SECONDS = 20.0
CALL = StageCall(request_id="r", inputs={}, seed=0)


class Telling(ThreadedStage):
    """Runs the test's own function as its work."""

    def __init__(self, tell: Callable[[Work], None]) -> None:
        super().__init__(StageContext(name="tell", spec=FunctionSpec(call="a:b"), base_dir="."))
        self.tell = tell

    def compute(self, call: StageCall, work: Work) -> Payload:
        self.tell(work)
        return {}


def steps(num_steps: int) -> list[StageItem]:
    return [Progress(step=step, num_steps=num_steps) for step in range(num_steps)]


async def test_all_progress_arrives_in_order_and_wakes_the_loop_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    wakes: list[Any] = []
    loop = asyncio.get_running_loop()
    wake = loop.call_soon_threadsafe

    def count(callback: Callable[..., Any], *arguments: Any, **options: Any) -> asyncio.Handle:
        wakes.append(callback)
        return wake(callback, *arguments, **options)

    def tell(work: Work) -> None:
        work.emit(TextDelta(text="begin"))
        first_news.wait(WAIT_SECONDS)
        for item in steps(500):
            work.emit(item)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    first_news, heard, stage = threading.Event(), [], Telling(tell)
    async with asyncio.timeout(WAIT_SECONDS):
        async for item in stage.run(CALL):
            heard.append(item)
            if isinstance(item, TextDelta):
                first_news.set()
    assert heard == [Started(), TextDelta(text="begin"), *steps(500), Output(payload={})]
    assert len(wakes) < 50
    await stage.teardown()


async def test_a_lone_step_is_told_while_the_next_one_is_still_running() -> None:
    told = threading.Event()

    def tell(work: Work) -> None:
        for item in steps(2):
            work.emit(item)
        assert told.wait(WAIT_SECONDS)  # set by whoever hears the second step: it may not wait for further news

    stage = Telling(tell)
    async with asyncio.timeout(WAIT_SECONDS):
        async for item in stage.run(CALL):
            if item == steps(2)[1]:
                told.set()
    await stage.teardown()


async def test_an_error_comes_after_all_progress() -> None:
    def tell(work: Work) -> None:
        for item in steps(3):
            work.emit(item)
        raise ValueError("broken")

    stage, heard = Telling(tell), []

    async def listen() -> None:
        async for item in stage.run(CALL):
            heard.append(item)

    with pytest.raises(ValueError, match="broken"):
        await asyncio.wait_for(listen(), WAIT_SECONDS)
    assert heard == [Started(), *steps(3)]
    await stage.teardown()


async def test_unloading_waits_for_the_work_of_all_threads() -> None:
    begun, order = threading.Event(), []

    def tell(work: Work) -> None:
        begun.set()
        assert work.stop.wait(WAIT_SECONDS)
        order.append("work")

    class Several(Telling):
        """Two threads, so that unloading does not queue behind the work."""

        num_workers = 2

        def unload(self) -> None:
            order.append("unload")

    stage = Several(tell)
    run = asyncio.ensure_future(anext(aiter(stage.run(CALL))))
    assert await run == Started()
    assert await asyncio.to_thread(begun.wait, WAIT_SECONDS)
    await stage.teardown()
    assert order == ["work", "unload"]
