"""The contract between a stage and the process that hosts it.

A stage is set up once, then runs many requests. `run` is an async iterator: any number of `Progress` and `TextDelta`
items and, last, one `Output`. Blocking work belongs into `ThreadedStage`, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from omni.errors import RequestAborted
from omni.messages import LoadProgress, StageItem
from omni.spec import StageSpec

Report = Callable[[LoadProgress], None]
"""Takes loading progress; safe to call from any thread."""


class StageContext(msgspec.Struct, frozen=True):
    """What a stage learns about its place."""

    name: str
    spec: StageSpec
    base_dir: str
    """Folder of the graph file; relative model paths start here."""
    device: str = "cpu"
    """`cpu` or `cuda` / `cuda:N`, as planned."""
    num_threads: int = 0
    """CPU threads for kernels; 0 leaves torch's default."""


class StageCall(msgspec.Struct, frozen=True):
    """One run of a stage: its resolved inputs and the request's seed."""

    request_id: str
    inputs: dict[str, Any]
    seed: int


class Stage(ABC):
    """What runs at a vertex of the graph."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    async def setup(self, report: Report) -> None:  # noqa: B027  (nothing to load is a fine default)
        """Load whatever the stage needs; called once, before any run. Raise any exception to fail the start."""

    @abstractmethod
    def run(self, call: StageCall) -> AsyncIterator[StageItem]:
        """Work on one request; may be called concurrently. Raise RequestAborted when `abort` was called for it."""

    async def abort(self, request_id: str) -> None:  # noqa: B027  (a stage of one quick step may ignore it)
        """Make the run of `request_id` stop soon; unknown ids are ignored."""

    async def teardown(self) -> None:  # noqa: B027
        """Release everything; called once, after the last run."""


class ThreadedStage(Stage):
    """A stage whose work blocks: subclasses write plain `load` and `compute`, which run in worker threads.

    `num_workers` threads take requests in order of arrival. With one worker, a model sees one request at a time.
    """

    num_workers = 1

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix=f"stage-{context.name}")
        self._stops: dict[str, threading.Event] = {}

    def load(self, report: Report) -> None:  # noqa: B027
        """Blocking part of `setup`."""

    @abstractmethod
    def compute(self, call: StageCall, stop: threading.Event) -> Iterator[StageItem]:
        """Blocking part of `run`. Check `stop` often; when it is set, raise RequestAborted."""

    def unload(self) -> None:  # noqa: B027
        """Blocking part of `teardown`."""

    async def setup(self, report: Report) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, self.load, report)

    async def run(self, call: StageCall) -> AsyncIterator[StageItem]:
        loop, stop = asyncio.get_running_loop(), threading.Event()
        items: asyncio.Queue[StageItem | BaseException | None] = asyncio.Queue()

        def emit(item: StageItem | BaseException | None) -> None:
            loop.call_soon_threadsafe(items.put_nowait, item)

        def work() -> None:
            try:
                if stop.is_set():
                    raise RequestAborted(call.request_id)
                for item in self.compute(call, stop):
                    emit(item)
                emit(None)
            except BaseException as error:  # handed over to the event loop, which raises it again
                emit(error)

        self._stops[call.request_id] = stop
        future = loop.run_in_executor(self._pool, work)
        try:
            while (item := await items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            future.cancel()
            self._stops.pop(call.request_id, None)

    async def abort(self, request_id: str) -> None:
        stop = self._stops.get(request_id)
        if stop is not None:
            stop.set()

    async def teardown(self) -> None:
        for stop in self._stops.values():
            stop.set()
        await asyncio.get_running_loop().run_in_executor(self._pool, self.unload)
        self._pool.shutdown(wait=False, cancel_futures=True)


def resolve_model_path(model: str, base_dir: str) -> str:
    """A model folder relative to the graph file becomes absolute; a hub id is returned as it is."""
    path = os.path.join(base_dir, os.path.expanduser(model))
    return os.path.abspath(path) if os.path.isdir(path) else model
