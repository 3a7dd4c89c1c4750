"""The driver's view of one Ray actor: brings it up, runs stages on it, and replaces it after its death."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from omni.errors import OmniError, RequestAborted, StageDiedError, StageError, StageSetupError
from omni.messages import Event, Payload
from omni.runner.actor import Header, RunMessage, StageActor, Vitals
from omni.runner.base import Delivered, StageProcess
from omni.runner.process import RunCall, StageLaunch, one_line
from omni.stage import Report
from omni.transport import object_store

MAX_CONCURRENCY = 1000
"""Calls that an actor takes at once: high, so that aborts and pings never wait for runs."""
START_SECONDS = 120.0
"""What a process may take to start, on top of its stages' setup deadlines."""
TEARDOWN_SECONDS = 2.0
"""What the stages of an actor may take to release what they hold; then it is killed."""
PING_SECONDS = 10.0
NEXT_REQUEST = "ask again: the next request gets a new process"
DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


class DriverPayload:
    """A payload made in the driver. It goes into the object store once, when the first actor is to read it."""

    def __init__(self, payload: Payload) -> None:
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
        self._watching: asyncio.Task[None] | None = None
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
        if self._building is None or self._building.done():
            self._building = asyncio.create_task(self._build(lambda progress: None))
        aborted = self._waiting[request_id, stage] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait((self._building, aborted), return_when=asyncio.FIRST_COMPLETED)
            if aborted.done():
                raise RequestAborted(request_id)
            self._building.result()
        finally:
            del self._waiting[request_id, stage]

    async def _build(self, report: Report) -> None:
        """Start the process and load its stages. Raises StageSetupError; then the process is gone again."""
        stage = self._launches[0].context.name
        seconds = START_SECONDS + max(launch.context.spec.timeouts.setup_seconds for launch in self._launches)
        actor = None
        try:
            async with asyncio.timeout(seconds):
                actor = await asyncio.to_thread(self._create)
                async for ref in actor.setup.remote():
                    for item in pickle.loads(await ref):
                        if isinstance(item, OmniError):
                            raise item
                        report(item)
        except BaseException as error:
            if actor is not None:
                _kill(actor)
            if isinstance(error, TimeoutError):
                remedy = f"raise stages.{stage}.timeouts.setup_seconds, or see whether the cluster has room for it"
                raise StageSetupError(stage, f"its process was not ready after {seconds:g} s", remedy) from error
            if isinstance(error, RayError):
                raise StageSetupError(stage, *describe_death(error), details=str(error)) from error
            raise
        self._life = _Life(actor)
        self._watching = asyncio.create_task(self._watch(self._life))

    def _create(self) -> Any:
        remote = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=MAX_CONCURRENCY, **self._options)
        return remote(StageActor).remote(self._launches, self._num_threads)

    async def _watch(self, life: _Life) -> None:
        """Notice a death at once, also when nothing runs, so that the next request meets a new process."""
        with contextlib.suppress(RayError):
            await life.actor.watch.remote()
        self._bury(life)

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
        for task in (self._building, self._watching):
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
        stream: Any = None
        try:
            stream = await _submit(life.actor, number, call, sent)
            async for ref in stream:
                for item in pickle.loads(ray.get(ref)):  # it is here; `await` would cost a turn of the event loop
                    if isinstance(item, Header):
                        payload = await _payload_of(item, stream)
                        stream = None
                        yield Delivered(process=self.name, produced_at=item.produced_at, ref=payload)
                        return
                    if isinstance(item, OmniError):
                        stream = None
                        try:
                            raise item
                        finally:
                            del item  # error and frame would keep each other alive, and `sent` with them
                    yield item
        except RayError as error:
            raise self._translate(call, life, error) from error
        finally:
            del self._runs[key]
            if stream is not None:
                with contextlib.suppress(RayError):
                    ray.cancel(stream)

    def _translate(self, call: RunCall, life: _Life, error: RayError) -> OmniError:
        """What Ray's error means for the run."""
        if isinstance(error, TaskCancelledError):
            return RequestAborted(call.request_id)
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
            self._life.actor.free.remote(request_id, stage)

    async def ping(self) -> Vitals:
        """How the process is. Raises RayError when it is dead, TimeoutError when it does not answer."""
        assert self._life is not None, "the process is not up"
        answer: Awaitable[Vitals] = self._life.actor.ping.remote()
        return await asyncio.wait_for(answer, PING_SECONDS)


class _Life:
    """One actor, from its setup to its death."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.stuck_stage = ""
        """The stage whose run did not stop, so that the actor was killed."""


async def _payload_of(header: Header, stream: Any) -> Any:
    """What is to be sent to readers: the packed payload, its reference, or None when nobody elsewhere reads it.

    Raises RayError when the payload could not be written.
    """
    if not header.follows:
        return header.packed
    # `async for` would fetch the payload; the plain iterator only waits until it exists.
    payload: Any = await asyncio.to_thread(next, stream, None)
    if await anext(stream, None) is None:  # the confirmation is missing, so the payload is an error
        await payload
    return payload


async def read(ref: Any) -> Payload:
    """A payload that an actor delivered, in the driver. Raises RayError."""
    payload: Payload = ref.unpack() if isinstance(ref, object_store.Packed) else await ref
    return payload


async def _submit(actor: Any, number: int, call: RunCall, sent: tuple[Any, ...]) -> Any:
    """Send a run off; its stream. What is large is pickled in a thread."""
    try:
        items = [await item.to_send() if isinstance(item, DriverPayload) else item for item in sent]
        packed = tuple(item if isinstance(item, object_store.Packed) else None for item in items)
        arguments = [item for item in items if not isinstance(item, object_store.Packed)]
        message = RunMessage(number=number, call=call, sent=packed)
        small = object_store.pack(message)
        data = small.data if small is not None else await asyncio.to_thread(_put, message)
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
