"""The Ray actor: a thin asynchronous shell around LocalProcess, one per process of the plan.

`setup` and `run` are streaming generators. What happened to the stages comes as a last item, never as an exception,
so that only deaths and Ray's own troubles reach the driver as errors. A payload is an item of its own, which the
driver passes on as a reference without reading it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from omni.errors import OmniError, RequestAborted
from omni.messages import Message, Payload
from omni.runner.process import LocalProcess, Produced, RunCall, StageLaunch
from omni.transport import object_store


class Header(Message, frozen=True, kw_only=True):
    """The run has ended well; when `sent` the payload is the next and last item."""

    produced_at: float
    sent: bool


class Vitals(Message, frozen=True, kw_only=True):
    """How a process is."""

    pid: int
    num_held: int
    """Payloads held for readers in the same process."""
    num_running: int
    has_torch: bool


class StageActor:
    """Hosts the stages of one process. Ray makes an actor of it in omni.runner.ray_runner."""

    def __init__(self, launches: tuple[StageLaunch, ...], num_threads: int) -> None:
        _limit_threads(num_threads)
        self._local = LocalProcess(launches)
        self._runs: dict[int, _Run] = {}
        self._aborted: dict[int, None] = {}
        """Runs whose abort came before they did; in order, so that stale ones can be dropped."""

    async def setup(self) -> AsyncGenerator[Any, None]:
        """Loading progress, then None or the error."""
        feed = _Feed()

        async def work() -> None:
            await self._local.setup(feed.put)

        async for item in feed.items(work):
            yield item

    async def run(self, number: int, call: RunCall, *sent: Payload) -> AsyncGenerator[Any, None]:
        """Events, then a Header and the payload, or the error. `number` is the run's own, for `abort`."""
        run = self._runs[number] = _Run(call)
        run.aborted = number in self._aborted
        self._aborted.pop(number, None)
        try:
            async for item in run.feed.items(lambda: self._run(run, sent)):
                if isinstance(item, Produced):
                    yield Header(produced_at=item.produced_at, sent=call.send)
                    if call.send:
                        payload = await asyncio.to_thread(object_store.to_host, item.payload)
                        object_store.install()
                        yield payload
                    return
                yield item
        finally:
            del self._runs[number]

    async def _run(self, run: _Run, sent: tuple[Payload, ...]) -> None:
        if run.aborted:
            raise RequestAborted(run.call.request_id)
        # No suspension from here until the stage knows the request, so that an abort finds it.
        async for item in self._local.run(run.call, sent):
            run.feed.put(item)

    async def abort(self, number: int) -> None:
        """Make a run stop, now or when it arrives."""
        run = self._runs.get(number)
        if run is None:
            self._aborted[number] = None
            while len(self._aborted) > MAX_EARLY_ABORTS:
                del self._aborted[next(iter(self._aborted))]
            return
        run.aborted = True
        await self._local.abort(run.call.request_id, run.call.stage)

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


MAX_EARLY_ABORTS = 1000


class _Run:
    """One run inside the actor."""

    def __init__(self, call: RunCall) -> None:
        self.call = call
        self.aborted = False
        self.feed = _Feed()


class _Feed:
    """Items on their way out of the actor: work goes on while Ray sends the ones before."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, item: Any) -> None:
        """Append one item; from any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def items(self, work: Callable[[], Awaitable[None]]) -> AsyncGenerator[Any, None]:
        """What `work` puts, then the OmniError it raised, or None when it raised none."""

        async def whole() -> None:
            error: OmniError | None = None
            try:
                await work()
            except OmniError as raised:
                raised.__cause__ = raised.__context__ = None
                error = raised.with_traceback(None)  # its frames would hold the inputs
            self.put(error)

        task = self._loop.create_task(whole())
        try:
            while True:
                item = await self._queue.get()
                yield item
                if item is None or isinstance(item, OmniError):
                    return
        finally:
            task.cancel()


def _limit_threads(num_threads: int) -> None:
    """Kernel threads of this process; 0 leaves the libraries' default. Ray presets OMP_NUM_THREADS to 1."""
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
    if num_threads and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)
