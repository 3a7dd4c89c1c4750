"""The driver's view of one Ray actor: brings it up, runs stages on it, and replaces it after its death."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from omni.errors import OmniError, RequestAborted, StageDiedError, StageError, StageSetupError, one_line
from omni.messages import Event, LoadProgress, Payload
from omni.runner.actor import SETUP, RunEnd, RunMessage, StageActor, Vitals
from omni.runner.process import Collected, Delivered, RunCall, StageLaunch, StageProcess, Value
from omni.stage import Report
from omni.transport import object_store
from omni.transport.payload import num_bytes

MAX_CONCURRENCY = 10_000
"""Calls that an actor takes at once: high, so that aborts and pings never wait for runs."""
START_SECONDS = 120.0
"""What a process may take to start, on top of its stages' setup deadlines."""
TEARDOWN_SECONDS = 2.0
"""What the stages of an actor may take to release what they hold; then it is killed."""
PING_SECONDS = 10.0
NEXT_REQUEST = "ask again: the next request gets a new process"
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


class DriverPayload:
    """A payload made in the driver, or a large value of a request.

    It goes into the object store once, when the first actor is to read it.
    """

    def __init__(self, payload: Any) -> None:
        self.payload = payload
        self._stored: asyncio.Task[Any] | None = None

    async def to_send(self) -> Any:
        """The packed payload or its ObjectRef. Raises TypeError for what cannot cross processes."""
        if self._stored is None:
            packed = object_store.pack(self.payload)
            if packed is not None:
                return packed
            self._stored = asyncio.create_task(asyncio.to_thread(_put, self.payload))
        return await asyncio.shield(self._stored)


class ActorProcess(StageProcess):
    """One actor and its successors. `options` are Ray's, for resources and placement."""

    def __init__(self, name: str, launches: tuple[StageLaunch, ...], num_threads: int, options: dict[str, Any]) -> None:
        self.name = name
        self._launches = launches
        self._num_threads = num_threads
        self._options = options
        self._life: _Life | None = None
        """None until it is set up, and again after its death."""
        self._building: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._runs: dict[tuple[str, str], int] = {}
        self._waiting: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._kept: set[tuple[str, str]] = set()

    # Life and death -----------------------------------------------------------------------------------------------

    async def setup(self, report: Report) -> None:
        self._building = asyncio.create_task(self._build(report))
        await self._building

    async def ready(self, request_id: str, stage: str) -> None:
        if self._life is not None:
            return
        building = self._replace()
        aborted = self._waiting[request_id, stage] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait((building, aborted), return_when=asyncio.FIRST_COMPLETED)
            if aborted.done():
                raise RequestAborted(request_id)
            building.result()
        finally:
            del self._waiting[request_id, stage]

    def _replace(self) -> asyncio.Task[None]:
        """Start a process in place of the one that died, once."""
        if self._building is None or self._building.done():
            self._building = asyncio.create_task(self._build(lambda progress: None))
            self._building.add_done_callback(lambda task: task.cancelled() or task.exception())  # none may wait for it
        return self._building

    async def _build(self, report: Report) -> None:
        """Start the process and load its stages. Raises StageSetupError; then the process is gone again."""
        stage = self._launches[0].context.name
        seconds = START_SECONDS + max(launch.context.spec.timeouts.setup_seconds for launch in self._launches)
        life: _Life | None = None
        listening: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(seconds):
                life = _Life(await asyncio.to_thread(self._create))
                listening = asyncio.create_task(self._listen(life))
                await _set_up(life, report)
        except BaseException as error:
            if listening is not None:
                listening.cancel()
            if life is not None:
                _kill(life.actor)
            if isinstance(error, TimeoutError):
                remedy = f"raise stages.{stage}.timeouts.setup_seconds, or see whether the cluster has room for it"
                raise StageSetupError(stage, f"its process was not ready after {seconds:g} s", remedy) from error
            if isinstance(error, RayError):
                raise StageSetupError(stage, *describe_death(error), details=str(error)) from error
            raise
        self._life, self._listening = life, listening

    def _create(self) -> Any:
        remote = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=MAX_CONCURRENCY, **self._options)
        return remote(StageActor).remote(self._launches, self._num_threads)

    async def _listen(self, life: _Life) -> None:
        """Hand out the actor's events. They end with its death, which is noticed so at once, also when nothing runs."""
        with contextlib.suppress(RayError):
            async for ref in life.actor.events.remote():
                for number, item in pickle.loads(ray.get(ref)):  # it is here; `await` would cost a turn of the loop
                    if number in life.inboxes:
                        life.inboxes[number].put_nowait(item)
        life.is_silent = True
        self._bury(life)
        for inbox in life.inboxes.values():
            inbox.put_nowait(None)

    def _bury(self, life: _Life) -> None:
        if self._life is life:
            self._life = None
            self._kept.clear()
        _kill(life.actor)

    async def give_up(self, stage: str) -> None:
        if self._life is not None:
            self._life.stuck_stage = stage
            self._bury(self._life)

    async def teardown(self) -> None:
        for task in (self._building, self._listening):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        life, self._life = self._life, None
        if life is not None:
            with contextlib.suppress(RayError, TimeoutError):
                await asyncio.wait_for(life.actor.teardown.remote(), TEARDOWN_SECONDS)
            _kill(life.actor)

    # Runs ---------------------------------------------------------------------------------------------------------

    async def run(self, call: RunCall, sent: tuple[Any, ...]) -> AsyncGenerator[Event | Delivered, None]:
        life, key = self._life, (call.request_id, call.stage)
        if life is None:
            raise StageDiedError(call.stage, "its process died", NEXT_REQUEST)
        number = self._runs[key] = next(self._numbers)
        if call.keep:
            self._kept.add(key)
        life.inboxes[number] = asyncio.Queue()
        result: Any = None
        end: RunEnd | None = None
        delivered = False
        try:
            result = await _submit(life.actor, number, call, sent)
            async with contextlib.aclosing(_hear(life, number, result)) as items:
                async for item in items:
                    if isinstance(item, RunEnd):
                        end = item
                    else:
                        yield item
                    del item
            result = None
            assert end is not None, "the end comes last, or an error"
            payload: Any = end.packed
            if end.is_large:
                written, payload = life.actor.take.options(num_returns=2).remote(number)
                await written
            for event in end.events:
                yield event
            failure, produced_at, end = end.error, end.produced_at, None
            if failure is not None:
                try:
                    raise failure
                finally:
                    del failure  # error and frame would keep each other alive, and `sent` with them
            delivered = True
            yield Delivered(process=self.name, produced_at=produced_at, ref=payload)
        except RayError as error:
            raise self._translate(call, life, error) from error
        finally:
            del self._runs[key], life.inboxes[number]
            if result is not None:
                life.actor.abandon.remote(number)
            if not delivered:  # nobody will free what a failed run has kept
                self.free(call.request_id, call.stage)

    def _translate(self, call: RunCall, life: _Life, error: RayError) -> OmniError:
        """What Ray's error means for the run."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, (*DEATHS, ObjectLostError)):
                return lost_input(call.stage, error)
            what = f"its payload cannot cross processes: {one_line(cause)}"
            return StageError(call.stage, what, details=str(error))
        if isinstance(error, DEATHS):
            self._bury(life)
            what, remedy = describe_death(error)
            if life.stuck_stage:
                what = f"its process was killed because a run of stage '{life.stuck_stage}' did not stop in time"
            return StageDiedError(call.stage, what, remedy, details=str(error))
        return StageError(call.stage, one_line(error))

    def offer(self, value: Any) -> DriverPayload | None:
        return DriverPayload(value) if num_bytes(value) > object_store.SMALL_BYTES else None

    async def abort(self, request_id: str, stage: str) -> None:
        waiting = self._waiting.get((request_id, stage))
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
        number = self._runs.get((request_id, stage))
        if number is not None and self._life is not None:
            with contextlib.suppress(RayError):
                await self._life.actor.abort.remote(number)

    async def fetch(self, ref: Any) -> Payload:
        try:
            payload = await read(ref)
        except RayError as error:
            raise StageError(self.name, f"its payload cannot be read: {one_line(error)}", details=str(error)) from error
        return payload if isinstance(ref, object_store.Packed) else await asyncio.to_thread(object_store.own, payload)

    def free(self, request_id: str, stage: str) -> None:
        if (request_id, stage) in self._kept and self._life is not None:
            self._kept.discard((request_id, stage))
            with contextlib.suppress(RayError):
                self._life.actor.free.remote(request_id, stage)

    async def check(self, stage: str) -> str:
        if self._life is None:
            self._replace()
            return "its process died, and another one starts"
        try:
            await self.ping()
        except RayError as error:
            return describe_death(error)[0]
        return ""

    async def ping(self) -> Vitals:
        """How the process is. Raises RayError when it is dead, TimeoutError when it does not answer."""
        assert self._life is not None, "the process is not up"
        answer: Awaitable[Vitals] = self._life.actor.ping.remote()
        return await asyncio.wait_for(answer, PING_SECONDS)


class _Life:
    """One actor, from its creation to its death."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.inboxes: dict[int, asyncio.Queue[Event | LoadProgress | None]] = {}
        """Number of a run -> its events."""
        self.is_silent = False
        """No further events will come."""
        self.stuck_stage = ""
        """The stage whose run did not stop, so that the actor was killed."""


async def _hear(life: _Life, number: int, result: Any) -> AsyncGenerator[Any, None]:
    """What a run (events) or the setup (LoadProgress) tells as it goes on, then its RunEnd.

    Raises RayError when the process died or the payload could not be written.
    """
    inbox, loop = life.inboxes[number], asyncio.get_running_loop()
    ended: Future[Any] = result.future()
    ended.add_done_callback(lambda _: loop.call_soon_threadsafe(inbox.put_nowait, None))
    num_events = 0
    end: RunEnd | None = None
    # Events may come after the end.
    while end is None or (num_events < end.num_streamed and not life.is_silent):
        item = await inbox.get()
        if item is not None:
            num_events += 1
            yield item
        elif ended.done():  # None: the run has ended, or the actor is silent
            end = pickle.loads(ended.result())
    yield end


async def _set_up(life: _Life, report: Report) -> None:
    """Set up the stages of an actor. Raises what stopped it, RayError, and what `report` raises."""
    life.inboxes[SETUP] = asyncio.Queue()
    async with contextlib.aclosing(_hear(life, SETUP, life.actor.setup.remote())) as items:
        async for item in items:
            for progress in item.events if isinstance(item, RunEnd) else (item,):
                report(progress)
    del life.inboxes[SETUP]
    assert isinstance(item, RunEnd), "the end comes last, or an error"
    if item.error is not None:
        raise item.error


async def read(ref: Any) -> Payload:
    """A payload that an actor delivered, in the driver. Raises RayError."""
    payload: Payload = ref.unpack() if isinstance(ref, object_store.Packed) else await ref
    return payload


async def _submit(actor: Any, number: int, call: RunCall, sent: tuple[Any, ...]) -> Any:
    """Send a run off; the reference of its end. What is large is pickled in a thread."""
    try:
        items = [await item.to_send() if isinstance(item, DriverPayload) else item for item in sent]
        packed = tuple(item if isinstance(item, object_store.Packed) else None for item in items)
        arguments = [item for item in items if not isinstance(item, object_store.Packed)]
        message = RunMessage(number=number, call=call, sent=packed)
        if any(isinstance(source, (Value, Collected)) for source in call.inputs.values()):
            small = object_store.pack(message)
            data = small.data if small is not None else await asyncio.to_thread(_put, message)
        else:  # nothing of the caller's own, so plain pickle will do, which is much quicker
            data = pickle.dumps(message)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise StageError(call.stage, f"one of its inputs cannot cross processes: {error}") from error
    return actor.run.remote(data, *arguments)


def _put(value: Any) -> Any:
    """Store a value of the driver; blocks."""
    value = object_store.to_host(value)
    object_store.install()
    return ray.put(value)


def _kill(actor: Any) -> None:
    with contextlib.suppress(RayError):
        ray.kill(actor, no_restart=True)


def lost_input(stage: str, error: RayError) -> StageDiedError:
    """The error of a stage whose input is gone."""
    return StageDiedError(
        stage, "one of its inputs was lost with the process that made it", NEXT_REQUEST, details=str(error)
    )


def describe_death(error: RayError) -> tuple[str, str]:
    """How a process died, and what to do, from what Ray says."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return "its process was killed: the host ran out of memory", "use a smaller model or dtype, or more memory"
    if isinstance(error, NodeDiedError) or "node has died" in text:
        return "the node of its process went away", "see whether the node is up"
    return "its process died", NEXT_REQUEST
