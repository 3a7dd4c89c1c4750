"""The Ray actor: a thin asynchronous shell around LocalProcess, one per process of the plan.

`setup` and `run` are streaming generators. A stage's failure comes as their last item, not as an exception, so that only
deaths and what cannot be sent reach the driver as errors. A payload is an item of its own, which the driver passes on
as a reference without reading it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from omni.errors import RequestAborted
from omni.messages import LoadProgress, Message, Payload
from omni.runner.process import LocalProcess, Produced, RunCall, StageLaunch
from omni.transport import object_store

MAX_EARLY_ABORTS = 1000
"""Aborts that came before their runs; most of these runs will come, and the oldest are forgotten."""


class Header(Message, frozen=True, kw_only=True):
    """Last item of a run that ended well. When the call says `send`, the payload comes before it."""

    produced_at: float


class Vitals(Message, frozen=True, kw_only=True):
    """How a process is."""

    pid: int
    num_held: int
    """Payloads held for readers in the same process."""
    num_running: int
    has_torch: bool


class StageActor:
    """Hosts the stages of one process. omni.runner.actor_process makes a Ray actor of it."""

    def __init__(self, launches: tuple[StageLaunch, ...], num_threads: int) -> None:
        _limit_threads(num_threads)
        self._local = LocalProcess(launches)
        self._runs: dict[int, _Run] = {}
        self._early_aborts: dict[int, None] = {}

    async def setup(self) -> AsyncGenerator[LoadProgress | Exception | None, None]:
        """Loading progress; last the error, or None."""
        loop = asyncio.get_running_loop()
        feed = _Feed()

        async def work() -> None:
            await self._local.setup(lambda progress: _put_from_thread(loop, feed, progress))

        async with contextlib.aclosing(feed.items(work())) as items:
            async for item in items:
                yield item

    async def run(self, number: int, call: RunCall, *sent: Payload) -> AsyncGenerator[Any, None]:
        """Events, the payload when the call says `send`, and a Header; or last the error.

        `number` is the run's own; `abort` takes it.
        """
        run = self._runs[number] = _Run(call, aborted=number in self._early_aborts)
        self._early_aborts.pop(number, None)
        try:
            async with contextlib.aclosing(run.feed.items(self._work(run, sent))) as items:
                async for item in items:
                    if isinstance(item, Produced):
                        if call.send:
                            yield await asyncio.to_thread(_ready_to_send, item.payload)
                        yield Header(produced_at=item.produced_at)
                        return
                    yield item
        finally:
            del self._runs[number]

    async def _work(self, run: _Run, sent: tuple[Payload, ...]) -> None:
        if run.aborted:
            raise RequestAborted(run.call.request_id)
        # Nothing suspends between this and the stage's own run, so that an abort finds either the flag or the stage.
        async for item in self._local.run(run.call, sent):
            run.feed.put(item)

    async def abort(self, number: int) -> None:
        """Make a run stop, or not begin when it has yet to arrive."""
        run = self._runs.get(number)
        if run is not None:
            run.aborted = True
            await self._local.abort(run.call.request_id, run.call.stage)
            return
        self._early_aborts[number] = None
        while len(self._early_aborts) > MAX_EARLY_ABORTS:
            del self._early_aborts[next(iter(self._early_aborts))]

    async def free(self, request_id: str, stage: str) -> None:
        """Drop a payload that was kept here."""
        self._local.free(request_id, stage)

    async def ping(self) -> Vitals:
        """Answers while stages work."""
        return Vitals(
            pid=os.getpid(),
            num_held=self._local.num_held(),
            num_running=len(self._runs),
            has_torch="torch" in sys.modules,
        )

    async def watch(self) -> None:
        """Never returns: the call fails when the process dies."""
        await asyncio.Event().wait()

    async def teardown(self) -> None:
        """Tear down all stages."""
        await self._local.teardown()


class _Run:
    """One run inside the actor."""

    def __init__(self, call: RunCall, aborted: bool) -> None:
        self.call = call
        self.aborted = aborted
        self.feed = _Feed()


class _Feed:
    """Items on their way out of the actor: the work goes on while Ray sends the ones before."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, item: Any) -> None:
        """Append one item."""
        self._queue.put_nowait(item)

    async def items(self, work: Coroutine[Any, Any, None]) -> AsyncGenerator[Any, None]:
        """What `work` puts; last the exception it raised, or None when it raised none."""
        task = asyncio.get_running_loop().create_task(self._watched(work))
        try:
            while True:
                item = await self._queue.get()
                yield item
                if item is None or isinstance(item, Exception):
                    return
        finally:
            task.cancel()

    async def _watched(self, work: Coroutine[Any, Any, None]) -> None:
        error: Exception | None = None
        try:
            await work
        except Exception as raised:  # the actor's edge: every end of the work is told
            raised.__cause__ = raised.__context__ = None
            error = raised.with_traceback(None)  # its frames would keep the inputs in memory
        self.put(error)


def _put_from_thread(loop: asyncio.AbstractEventLoop, feed: _Feed, item: Any) -> None:
    loop.call_soon_threadsafe(feed.put, item)


def _ready_to_send(payload: Payload) -> Payload:
    payload = object_store.to_host(payload)
    object_store.install()
    return payload


def _limit_threads(num_threads: int) -> None:
    """Kernel threads of this process; 0 leaves the libraries' default, where Ray would set 1."""
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
    if num_threads and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)
