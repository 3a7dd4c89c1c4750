"""The Ray actor: a thin asynchronous shell around LocalProcess, one per process of the plan.

A run is one plain call, which returns how it ended. A small payload comes along; a large one is fetched by `take`, as
an object of its own, which the driver passes on as a reference without reading it. Events go off in batches through
one stream per actor, `events`; what has not gone off when a run ends travels with its end, so that a quick stage costs
one message. A stage's failure is part of the end and no exception: only deaths and what cannot be sent reach the driver
as errors. Messages are pickled here, since Ray is slower at it than pickle.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import sys
import traceback
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from omni.errors import OmniError, RequestAborted, StageError, one_line
from omni.messages import Event, LoadProgress, Message, Payload
from omni.runner.process import LocalProcess, Produced, RunCall, StageLaunch
from omni.transport import object_store

MAX_EARLY_ABORTS = 1000
"""Aborts that came before their runs; most of these runs will come, and the oldest are forgotten."""

BATCH_SECONDS = 0.002
"""How long the first event of a batch waits for others."""
SETUP = -1
"""Stands for a run's number in the events of `setup`."""


class RunEnd(Message, frozen=True, kw_only=True):
    """How a run, or the setup, ended."""

    num_streamed: int
    """Events of the run that went through `events`; they may still be on their way."""
    events: tuple[Any, ...]
    """Those that did not, in order."""
    error: OmniError | None = None
    produced_at: float = 0.0
    packed: object_store.Packed | None = None
    """The payload, when someone elsewhere wants it and it is small."""
    is_large: bool = False
    """The payload waits for `take`."""


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
        self._large: dict[int, Payload] = {}
        self._outbox: list[tuple[int, Event | LoadProgress]] = []
        self._num_streamed: dict[int, int] = {}
        """Number of a run that goes on -> how many of its events have left through `events`."""
        self._has_mail = asyncio.Event()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Batches of (number of the run, event), for as long as the process lives: its end is the process's death."""
        while True:
            await self._has_mail.wait()
            await asyncio.sleep(BATCH_SECONDS)
            batch, self._outbox = self._outbox, []
            self._has_mail.clear()
            for number, _ in batch:
                if number in self._num_streamed:
                    self._num_streamed[number] += 1
            if batch:
                yield pickle.dumps(batch)

    async def setup(self) -> bytes:
        """Set up all stages, with LoadProgress in `events`; a pickled RunEnd."""
        loop = asyncio.get_running_loop()
        error: OmniError | None = None
        self._num_streamed[SETUP] = 0
        try:
            await self._local.setup(lambda progress: _call_from_thread(loop, self._put, SETUP, progress))
        except Exception as caught:  # the actor's edge
            error = _told(self._name, caught)
        # Models and modules stay for good. Looking through them again and again for garbage would hold up small hops.
        gc.collect()
        gc.freeze()
        return pickle.dumps(self._end(SETUP, error))

    async def run(self, data: bytes | RunMessage, *arguments: Payload) -> bytes:
        """Run one stage; a pickled RunEnd. `data` is a RunMessage, pickled."""
        message: RunMessage = pickle.loads(data) if isinstance(data, bytes) else data
        number, call = message.number, message.call
        run = self._runs[number] = _Run(call, aborted=number in self._early_aborts)
        self._num_streamed[number] = 0
        self._early_aborts.pop(number, None)
        produced, error = None, None
        try:
            others = iter(arguments)
            payloads = tuple(next(others) if packed is None else packed.unpack() for packed in message.sent)
            produced = await self._work(run, number, payloads)
        except Exception as caught:  # the actor's edge
            error = _told(call.stage, caught)
        finally:
            del self._runs[number]
            end = self._end(number, error)
        if produced is not None:
            packed = object_store.pack(produced.payload) if call.send else None
            is_large = call.send and packed is None
            if is_large and not run.abandoned:
                self._large[number] = produced.payload
            end = msgspec.structs.replace(end, produced_at=produced.produced_at, packed=packed, is_large=is_large)
        return pickle.dumps(end)

    def _end(self, number: int, error: OmniError | None) -> RunEnd:
        """How a run ended; its events that have not gone off come along."""
        events = tuple(event for owner, event in self._outbox if owner == number)
        self._outbox = [mail for mail in self._outbox if mail[0] != number]
        return RunEnd(num_streamed=self._num_streamed.pop(number), events=events, error=error)

    async def take(self, number: int) -> tuple[None, Payload]:
        """The large payload of a run that ended, once. The first result says that the second could be written."""
        return None, await asyncio.to_thread(_ready_to_send, self._large.pop(number))

    async def _work(self, run: _Run, number: int, sent: tuple[Payload, ...]) -> Produced | None:
        if run.aborted:
            raise RequestAborted(run.call.request_id)
        # Nothing suspends between this and the stage's own run, so that an abort finds either the flag or the stage.
        async with contextlib.aclosing(self._local.run(run.call, sent)) as items:
            async for item in items:
                if isinstance(item, Produced):
                    return item
                self._put(number, item)
        return None

    def _put(self, number: int, event: Event | LoadProgress) -> None:
        self._outbox.append((number, event))
        self._has_mail.set()

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

    async def abandon(self, number: int) -> None:
        """Nobody waits for the end of this run any more: stop it, and keep no payload of it."""
        self._large.pop(number, None)
        if number in self._runs:
            self._runs[number].abandoned = True
        await self.abort(number)

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

    async def teardown(self) -> None:
        """Tear down all stages."""
        await self._local.teardown()


class _Run:
    """One run inside the actor."""

    def __init__(self, call: RunCall, aborted: bool) -> None:
        self.call = call
        self.aborted = aborted
        self.abandoned = False


def _told(stage: str, error: Exception) -> OmniError:
    """The error as the driver hears of it, without its frames: they would keep the inputs in memory."""
    if not isinstance(error, OmniError):
        return StageError(stage, one_line(error), details="".join(traceback.format_exception(error)))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _call_from_thread(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    loop.call_soon_threadsafe(function, *arguments)


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
