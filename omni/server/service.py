"""The job service: takes orders, stores jobs, runs them in turn, and tells what happens to them.

`submit` is for jobs that survive; `stream` for a request that lives as long as its connection. Both go through the same
queue. Everything runs on one event loop; the store and the file store have threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from omni.api import AsyncOmni, Result, ResultBuilder
from omni.errors import InputError, OmniError, RunnerError
from omni.graph import nearest
from omni.inputs import build_request
from omni.messages import Event, Final, Queued, Request
from omni.server.dispatcher import Dispatcher
from omni.server.fair_queue import Entry
from omni.server.files import FileStore
from omni.server.hub import Hub, follow
from omni.server.jobs import IdempotencyConflict, Job, JobEvent, JobOrder, OutputFile, ServiceError, new_job_id
from omni.server.observer import Observer, Observers
from omni.server.run import RunContext
from omni.server.service_settings import ServiceSettings
from omni.server.store import JobStore
from omni.server.values import check_plain, digest_of, store_inputs
from omni.server.webhook import CheckAddress, RenderJob, plain_job
from omni.server.worker import Worker

MAX_PRIORITY = 100
MAX_KEY_CHARACTERS = 255
DELETE_SECONDS = 10.0
"""How long a deleted job may take to stop, before it is removed all the same."""


class Service:
    """Graphs as a service. `start` starts the graphs, `stop` stops them.

    `check_address(url)` says to which IP address a webhook may go, or raises InputError; without it webhooks are
    refused. `render_job` makes the JSON that a webhook carries.
    """

    def __init__(
        self,
        graphs: Mapping[str, AsyncOmni],
        store: JobStore,
        files: FileStore,
        settings: ServiceSettings | None = None,
        *,
        check_address: CheckAddress | None = None,
        render_job: RenderJob = plain_job,
    ) -> None:
        self.graphs = dict(graphs)
        self.settings = settings or ServiceSettings()
        self.store = store
        self.files = files
        self._observers = Observers()
        self._hub = Hub()
        self._clearing: set[asyncio.Task[None]] = set()
        self._dispatcher = Dispatcher(self.graphs, self.settings)
        self._check_address = check_address
        context = RunContext(store, files, self._hub, self.settings, self._observers)
        self._worker = Worker(context, self.graphs, self._dispatcher, check_address, render_job)

    # life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all graphs, then take up the jobs that wait. Raises StageSetupError, RunnerError or StoreError."""
        await self.files.call(self.files.mark, self.store.store_id)
        try:
            async with asyncio.TaskGroup() as group:
                for omni in self.graphs.values():
                    group.create_task(omni.start())
        except BaseExceptionGroup as failures:
            await self._stop_graphs()
            raise failures.exceptions[0] from None
        try:
            await self._worker.start()
        except BaseException:
            await self._stop_graphs()
            raise

    async def stop(self, drain_seconds: float = 30.0) -> None:
        """Take nothing new, let what runs go on for so long, put the rest back into the queue, and stop the graphs.

        It is `finish`, then `close`; between them a web server ends its connections.
        """
        await self.finish(drain_seconds)
        await self.close()

    async def finish(self, drain_seconds: float = 30.0) -> None:
        """The first part of a stop: nothing runs any more and nobody listens, but jobs and files can be read."""
        try:
            await self._worker.stop(drain_seconds)
        finally:
            self._hub.close()

    async def close(self) -> None:
        """The last part of a stop: the graphs stop and the stores close. Who asks for a job then gets Draining."""
        await self._stop_graphs()
        await asyncio.to_thread(self.files.close)
        await asyncio.to_thread(self.store.close)

    async def _stop_graphs(self) -> None:
        await asyncio.gather(*(omni.stop() for omni in self.graphs.values()), return_exceptions=True)

    def drain(self) -> None:
        """Take nothing new from now on: `submit` and `stream` raise Draining. Jobs that wait stay in the store."""
        self._worker.drain()

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._dispatcher.draining

    def observe(self, observer: Observer) -> None:
        """Let an observer hear of all requests."""
        self._observers.members.append(observer)

    def waiting(self, graph: str) -> int:
        """Requests of a graph that wait, as this process knows."""
        return self._dispatcher.queue.waiting(graph)

    def running(self, graph: str) -> int:
        """Requests of a graph that run in this process."""
        return self._dispatcher.queue.running(graph)

    def check_room(self, graph: str, key: str) -> None:
        """Raise QueueFull or Draining when no further request of a graph and key can wait."""
        self._dispatcher.check(graph, key)

    @property
    def num_listeners(self) -> int:
        """Clients that listen to a job's events here."""
        return self._hub.num_listeners

    @property
    def num_events(self) -> int:
        """Events of jobs that this process has stored so far."""
        return self._hub.num_events

    # jobs ---------------------------------------------------------------------------------------------------------

    async def submit(self, order: JobOrder) -> Job:
        """Store a job and let it wait for its turn.

        Raises InputError, QueueFull, Draining, StoreError, or IdempotencyConflict when the idempotency key belongs to
        another order. The same key and order give the same job.
        """
        try:
            return await self._submit(order)
        except OmniError as error:
            self._observers.refused(order.graph, order.kind, type(error).__name__)
            raise

    async def _submit(self, order: JobOrder) -> Job:
        request = self._checked(order, new_job_id())
        webhook = await self._checked_webhook(order)
        digest = ""
        if order.idempotency_key is not None:
            digest = await self.files.call(digest_of, _body_of(order))
            if (known := await self._known(order, digest)) is not None:
                return known
        storing = asyncio.get_running_loop().create_task(self._store(order, request, digest, webhook))
        try:
            job = await asyncio.shield(storing)
        except asyncio.CancelledError:
            self._clear_up(storing, order.idempotency_key is not None)
            raise
        if job is not None:
            return job
        if (known := await self._known(order, digest)) is not None:  # an equal order came at the same time
            return known
        raise ServiceError(f"job {request.id} could not be stored; send it again")

    async def _store(self, order: JobOrder, request: Request, digest: str, webhook: str | None) -> Job | None:
        """Store the job of an order and let it wait. None when its idempotency key is taken."""
        with self._dispatcher.reserve(order.graph, order.key):
            inputs, size = await self.files.call(store_inputs, self.files, request.id, dict(request.inputs))
            job = Job(
                id=request.id,
                graph=order.graph,
                kind=order.kind,
                created_at=time.time(),
                inputs=inputs,
                seed=request.seed,
                priority=order.priority,
                key=order.key,
                meta=order.meta | ({"preview_every": order.preview_every} if order.preview_every else {}),
                idempotency_key=order.idempotency_key,
            )
            events = await self.store.insert(job, digest=digest, size=size, webhook=webhook)
            if events is not None:
                self._hub.publish(events)
                self._worker.take_up(job)
                return job
        await self.files.call(self.files.remove_folder, job.id)
        return None

    def _clear_up(self, storing: asyncio.Task[Job | None], is_named: bool) -> None:
        """The caller has left while its job was stored: nobody can ask for it, but by its idempotency key."""

        async def clear() -> None:
            with contextlib.suppress(OmniError):
                if (job := await storing) is not None and not is_named:
                    await self.abort(job.id, "the caller left before the job was stored")

        task = asyncio.get_running_loop().create_task(clear())
        self._clearing.add(task)
        task.add_done_callback(self._clearing.discard)

    async def get(self, job_id: str) -> Job | None:
        """A job of any server that shares the store."""
        return await self.store.get(job_id)

    async def list_jobs(
        self,
        kind: str | None = None,
        graph: str | None = None,
        key: str | None = None,
        limit: int = 20,
        after: str | None = None,
        order: str = "desc",
        state: str | None = None,
    ) -> list[Job]:
        """Jobs by time of creation, the newest first unless `order` is "asc"; `after` is the last one already seen."""
        filters = {"kind": kind, "graph": graph, "key": key, "state": state}
        given = {name: value for name, value in filters.items() if value is not None}
        return await self.store.list_jobs(given, limit=limit, after=after, descending=order != "asc")

    async def abort(self, job_id: str, reason: str = "aborted by the caller") -> bool:
        """Abort a job that waits or runs, on whatever server. False when there is none such.

        A running job is over a little later; its last event tells.
        """
        return await self._worker.abort(job_id, reason)

    async def delete(self, job_id: str) -> bool:
        """Abort a job if need be, and remove it with its files. False when there is none of that id."""
        if await self.abort(job_id, "deleted by the caller"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DELETE_SECONDS), contextlib.aclosing(self._events(job_id)) as events:
                    async for _ in events:
                        pass
        was_there = await self.store.delete([job_id]) > 0
        if was_there:
            await self.files.call(self.files.remove_folder, job_id)
        return was_there

    def events(self, job_id: str, after: int = 0) -> AsyncIterator[JobEvent]:
        """A job's events from number `after` + 1 on, stored ones and then live ones, up to the final one."""
        return self._events(job_id, after)

    def _events(self, job_id: str, after: int = 0) -> AsyncGenerator[JobEvent, None]:
        return follow(self.store, self._hub, job_id, after)

    async def open_output(self, job_id: str, name: str, index: int = 0) -> tuple[OutputFile, Path | bytes] | None:
        """One value of a job's output: what it is, and its local path or its bytes. None when there is none such."""
        job = await self.get(job_id)
        found = [o for o in job.outputs if (o.name, o.index) == (name, index)] if job is not None else []
        if not found:
            return None
        output = found[0]
        if output.text is not None:
            return output, output.text.encode()
        try:
            return output, await self.files.call(self.files.open_sync, output.blob)
        except FileNotFoundError:
            return None

    # requests that live as long as their connection ---------------------------------------------------------------

    async def stream(self, order: JobOrder, request: Request | None = None) -> AsyncGenerator[Event, None]:
        """The events of a request that is not stored; leaving the iterator aborts it.

        The first event is `Queued`, as soon as the order is accepted; before it InputError, QueueFull or Draining may
        be raised. `request` is the order's, when `prepare` has made it already.
        """
        try:
            request = request or self.prepare(order)
            self._dispatcher.check(order.graph, order.key)
        except OmniError as error:
            self._observers.refused(order.graph, order.kind, type(error).__name__)
            raise
        told, omni = self._observers, self.graphs[order.graph]
        entry = _entry_of(order, request.id)
        turn = self._dispatcher.join(entry)
        told.accepted(request.id, order.graph, order.kind)
        entered_at, began, outcome = time.monotonic(), 0.0, "aborted"
        try:
            yield Queued(request_id=request.id)
            await turn.wait()
            began = time.monotonic()
            told.started(request.id, order.graph, order.kind, began - entered_at)
            async with contextlib.aclosing(omni.stream(request)) as events:
                async for event in events:
                    told.event(request.id, order.graph, event)
                    if isinstance(event, Final):
                        outcome = type(event).__name__.lower()
                    if not isinstance(event, Queued):
                        yield event
        finally:
            turn.leave()
            told.finished(request.id, order.graph, order.kind, outcome, time.monotonic() - began if began else 0.0)

    async def generate(self, order: JobOrder) -> Result:
        """Run a request that is not stored to its end. Raises as `stream`, RequestFailed or RequestAborted."""
        request = self.prepare(order)
        omni = self.graphs[order.graph]
        builder = ResultBuilder(request, omni.loaded, omni.loads)
        async with contextlib.aclosing(self.stream(order, request)) as events:
            async for event in events:
                if (result := builder.add(event)) is not None:
                    return result
        raise RunnerError(f"request {request.id} ended without a final event")

    def prepare(self, order: JobOrder) -> Request:
        """The checked request of an order, without running it. Raises InputError."""
        return self._checked(order, order.request_id)

    # checks -------------------------------------------------------------------------------------------------------

    def _checked(self, order: JobOrder, request_id: str | None) -> Request:
        if order.graph not in self.graphs:
            served = ", ".join(sorted(self.graphs))
            raise InputError(f"unknown graph '{order.graph}'{nearest(order.graph, self.graphs)} (served: {served})")
        if not -MAX_PRIORITY <= order.priority <= MAX_PRIORITY:
            raise InputError(f"priority must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, not {order.priority}")
        for name, value in order.inputs.items():
            check_plain(name, value)
        graph = self.graphs[order.graph].graph
        return build_request(graph, order.inputs, order.seed, request_id, order.preview_every)

    async def _checked_webhook(self, order: JobOrder) -> str | None:
        """The webhook's address, if there is one. Raises InputError, also for an idempotency key that cannot be."""
        key = order.idempotency_key
        if key is not None and not (0 < len(key) <= MAX_KEY_CHARACTERS and key.isascii() and key.isprintable()):
            raise InputError(f"an idempotency key has 1 to {MAX_KEY_CHARACTERS} printable ASCII characters")
        address = order.meta.get("webhook")
        if address is None:
            return None
        if not isinstance(address, str) or not address.isprintable():
            raise InputError("webhook must be an address: https://HOST/PATH")
        if self._check_address is None:
            raise InputError("webhooks are switched off on this server; ask for the job's events instead")
        await self._check_address(address)
        return address

    async def _known(self, order: JobOrder, digest: str) -> Job | None:
        """The job of an equal order with the same idempotency key."""
        if order.idempotency_key is None:
            return None
        found = await self.store.find(order.key, order.idempotency_key)
        if found is None:
            return None
        job, other = found
        if other != digest:
            raise IdempotencyConflict(f"the idempotency key '{order.idempotency_key}' belongs to another request")
        return job


def _body_of(order: JobOrder) -> dict[str, Any]:
    """What must be equal in two orders of one idempotency key."""
    body = msgspec.structs.asdict(order)
    del body["idempotency_key"], body["request_id"]
    return body


def _entry_of(order: JobOrder, request_id: str) -> Entry:
    return Entry(
        id=request_id, graph=order.graph, key=order.key, priority=order.priority, age=(time.time(), request_id)
    )
