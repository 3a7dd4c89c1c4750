"""One run of one stored job: claim, read the inputs, run the graph, write the outputs, finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Literal

import msgspec

from omni.api import AsyncOmni
from omni.errors import InputError, RunnerError, UsageError, one_line
from omni.inputs import build_request
from omni.messages import Aborted, Done, Event, Failed, Request, StagePreview
from omni.server.changes import Draft, Fence, to_json
from omni.server.files import FileStore
from omni.server.hub import Hub
from omni.server.jobs import Job, JobError, JobState, OutputFile, StoreError
from omni.server.observer import Observer
from omni.server.recorder import Recorder
from omni.server.service_settings import ServiceSettings
from omni.server.store import JobStore, Waiting
from omni.server.translate import Translator, job_error, output_data
from omni.server.values import read_inputs, sounds_of, store_outputs

Wish = Literal["abort", "restart", "lose"]
"""How a run shall end early: aborted, back in the queue, or without a trace since the job is another server's now."""
log = logging.getLogger(__name__)


class RunContext(msgspec.Struct, frozen=True):
    """What all runs of a service share."""

    store: JobStore
    files: FileStore
    hub: Hub
    settings: ServiceSettings
    observer: Observer


class JobRun:
    """Runs a job that waits, if this server gets it."""

    def __init__(self, context: RunContext, omni: AsyncOmni, waiting: Waiting, owner: str, entered_at: float) -> None:
        self._context = context
        self._omni = omni
        self._owner = owner
        self._entered_at = entered_at
        self.job_id = waiting.id
        self._waiting = waiting
        self._is_claimed = False
        self._wish: Wish | None = None
        self._reason = ""
        self._request_id = ""
        self._aborting: set[asyncio.Task[bool]] = set()

    @property
    def is_ours(self) -> bool:
        """Whether this server has claimed the job, and still has it as far as it knows."""
        return self._is_claimed and self._wish != "lose"

    def end(self, wish: Wish, reason: str) -> None:
        """Ask the run to end early; a stronger wish replaces a weaker one."""
        order = (None, "restart", "abort", "lose")
        if order.index(wish) > order.index(self._wish):
            self._wish, self._reason = wish, reason
            self._abort_request()

    async def run(self) -> None:
        """Until the job is over for this server. Raises nothing but cancellation."""
        context, waiting, began = self._context, self._waiting, time.monotonic()
        outcome = "lost"
        try:
            job = await context.store.claim(self.job_id, self._owner)
            if job is not None:
                self._is_claimed = True
                context.observer.started(waiting.id, waiting.graph, waiting.kind, began - self._entered_at)
                outcome = await self._run_claimed(job)
        except StoreError as error:  # the job is still ours in the store: upkeep puts it back into the queue
            log.warning("job %s: %s", self.job_id, error)
        finally:
            seconds = time.monotonic() - began
            context.observer.finished(waiting.id, waiting.graph, waiting.kind, outcome, seconds)

    async def _run_claimed(self, job: Job) -> str:
        context = self._context
        fence = Fence(job.id, self._owner, job.attempt)
        recorder = Recorder(
            context.store, context.hub, fence, context.settings.max_events, lambda: self.end("lose", "")
        )
        try:
            return await self._attempt(job, recorder)
        except StoreError:
            raise
        except RunnerError as error:
            if self._wish == "restart":
                return await self._restart(recorder)
            return await self._fail(recorder, JobError(cause=str(error), code="runner_failed"))
        except Exception as error:  # the job's edge: whatever goes wrong, it gets its end
            log.exception("job %s", job.id)
            return await self._fail(recorder, JobError(cause=one_line(error), code="internal"))

    async def _attempt(self, job: Job, recorder: Recorder) -> str:
        try:
            inputs = await self._context.files.call(read_inputs, self._context.files, job.inputs)
            preview_every = job.meta.get("preview_every", 0)
            request = build_request(
                self._omni.graph, inputs, job.seed, f"{job.id}-{job.attempt}", preview_every=preview_every
            )
        except FileNotFoundError as error:
            return await self._fail(recorder, JobError(cause=f"an input's file is gone: {error}", code="inputs_lost"))
        except InputError as error:  # the graph has changed since the job was accepted
            return await self._fail(recorder, JobError(cause=str(error), code="invalid_input"))
        final = await self._follow(request, recorder)
        await recorder.settle()
        if self._wish == "lose":
            return "lost"
        if isinstance(final, Done):
            return await self._done(recorder, final)
        if self._wish == "restart":
            return await self._restart(recorder)
        if isinstance(final, Failed):
            return await self._fail(recorder, job_error(final.error))
        reason = self._reason or (final.reason if isinstance(final, Aborted) else "aborted")
        return await self._finish(recorder, "aborted", [Draft("aborted", {"reason": reason})])

    async def _follow(self, request: Request, recorder: Recorder) -> Event | None:
        """Run the graph and record what it says; returns its final event, or None when it was not begun."""
        if self._wish is not None:
            return None
        translator = Translator(len(self._omni.graph.order))
        event: Event | None = None
        async with contextlib.aclosing(self._omni.stream(request)) as events:
            async for event in events:
                if not self._request_id:  # from here on the runner knows it
                    self._request_id = request.id
                    if self._wish is not None:
                        self._abort_request()
                self._context.observer.event(self.job_id, self._waiting.graph, event)
                if isinstance(event, StagePreview):
                    draft = await self._context.files.call(translator.translate, event)
                else:
                    draft = translator.translate(event)
                if draft is not None:
                    recorder.hear(draft, translator.progress)
        self._request_id = ""
        return event

    def _abort_request(self) -> None:
        if self._request_id:
            task = asyncio.get_running_loop().create_task(self._omni.abort(self._request_id))
            self._aborting.add(task)
            task.add_done_callback(self._aborting.discard)

    # endings ------------------------------------------------------------------------------------------------------

    async def _restart(self, recorder: Recorder) -> str:
        await recorder.settle()
        events = await self._context.store.requeue(recorder.fence, self._reason)
        self._context.hub.publish(events)
        if events is None:
            return "lost"
        return "aborted" if events[-1].is_final else "restarted"

    async def _done(self, recorder: Recorder, final: Done) -> str:
        files, job_id = self._context.files, self.job_id
        sounds = sounds_of(self._omni.graph)
        try:
            outputs = await files.call(store_outputs, files, job_id, final.outputs, sounds)
        except (UsageError, StoreError) as error:
            return await self._fail(recorder, JobError(cause=str(error), code="output_failed"))
        drafts = [Draft("output", output_data(job_id, output)) for output in outputs]
        drafts.append(Draft("done", {"seconds": final.seconds}))
        outcome = await self._finish(recorder, "done", drafts, outputs=outputs)
        if outcome == "lost":
            await files.call(files.remove, [output.blob for output in outputs if output.blob])
        return outcome

    async def _fail(self, recorder: Recorder, error: JobError) -> str:
        await recorder.settle()
        return await self._finish(recorder, "failed", [Draft("failed", {"error": to_json(error)})], error=error)

    async def _finish(
        self,
        recorder: Recorder,
        state: JobState,
        drafts: list[Draft],
        outputs: tuple[OutputFile, ...] = (),
        error: JobError | None = None,
    ) -> str:
        store = self._context.store
        events = await store.finish(recorder.fence, state, drafts, outputs=outputs, error=error)
        self._context.hub.publish(events)
        return "lost" if events is None else state
