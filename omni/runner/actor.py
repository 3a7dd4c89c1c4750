"""The Ray actor: a thin asynchronous shell around LocalProcess, one per process of the plan.

`setup` and `run` are streaming generators of batches: whatever has happened since the last one went off. A stage's
failure is in the last batch and no exception, so that only deaths and what cannot be sent reach the driver as errors.
Batches and calls are pickled here, since Ray is slower at it than pickle.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import sys
import traceback
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from omni.errors import OmniError, RequestAborted, StageError
from omni.messages import Message, Payload
from omni.runner.process import LocalProcess, Produced, RunCall, StageLaunch, one_line
from omni.transport import object_store

MAX_EARLY_ABORTS = 1000
"""Aborts that came before their runs; most of these runs will come, and the oldest are forgotten."""


class Header(Message, frozen=True, kw_only=True):
    """Ends the last batch of a run that ended well."""

    produced_at: float
    packed: object_store.Packed | None
    """The payload, when someone elsewhere wants it and it is small."""
    follows: bool
    """The payload is the next item, which the driver passes on as a reference without reading it; the item after it
    is an empty batch, which says that the payload could be written."""


class RunMessage(Message, frozen=True, kw_only=True):
    """One call of `run`."""

    number: int
    """The run's own; `abort` takes it."""
    call: RunCall
    sent: tuple[object_store.Packed | None, ...]
    """The payloads that the call's ports index; those that are None come as arguments of their own, in order."""


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
        self._name = launches[0].context.name
        self._local = LocalProcess(launches)
        self._runs: dict[int, _Run] = {}
        self._early_aborts: dict[int, None] = {}

    async def setup(self) -> AsyncGenerator[bytes, None]:
        """Batches of LoadProgress; at the end of the last one the error, if there was one."""
        loop = asyncio.get_running_loop()
        feed = _Feed(self._name)

        async def work() -> None:
            await self._local.setup(lambda progress: _put_from_thread(loop, feed, progress))

        async with contextlib.aclosing(feed.batches(work())) as batches:
            async for batch in batches:
                yield pickle.dumps(batch)

    async def run(self, data: bytes | RunMessage, *arguments: Payload) -> AsyncGenerator[Any, None]:
        """Batches of events; at the end of the last one a Header or the error. `data` is a RunMessage, pickled."""
        message: RunMessage = pickle.loads(data) if isinstance(data, bytes) else data
        number, call = message.number, message.call
        run = self._runs[number] = _Run(call, aborted=number in self._early_aborts)
        self._early_aborts.pop(number, None)
        try:
            others = iter(arguments)
            payloads = tuple(next(others) if packed is None else packed.unpack() for packed in message.sent)
            async with contextlib.aclosing(run.feed.batches(self._work(run, payloads))) as batches:
                async for batch in batches:
                    if not isinstance(batch[-1], Produced):
                        yield pickle.dumps(batch)
                        continue
                    produced = batch.pop()
                    packed = object_store.pack(produced.payload) if call.send else None
                    follows = call.send and packed is None
                    batch.append(Header(produced_at=produced.produced_at, packed=packed, follows=follows))
                    yield pickle.dumps(batch)
                    if follows:
                        yield await asyncio.to_thread(_ready_to_send, produced.payload)
                        yield pickle.dumps([])
                    return
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
        self.feed = _Feed(call.stage)


class _Feed:
    """Items on their way out of the actor: the work goes on while Ray sends the ones before."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, item: Any) -> None:
        """Append one item."""
        self._queue.put_nowait(item)

    async def batches(self, work: Coroutine[Any, Any, None]) -> AsyncGenerator[list[Any], None]:
        """What `work` puts; the last item of the last batch is the OmniError it raised, if it did."""
        task = asyncio.get_running_loop().create_task(self._watched(work))
        try:
            at_end = False
            while not at_end:
                batch = [await self._queue.get()]
                await asyncio.sleep(0)  # what has just happened comes along
                while not self._queue.empty():
                    batch.append(self._queue.get_nowait())
                if at_end := batch[-1] is _END:
                    batch.pop()
                if batch:
                    yield batch
        finally:
            task.cancel()

    async def _watched(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OmniError as error:
            error.__cause__ = error.__context__ = None
            self.put(error.with_traceback(None))  # its frames would keep the inputs in memory
        except Exception as error:  # the actor's edge: every end of the work is told
            self.put(StageError(self._stage, one_line(error), details=traceback.format_exc()))
        self.put(_END)


_END = object()


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
