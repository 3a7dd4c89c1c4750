"""The contract between a stage and the process that hosts it.

A stage is set up once, then runs many requests. `run` is an async iterator: any number of `Progress`, `TextDelta`
and `Preview` items and, last, one `Output`. Blocking work belongs into `ThreadedStage`, so that the event loop stays
free.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from omni.errors import RequestAborted
from omni.memory import MemoryPlan
from omni.messages import LoadProgress, Output, Payload, Preview, Progress, StageItem, Started
from omni.spec import StageSpec

T = TypeVar("T")
PROGRESS_SECONDS = 0.1
"""How long Progress and previews may wait for company; a tenth of a second looks immediate."""
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
    memory: MemoryPlan | None = None
    """Where the weights live, as planned; None: all on `device`."""


class StageCall(msgspec.Struct, frozen=True):
    """One run of a stage: its resolved inputs and the request's seed."""

    request_id: str
    inputs: dict[str, Any]
    seed: int
    preview_every: int = 0
    """Steps from one Preview to the next, for stages that can show what they are at; 0: none."""


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

    def is_blocked(self) -> bool:
        """Whether runs that nobody waits for any more hold all that the stage works with."""
        return False

    def peak_device_bytes(self) -> int:
        """The most device memory that this process has allocated so far, where the stage is; 0 on a CPU."""
        return 0

    async def teardown(self) -> None:
        """Release everything; called once, after the last run."""


class Work:
    """One request inside a ThreadedStage: how its blocking code reports, and learns that it shall stop."""

    def __init__(self, request_id: str, emit: Callable[[StageItem], None]) -> None:
        self.request_id = request_id
        self.emit = emit
        """Report Progress, a TextDelta or a Preview; from any thread."""
        self.stop = threading.Event()
        """Set when the request was aborted."""

    def raise_if_aborted(self) -> None:
        """Raise RequestAborted when the request was aborted; call it often."""
        if self.stop.is_set():
            raise RequestAborted(self.request_id)


class _Mailbox:
    """What a worker thread tells the event loop, in order.

    Waking the loop costs the worker a fraction of a millisecond of the interpreter each time, and a denoise step may
    take no longer than ten of them; so Progress or a Preview that follows other news within PROGRESS_SECONDS waits for
    company.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[StageItem | BaseException] = deque()
        self._items: asyncio.Queue[StageItem | BaseException] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        """Set while the loop will look by itself."""
        self._is_woken = False
        """The loop has been woken and has yet to look."""

    def put(self, item: StageItem | BaseException) -> None:
        """Tell the loop; from any thread."""
        self._waiting.append(item)
        if self._is_woken or (self._timer is not None and isinstance(item, (Progress, Preview))):
            return
        self._is_woken = True
        self._loop.call_soon_threadsafe(self._deliver)

    async def get(self) -> StageItem | BaseException:
        """The next item."""
        return await self._items.get()

    def close(self) -> None:
        """Nobody listens any more; on the loop's thread."""
        if self._timer is not None:
            self._timer.cancel()

    def _deliver(self) -> None:
        self._is_woken = False  # before it looks: what comes from now on wakes it again
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            self._timer = self._loop.call_later(PROGRESS_SECONDS, self._deliver)
        while self._waiting:
            self._items.put_nowait(self._waiting.popleft())


class ThreadedStage(Stage):
    """A stage whose work blocks: subclasses write plain `load` and `compute`, which run in worker threads.

    `num_workers` threads take requests in order of arrival. With one worker, a model sees one request at a time.
    """

    num_workers = 1

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix=f"stage-{context.name}")
        self._runs: dict[str, tuple[Work, Future[None], _Mailbox]] = {}
        self._left: set[Future[None]] = set()
        """Work that still holds a thread although its run is over."""

    def load(self, report: Report) -> None:
        """Blocking part of `setup`."""

    @abstractmethod
    def compute(self, call: StageCall, work: Work) -> Payload:
        """Blocking part of `run`; returns the payload. Raises RequestAborted soon after `work.stop` is set."""

    def unload(self) -> None:
        """Blocking part of `teardown`."""

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run a blocking function in a worker thread of the stage, when its turn comes; from any thread."""
        return self._pool.submit(function, *arguments)

    async def setup(self, report: Report) -> None:
        await asyncio.wrap_future(self.submit(self.load, report))

    async def run(self, call: StageCall) -> AsyncGenerator[StageItem, None]:
        items = _Mailbox(asyncio.get_running_loop())

        def compute() -> None:
            items.put(Started())
            try:
                items.put(Output(payload=self.compute(call, work)))
            except Exception as error:  # handed over to the event loop, which raises it again
                items.put(error)
            except BaseException as error:  # a SystemExit, say, would end the event loop
                items.put(RuntimeError(f"{type(error).__name__} in the stage's thread"))

        work = Work(call.request_id, items.put)
        future = self.submit(compute)
        self._runs[call.request_id] = (work, future, items)
        try:
            while not isinstance(item := await items.get(), Output):
                if isinstance(item, BaseException):
                    raise item
                yield item
            yield item
        finally:
            work.stop.set()
            if not future.cancel():
                self._left.add(future)
                future.add_done_callback(self._left.discard)
            self._runs.pop(call.request_id, None)
            items.close()

    def is_blocked(self) -> bool:
        return len(self._left) >= self.num_workers

    async def abort(self, request_id: str) -> None:
        if request_id in self._runs:
            work, future, items = self._runs[request_id]
            work.stop.set()
            if future.cancel():  # it was still waiting for its turn
                items.put(RequestAborted(request_id))

    async def teardown(self) -> None:
        for work, _, _ in self._runs.values():
            work.stop.set()
        running = {*(future for _, future, _ in self._runs.values()), *self._left}
        if running:  # with several workers, unloading would not wait for its turn behind them
            await asyncio.wait([asyncio.wrap_future(future) for future in running])
        await asyncio.wrap_future(self.submit(self.unload))
        self._pool.shutdown(wait=False, cancel_futures=True)
