"""Runs the store's jobs in this process: takes them up, runs them in turn, and looks after them.

Its loop asks the store every `poll_seconds` for what other servers wrote, and puts back what dead ones left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from omni.api import AsyncOmni
from omni.server.changes import Draft, Fence, to_json
from omni.server.dispatcher import Dispatcher
from omni.server.fair_queue import Entry
from omni.server.jobs import Job, JobError, JobEvent, StoreError
from omni.server.leases import Lease
from omni.server.recorder import cancel
from omni.server.retention import Retention
from omni.server.run import JobRun, RunContext
from omni.server.store import QUEUE_LIMIT, Waiting
from omni.server.webhook import CheckAddress, RenderJob, Webhooks

END_SECONDS = 8.0
"""What runs get for their end after the drain, before they are cancelled; `omni serve` waits longer than that."""
STORE_SECONDS = 5.0
"""What each write of a stop may take."""
MAX_UNSTORED = 10
"""Attempts after which a job fails whose end could not be stored, though the rest of the store can be written."""
log = logging.getLogger(__name__)


class Worker:
    """The part of a Service that runs stored jobs."""

    def __init__(
        self,
        context: RunContext,
        graphs: Mapping[str, AsyncOmni],
        dispatcher: Dispatcher,
        check_address: CheckAddress | None,
        render_job: RenderJob,
    ) -> None:
        self._context = context
        self._graphs = graphs
        self._dispatcher = dispatcher
        self._kinds: dict[str, tuple[str, str]] = {}
        """Job that waits or runs here -> its graph and kind."""
        self._runs: dict[str, JobRun] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lease: Lease | None = None
        self._lost = False
        self._retention = Retention(context.store, context.files, context.settings)
        self._webhooks = Webhooks(context.store, context.settings, check_address, render_job)
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Register this server, and begin."""
        loop = asyncio.get_running_loop()
        self._lease = Lease(
            self._context.store,
            self._context.settings,
            lambda: _call_soon(loop, self._note_lost),
        )
        await self._lease.begin()
        await self._reap()
        await self._look()
        settings = self._context.settings
        self._loops = [
            loop.create_task(self._repeat("reaping", settings.heartbeat_seconds, self._reap)),
            loop.create_task(self._repeat("upkeep", settings.poll_seconds, self._look)),
            loop.create_task(self._repeat("retention", settings.sweep_seconds, self._retention.sweep)),
            loop.create_task(self._repeat("webhooks", settings.poll_seconds, self._webhooks.deliver)),
        ]

    def drain(self) -> None:
        """Start no further job; those that wait stay in the store."""
        self._dispatcher.draining = True
        for job_id in self._dispatcher.queue.waiting_ids() & self._kinds.keys():
            self._forget(job_id, "lost")

    async def stop(self, drain_seconds: float) -> None:
        """Drain, then put what still runs back into the queue."""
        self.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                await self._dispatcher.empty()
        self._dispatcher.refuse_waiting()
        for run in self._runs.values():
            run.end("restart", "the server was stopped")
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=END_SECONDS)
        await self._give_back()  # first of all: the process may be ended while it waits for what cannot be cancelled
        await cancel(*self._tasks.values(), *self._loops)
        self._loops.clear()
        await self._webhooks.close()
        if self._lease is not None:
            await self._give_back()  # what was claimed meanwhile
            lease, self._lease = self._lease, None
            with contextlib.suppress(StoreError, TimeoutError):
                async with asyncio.timeout(STORE_SECONDS):
                    await lease.end()

    async def _give_back(self) -> None:
        """Put all that the store says runs here back into the queue. What still goes on can write nothing any more."""
        if self._lease is None:
            return
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(STORE_SECONDS):
                for fence in await self._context.store.owned(self._lease.server_id):
                    events = await self._context.store.requeue(fence, "the server was stopped")
                    self._context.hub.publish(events)

    # jobs ---------------------------------------------------------------------------------------------------------

    def take_up(self, job: Job) -> None:
        """Let a job that was just stored wait for its turn."""
        self._take_up(Waiting(job.id, job.graph, job.key, job.priority, job.created_at, 0, job.kind))

    async def abort(self, job_id: str, reason: str) -> bool:
        """Abort a job that waits or runs, here or elsewhere."""
        store = self._context.store
        run = self._runs.get(job_id)
        if run is not None and run.is_ours:
            run.end("abort", reason)  # at once; the store keeps the wish for when this server dies before it is done
            if await store.ask_abort(job_id, reason) or run.is_ours:
                return True
        events = await store.abort_queued(job_id, reason)
        if events is not None:
            if self._dispatcher.queue.is_waiting(job_id):
                self._forget(job_id, "aborted")
            self._context.hub.publish(events)
            return True
        if run is not None:  # its claim is under way, here or elsewhere
            run.end("abort", reason)
        if await store.ask_abort(job_id, reason):
            return True
        events = await store.abort_queued(job_id, reason)  # it went back into the queue meanwhile
        self._context.hub.publish(events)
        return events is not None

    def _take_up(self, waiting: Waiting) -> None:
        if self._dispatcher.draining or waiting.id in self._dispatcher.queue:
            return
        self._kinds[waiting.id] = (waiting.graph, waiting.kind)
        self._context.observer.accepted(waiting.id, waiting.graph, waiting.kind)
        entry = Entry(
            id=waiting.id,
            graph=waiting.graph,
            key=waiting.key,
            priority=waiting.priority,
            age=(waiting.created_at, waiting.id),
            suspect=waiting.deaths > 0,
        )
        entered_at = time.monotonic()
        self._dispatcher.enter(entry, lambda: self._start(waiting, entered_at))

    def _forget(self, job_id: str, outcome: str) -> None:
        """A job that waits here does so no more."""
        self._dispatcher.withdraw(job_id)
        graph, kind = self._kinds.pop(job_id)
        self._context.observer.finished(job_id, graph, kind, outcome, 0.0)
        self._context.hub.wake(job_id)

    def _start(self, waiting: Waiting, entered_at: float) -> None:
        assert self._lease is not None
        run = JobRun(self._context, self._graphs[waiting.graph], waiting, self._lease.server_id, entered_at)
        self._runs[waiting.id] = run
        self._tasks[waiting.id] = asyncio.get_running_loop().create_task(self._run(run))

    async def _run(self, run: JobRun) -> None:
        try:
            await run.run()
        finally:
            for table in (self._runs, self._tasks, self._kinds):
                table.pop(run.job_id, None)
            self._dispatcher.leave(run.job_id)

    # upkeep -------------------------------------------------------------------------------------------------------

    async def _repeat(self, name: str, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except StoreError as error:
                log.warning("%s: %s", name, error)
            except Exception:  # the edge of upkeep: the next round comes
                log.exception("%s", name)

    async def _look(self) -> None:
        """One look at the store."""
        store, lease = self._context.store, self._lease
        if lease is None:
            return
        if self._lost:
            await self._begin_anew(lease)
        await self._put_back_orphans(lease)
        await self._look_for_listeners()
        for job_id, reason in (await store.asked_to_abort(lease.server_id)).items():
            if job_id in self._runs:
                self._runs[job_id].end("abort", reason)
        if not self._dispatcher.draining:
            await self._look_at_queue()

    async def _reap(self) -> None:
        if self._lease is not None:
            for events in await self._lease.reap():
                self._context.hub.publish(events)

    async def _look_for_listeners(self) -> None:
        """Wake those who follow jobs of other servers, when there is news."""
        wanted = {job_id: last for job_id, last in self._context.hub.positions().items() if job_id not in self._runs}
        if wanted:
            found = await self._context.store.positions(wanted)
            for job_id, last in wanted.items():
                if found.get(job_id) != last:
                    self._context.hub.wake(job_id)

    async def _look_at_queue(self) -> None:
        known = self._dispatcher.queue.waiting_ids() & self._kinds.keys()
        found = await self._context.store.waiting(self._graphs)
        for waiting in found:
            self._take_up(waiting)
        if len(found) < QUEUE_LIMIT:
            for job_id in known - {waiting.id for waiting in found}:
                if self._dispatcher.queue.is_waiting(job_id):  # aborted, deleted or taken by another server
                    self._forget(job_id, "lost")

    async def _put_back_orphans(self, lease: Lease) -> None:
        """Jobs that the store says run here, though they do not: their end could not be written."""
        for fence in await self._context.store.owned(lease.server_id):
            if fence.job_id not in self._runs:
                self._context.hub.publish(await self._put_back(fence))

    async def _put_back(self, fence: Fence) -> list[JobEvent] | None:
        """Back into the queue: a fault of the store is no death."""
        store, reason = self._context.store, "its end could not be stored"
        if fence.attempt < MAX_UNSTORED:
            return await store.requeue(fence, reason)
        error = JobError(cause=f"{reason} in {fence.attempt} attempts", remedy="see the server's log", code="unstored")
        return await store.finish(fence, "failed", [Draft("failed", {"error": to_json(error)})], error=error)

    def _note_lost(self) -> None:
        """Others took this server for dead: its jobs are theirs."""
        self._lost = True
        for run in self._runs.values():
            run.end("lose", "")

    async def _begin_anew(self, lease: Lease) -> None:
        log.warning("server %s did not answer in time and was taken for dead; its jobs run again", lease.server_id)
        await lease.begin()
        self._lost = False


def _call_soon(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed
        loop.call_soon_threadsafe(work)
