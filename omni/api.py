"""The Python driver API: `Omni` for plain code and threads, `AsyncOmni` for asyncio. Both do the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from omni.checkpoint import gather_facts
from omni.choices import RunnerChoice
from omni.errors import OmniError, PlanError, RequestAborted, RequestFailed, RunnerError
from omni.graph import Graph, base_type
from omni.hardware import load_hardware
from omni.inputs import build_request
from omni.load import LoadedGraph, load_graph
from omni.messages import (
    Aborted,
    Done,
    Event,
    Failed,
    HopFinished,
    LoadProgress,
    Request,
    StageFinished,
)
from omni.plan import Hardware, Plan, plan_graph
from omni.runner.base import Runner
from omni.spec import GraphSpec
from omni.stage import Report

T = TypeVar("T")
START_SECONDS = 3600.0
"""Upper bound of a start, above the stages' own setup deadlines."""
STOP_SECONDS = 60.0


class Timings(msgspec.Struct, frozen=True):
    """Where the time of a request went; seconds and bytes."""

    seconds: float
    """From acceptance to the final event."""
    stages: dict[str, StageFinished]
    hops: tuple[HopFinished, ...]
    loads: dict[str, LoadProgress] = {}
    """Stage -> how its loading ended, before the request: seconds, and peaks of memory."""


class Result:
    """What a finished request gave. `outputs` holds values by name; `result.image` is `result.outputs["image"]`.

    An output of images is a list of PIL images, text is str, video and audio are omni.media types.
    """

    def __init__(self, outputs: dict[str, Any], request: Request, timings: Timings, graph: LoadedGraph) -> None:
        self.outputs = outputs
        self.request = request
        self.seed = request.seed
        self.timings = timings
        self.graph = graph

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling look for these before `outputs` is there
            raise AttributeError(name)
        try:
            return self.__dict__["outputs"][name]
        except KeyError:
            raise AttributeError(f"no output '{name}'; this result has {', '.join(self.outputs)}") from None

    def __repr__(self) -> str:
        return f"Result(outputs={sorted(self.outputs)}, seed={self.seed}, seconds={self.timings.seconds:.3f})"


def build_runner(plan: Plan, address: str | None = None) -> Runner:
    """The runner that a plan asks for. Ray is imported only for a Ray plan."""
    if plan.runner == "inline":
        from omni.runner.inline import InlineRunner

        return InlineRunner(plan)
    from omni.runner.ray_runner import RayRunner

    return RayRunner(plan, address=address)


class ResultBuilder:
    """Collects a request's events into a Result."""

    def __init__(self, request: Request, graph: LoadedGraph, loads: Mapping[str, LoadProgress] = {}) -> None:
        self._request = request
        self._graph = graph
        self._loads = loads
        self._stages: dict[str, StageFinished] = {}
        self._hops: list[HopFinished] = []

    def add(self, event: Event) -> Result | None:
        """The Result on `Done`, else None. Raises RequestFailed or RequestAborted on the other final events."""
        match event:
            case StageFinished():
                self._stages[event.stage] = event
            case HopFinished():
                self._hops.append(event)
            case Failed():
                raise RequestFailed(event.request_id, event.error)
            case Aborted():
                raise RequestAborted(event.request_id, event.reason)
            case Done():
                timings = Timings(event.seconds, self._stages, tuple(self._hops), dict(self._loads))
                return Result(event.outputs, self._request, timings, self._graph)
        return None


class AsyncOmni:
    """A graph ready to run, for asyncio code.

    `graph` is a YAML file, a GraphSpec or a plain dict; `overrides` are `path=value` texts as of `--set`;
    `runner` overrides the planner's choice; `address` is that of an existing Ray cluster;
    `hardware` a preset or inventory file to plan for, instead of what this machine has;
    `base_dir` is where relative model folders start, for a graph that is no file.
    """

    def __init__(
        self,
        graph: str | Path | GraphSpec | dict[str, Any],
        *,
        overrides: Sequence[str] = (),
        base_dir: str | Path | None = None,
        runner: RunnerChoice = "auto",
        address: str | None = None,
        hardware: str | Hardware | None = None,
        report: Report = lambda progress: None,
    ) -> None:
        self.loaded: LoadedGraph = load_graph(graph, overrides, base_dir)
        self._address = address
        self._choice: RunnerChoice = runner
        self.planned = self._plan_ahead(hardware)
        """`plan`, or None while it is still to be made."""
        self._starting = asyncio.Lock()
        self._report = report
        self._runner: Runner | None = None
        self.loads: dict[str, LoadProgress] = {}

    @property
    def graph(self) -> Graph:
        """The checked graph."""
        return self.loaded.graph

    @property
    def plan(self) -> Plan:
        """What runs where, and why. On a cluster that is joined, it is made at the start, of the nodes there."""
        if self.planned is None:
            raise RunnerError("the plan is made when Omni starts, of the nodes of the Ray cluster that it joins")
        return self.planned

    @property
    def runner(self) -> Runner:
        """The runner, while Omni is started. Raises RunnerError before and after."""
        if self._runner is None:
            raise RunnerError("Omni is not started; use it as a context manager, or call start()")
        return self._runner

    def _plan_ahead(self, hardware: str | Hardware | None) -> Plan | None:
        """The plan, or None when it needs the nodes of a cluster that will be joined."""
        joins = hardware is None and bool(self._address or os.environ.get("RAY_ADDRESS")) and self._choice != "inline"
        try:
            plan = make_plan(self.graph, hardware, self._choice)
        except PlanError:
            if joins:
                return None
            raise
        return None if joins and plan.runner == "ray" else plan

    async def start(self) -> None:
        """Load all stages. Raises StageSetupError naming the stage that could not load."""
        async with self._starting:
            if self._runner is None:
                self._runner = await self._start()

    async def stop(self) -> None:
        """Abort what runs and release everything. Safe to call twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.stop()

    async def _start(self) -> Runner:
        async with contextlib.AsyncExitStack() as stack:
            if self.planned is None:
                from omni.runner.ray_runner import joined

                hardware = await stack.enter_async_context(joined(self._address))
                self.planned = make_plan(self.graph, hardware, self._choice)
            runner = build_runner(self.planned, self._address)
            await runner.start(self._hear)
            return runner

    def _hear(self, progress: LoadProgress) -> None:
        if progress.state == "ready":
            self.loads[progress.stage] = progress
        self._report(progress)

    def stop_seconds(self) -> float:
        """An upper bound of `stop`: what stages may take to stop, and to be torn down."""
        return STOP_SECONDS + max(spec.timeouts.abort_seconds for spec in self.graph.spec.stages.values())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    def request(
        self, *, seed: int | None = None, request_id: str | None = None, preview_every: int = 0, **inputs: Any
    ) -> Request:
        """A checked request, without running it; `preview_every` steps come a StagePreview. Raises InputError."""
        return build_request(self.graph, inputs, seed, request_id, preview_every)

    async def stream(self, request: Request | None = None, **fields: Any) -> AsyncGenerator[Event, None]:
        """The events of one request, or of `request(**fields)`; the last is final, and leaving early aborts it."""
        runner = self.runner
        request = request or self.request(**fields)
        async with contextlib.aclosing(runner.run(request)) as events:
            async for event in events:
                yield self._with_lists(event)

    async def generate(self, request: Request | None = None, **fields: Any) -> Result:
        """Run one request, or `request(**fields)`, to its end. Raises InputError, RequestFailed, RequestAborted."""
        request = request or self.request(**fields)
        builder = ResultBuilder(request, self.loaded, self.loads)
        async with contextlib.aclosing(self.stream(request)) as events:
            async for event in events:
                if (result := builder.add(event)) is not None:
                    return result
        raise RunnerError(f"request {request.id} ended without a final event")

    async def abort(self, request_id: str) -> bool:
        """Abort a running request. False when there is none of that id."""
        return self._runner is not None and await self._runner.abort(request_id)

    def _with_lists(self, event: Event) -> Event:
        """Image outputs are always lists, whether the stage gave one or several."""
        if not isinstance(event, Done):
            return event
        outputs = {
            name: [value] if self._output_type(name) == "image" and not isinstance(value, list) else value
            for name, value in event.outputs.items()
        }
        return msgspec.structs.replace(event, outputs=outputs)

    def _output_type(self, name: str) -> str:
        source = self.graph.outputs[name]
        return base_type(self.graph.ports[source.stage].outputs[source.port].type)


def make_plan(graph: Graph, hardware: str | Hardware | None = None, runner: RunnerChoice = "auto") -> Plan:
    """Plan a checked graph for `hardware` (a preset, an inventory file, or this machine when left out)."""
    if hardware is None or isinstance(hardware, str):
        hardware = load_hardware(hardware)
    return plan_graph(graph, hardware, gather_facts(graph), runner)


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where there is one (not on Windows): it wakes up quicker, and so do small hops."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop in this thread until it is stopped, then close it."""
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


class Omni:
    """A graph ready to run, for plain code: same arguments and methods as AsyncOmni; use from any thread.

    An event loop in a thread of its own does the work; `with Omni("graph.yaml") as omni: omni.generate(...)`.
    """

    def __init__(self, graph: str | Path | GraphSpec | dict[str, Any], **options: Any) -> None:
        self._omni = AsyncOmni(graph, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def plan(self) -> Plan:
        """What runs where, and why."""
        return self._omni.plan

    @property
    def graph(self) -> Graph:
        """The checked graph."""
        return self._omni.graph

    @property
    def runner(self) -> Runner:
        """The runner, while Omni is started; its methods belong to Omni's own event loop."""
        return self._omni.runner

    @property
    def loaded(self) -> LoadedGraph:
        """The graph with its file and merged document."""
        return self._omni.loaded

    def start(self) -> None:
        """Load all stages; see AsyncOmni.start."""
        with self._starting:
            self._start()

    def _start(self) -> None:
        if self._loop is not None:
            return
        self._loop = _new_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="omni-loop", daemon=True)
        self._thread.start()
        try:
            self._call(self._omni.start(), START_SECONDS)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Abort what runs and release everything. Safe to call twice."""
        if self._loop is None or self._thread is None:
            return
        try:
            self._call(self._omni.stop(), self._omni.stop_seconds())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_SECONDS)
            self._loop, self._thread = None, None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def request(self, **fields: Any) -> Request:
        """A checked request, without running it; see AsyncOmni.request."""
        return self._omni.request(**fields)

    def generate(self, request: Request | None = None, **fields: Any) -> Result:
        """Run one request to its end; see AsyncOmni.generate. An interrupt (Ctrl-C) aborts the request."""
        return self._call(self._omni.generate(request, **fields), None)

    def stream(self, request: Request | None = None, **fields: Any) -> Iterator[Event]:
        """The events of one request as they come; leaving the loop early aborts the request."""
        events = self._omni.stream(request, **fields)

        async def next_event() -> Event | None:
            return await anext(events, None)

        try:
            while (event := self._call(next_event(), None)) is not None:
                yield event
        finally:
            if self._loop is not None:
                self._call(events.aclose(), STOP_SECONDS)

    def abort(self, request_id: str) -> bool:
        """Abort a running request; see AsyncOmni.abort."""
        return self._call(self._omni.abort(request_id), STOP_SECONDS)

    def _call(self, work: Coroutine[Any, Any, T], seconds: float | None) -> T:
        """Run a coroutine on the loop's thread. Requests have no deadline here: their stages have their own."""
        if self._loop is None:
            work.close()
            raise RunnerError("Omni is not started; use `with Omni(...)`, or call start()")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except TimeoutError as error:
            if future.done():
                raise
            future.cancel()
            raise OmniError(f"no answer within {seconds:g} s") from error
        except BaseException:
            future.cancel()
            raise
