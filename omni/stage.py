"""The contract between a stage and the process that hosts it.

A stage is set up once, then runs many requests. `run` is an async iterator: any number of `Progress` and `TextDelta`
items and, last, one `Output`. Blocking work belongs into `ThreadedStage`, so that the event loop stays free.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec

from omni.errors import RequestAborted
from omni.messages import LoadProgress, StageItem, Started
from omni.model_paths import resolve_model_path as resolve_model_path
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

    async def setup(self, report: Report) -> None:
        """Load whatever the stage needs; called once, before any run. Raise any exception to fail the start."""

    @abstractmethod
    def run(self, call: StageCall) -> AsyncGenerator[StageItem, None]:
        """Work on one request; may be called concurrently. Raise RequestAborted when `abort` was called for it."""

    async def abort(self, request_id: str) -> None:
        """Make the run of `request_id` stop soon; unknown ids are ignored."""

    async def teardown(self) -> None:
        """Release everything; called once, after the last run."""


class ThreadedStage(Stage):
    """A stage whose work blocks: subclasses write plain `load` and `compute`, which run in worker threads.

    `num_workers` threads take requests in order of arrival. With one worker, a model sees one request at a time.
    """

    num_workers = 1

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix=f"stage-{context.name}")
        self._runs: dict[str, _Run] = {}

    def load(self, report: Report) -> None:
        """Blocking part of `setup`."""

    @abstractmethod
    def compute(self, call: StageCall, stop: threading.Event) -> Iterator[StageItem]:
        """Blocking part of `run`. Check `stop` often; when it is set, raise RequestAborted."""

    def unload(self) -> None:
        """Blocking part of `teardown`."""

    async def setup(self, report: Report) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, self.load, report)

    async def run(self, call: StageCall) -> AsyncGenerator[StageItem, None]:
        run = _Run()

        def work() -> None:
            try:
                run.emit(Started())
                for item in self.compute(call, run.stop):
                    run.emit(item)
                run.emit(None)
            except BaseException as error:  # handed over to the event loop, which raises it again
                run.emit(error)

        self._runs[call.request_id] = run
        run.future = self._pool.submit(work)
        try:
            while (item := await run.items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            run.stop.set()
            run.future.cancel()
            self._runs.pop(call.request_id, None)

    async def abort(self, request_id: str) -> None:
        run = self._runs.get(request_id)
        if run is not None:
            run.stop.set()
            if run.future is not None and run.future.cancel():  # it was still waiting for its turn
                run.emit(RequestAborted(request_id))

    async def teardown(self) -> None:
        for run in self._runs.values():
            run.stop.set()
        await asyncio.get_running_loop().run_in_executor(self._pool, self.unload)
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Run:
    """One request inside a ThreadedStage: its stop flag and the way of its items back to the event loop."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.future: Future[None] | None = None
        self.items: asyncio.Queue[StageItem | BaseException | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def emit(self, item: StageItem | BaseException | None) -> None:
        """Hand one item to the event loop; from any thread."""
        self._loop.call_soon_threadsafe(self.items.put_nowait, item)


