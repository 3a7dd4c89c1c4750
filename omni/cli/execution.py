"""Carries out a job of `omni run`: all requests at once, each followed to its files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import traceback
from pathlib import Path

import msgspec

from omni.api import Result, ResultBuilder, Timings
from omni.cli.events import Written, encode_event
from omni.cli.job import Job
from omni.cli.outputs import PRINTED
from omni.cli.progress import View
from omni.errors import OmniError, RequestAborted, RequestFailed, UsageError
from omni.files import items_of, kind_of
from omni.messages import LoadProgress, Message, Request


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one request ended: texts, files and timings, or an error."""

    label: str
    """`2/4 ` when there are several requests, else empty."""
    seed: int
    texts: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    timings: Timings | None = None
    error: OmniError | None = None
    details: str = ""
    """Where a fault of ours happened."""


class Execution:
    """Runs a job and tells how it comes on: to `view`, and as JSON lines on stdout with `events`."""

    def __init__(self, view: View, events: bool) -> None:
        self._view = view
        self._events = events
        self._lock = threading.Lock()

    def loading(self, progress: LoadProgress) -> None:
        """Takes loading progress, from any thread."""
        self._view.loading(progress)
        self._print(progress)

    async def run(self, job: Job) -> list[Outcome]:
        """Load the graph, then run all requests. A failed request does not keep the others from being written."""
        self._view.labels = job.labels()
        async with job.omni:
            work = [self._run_one(job, number) for number in range(len(job.requests))]
            ends = await asyncio.gather(*work, return_exceptions=True)
            return [self._outcome(request, end) for request, end in zip(job.requests, ends, strict=True)]

    def _outcome(self, request: Request, end: Outcome | BaseException) -> Outcome:
        """The outcome of a request, also when it ended with a fault of ours: that is not the others' fault."""
        if isinstance(end, Outcome):
            return end
        if not isinstance(end, Exception):
            raise end
        error = end if isinstance(end, OmniError) else OmniError(f"{type(end).__name__}: {end}")
        label = self._view.labels.get(request.id, "")
        return Outcome(label=label, seed=request.seed, error=error, details="".join(traceback.format_exception(end)))

    async def _run_one(self, job: Job, number: int) -> Outcome:
        request = job.requests[number]
        label = self._view.labels.get(request.id, "")
        try:
            result = await self._follow(job, request)
            files = await asyncio.to_thread(job.outputs.write, number, result.outputs, job.metadata[number])
        except RequestFailed as error:
            return Outcome(label=label, seed=request.seed, error=error.error)
        except (RequestAborted, UsageError) as error:
            return Outcome(label=label, seed=request.seed, error=error)
        self._print(Written(request_id=request.id, seed=request.seed, files=[str(file) for file in files]))
        texts = texts_of(result)
        return Outcome(label=label, seed=request.seed, texts=texts, files=tuple(files), timings=result.timings)

    async def _follow(self, job: Job, request: Request) -> Result:
        builder = ResultBuilder(request, job.omni.loaded, job.omni.loads)
        result = None
        async with contextlib.aclosing(job.omni.stream(request)) as events:
            async for event in events:
                self._view.event(event)
                self._print(event)
                result = builder.add(event) or result
        assert result is not None, "the last event is final"
        return result

    def _print(self, event: Message) -> None:
        if self._events:
            line = f"{encode_event(event)}\n"
            with self._lock:
                sys.stdout.write(line)
                sys.stdout.flush()


def texts_of(result: Result) -> tuple[str, ...]:
    """The outputs that are printed: text as it is, JSON on one line."""
    items = [item for value in result.outputs.values() for item in items_of(value) if kind_of(item) in PRINTED]
    return tuple(
        item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, default=repr) for item in items
    )
