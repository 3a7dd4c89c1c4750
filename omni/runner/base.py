"""What both runners share: one task per request that feeds omni.flow and carries out its actions.

A runner is a set of processes (in the driver, or Ray actors) behind the small interface `StageProcess`. Everything
here runs on one event loop; nothing blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import msgspec

from omni.errors import RequestAborted, RunnerError, StageError, one_line
from omni.flow import AbortStage, Action, Finish, Flow, FreePayload, RunStage
from omni.graph import FromRequest, FromStage, Gather, Graph
from omni.messages import Aborted, Done, Event, Failed, Final, Payload, Queued, Request, StageStarted
from omni.plan import DRIVER, Plan
from omni.registry import find_kind_of
from omni.runner.process import Collected, Delivered, Port, RunCall, StageLaunch, StageProcess, Value, timeout_error
from omni.stage import Report, StageContext

FETCH_SECONDS = 600.0
"""How long reading a graph output out of its process may take."""


class _Use(msgspec.Struct, frozen=True):
    """What becomes of a stage's payload: the ports that are read, and whether they are read here or elsewhere."""

    ports: tuple[str, ...]
    keep: bool
    send: bool


class _RequestState:
    """The driver's side of one request."""

    def __init__(self, request: Request, graph: Graph) -> None:
        self.request = request
        self.flow = Flow(graph)
        self.payloads: dict[str, Delivered] = {}
        self.offered: dict[str, Any] = {}
        """Field of the request -> what processes elsewhere are sent for its value, or None; see StageProcess.offer."""
        self.runs: dict[str, asyncio.Task[None]] = {}
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.started_at = time.perf_counter()
        self.over = asyncio.Event()

    def hear(self, event: Event) -> None:
        """Tell the caller, one turn of the loop later, so that the next stages are sent off first."""
        asyncio.get_running_loop().call_soon(self.events.put_nowait, event)


class Runner(ABC):
    """Carries out a plan. Use as `async with`; `run` may be called for many requests at once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.graph = plan.graph
        self._processes: dict[str, StageProcess] = {}
        self._process_of = {stage.stage: stage.process for stage in plan.stages}
        self._uses = {stage: self._use_of(stage) for stage in self._process_of}
        self._requests: dict[str, _RequestState] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._running_on: dict[str, int] = dict.fromkeys(self._process_of, 0)
        self._stopping = False

    @abstractmethod
    async def _build_processes(self) -> dict[str, StageProcess]:
        """Process name -> process, not set up yet."""

    async def start(self, report: Report = lambda progress: None) -> None:
        """Bring up all processes in parallel. Raises StageSetupError or RunnerError; then everything is stopped."""
        try:
            self._processes = await self._build_processes()
            async with asyncio.TaskGroup() as group:
                for process in self._processes.values():
                    group.create_task(process.setup(report))
        except BaseException as error:
            await asyncio.shield(self.stop())
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise

    async def stop(self) -> None:
        """Abort what runs, then stop all processes. Safe to call twice."""
        self._stopping = True
        for state in list(self._requests.values()):
            self._carry_out(state, state.flow.abort("the runner was stopped"))
        waits = [state.over.wait() for state in self._requests.values()]
        if waits:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*waits), timeout=self._stop_grace())
        processes, self._processes = self._processes, {}
        await asyncio.gather(*(process.teardown() for process in processes.values()), return_exceptions=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> Runner:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of one request; the last one is final. Leaving the iterator early aborts the request."""
        if self._stopping or not self._processes:
            raise RunnerError("the runner is not running; use it as a context manager, or start() it")
        if request.id in self._requests:
            raise RunnerError(f"a request with id '{request.id}' is running already; ids must differ")
        state = _RequestState(request, self.graph)
        self._requests[request.id] = state
        state.hear(Queued(request_id=request.id))
        self._carry_out(state, state.flow.start())
        try:
            while True:
                event = await state.events.get()
                yield event
                if isinstance(event, Final):
                    return
        finally:
            self._carry_out(state, state.flow.abort("the caller left"))

    async def abort(self, request_id: str, reason: str = "aborted by the caller") -> bool:
        """Abort a request. False when there is none of that id, or it is over."""
        state = self._requests.get(request_id)
        if state is None or state.flow.finished:
            return False
        self._carry_out(state, state.flow.abort(reason))
        return True

    def num_requests(self) -> int:
        """How many requests are not over."""
        return len(self._requests)

    # carrying out actions -----------------------------------------------------------------------------------------

    def _carry_out(self, state: _RequestState, actions: list[Action]) -> None:
        finish: Finish | None = None
        freed: list[str] = []
        for action in actions:
            match action:
                case RunStage(stage=stage):
                    state.runs[stage] = self._spawn(self._run_stage(state, stage))
                case AbortStage(stage=stage):
                    self._spawn(self._abort_stage(state, stage))
                case FreePayload(stage=stage):
                    freed.append(stage)
                case Finish():
                    finish = action
        if finish is not None:
            self._spawn(self._finish(state, finish, freed))
        else:
            self._free(state, freed)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run_stage(self, state: _RequestState, stage: str) -> None:
        """One stage of one request, until it ends: reports exactly one end to the flow."""
        try:
            state.payloads[stage] = await self._drive(state, stage)
        except StageError as error:
            error.__cause__ = error.__context__ = None
            # Its frames would keep the stage's inputs alive as long as someone keeps the error.
            actions = state.flow.stage_failed(stage, error.with_traceback(None))
        except RequestAborted:
            actions = state.flow.stage_aborted(stage)
        except asyncio.CancelledError:
            actions = state.flow.stage_aborted(stage)
        except Exception as error:  # the runner's edge: whatever goes wrong, the request gets its end
            details = "".join(traceback.format_exception(error))
            actions = state.flow.stage_failed(stage, StageError(stage, one_line(error), details=details))
        else:
            actions = state.flow.stage_done(stage)
        self._carry_out(state, actions)

    async def _drive(self, state: _RequestState, stage: str) -> Delivered:
        process = self._processes[self._process_of[stage]]
        seconds = self.graph.spec.stages[stage].timeouts.run_seconds
        await process.ready(state.request.id, stage)
        call, sent = self._build_call(state, stage)
        loop = asyncio.get_running_loop()
        overdue = False

        def expire() -> None:
            nonlocal overdue
            overdue = True
            self._spawn(self._abort_stage(state, stage))

        # Waiting for its turn is bounded by the deadlines of the runs ahead of it.
        timer = loop.call_later(seconds * (self._running_on[stage] + 1), expire)
        self._running_on[stage] += 1
        try:
            async with contextlib.aclosing(process.run(call, sent)) as items:
                async for item in items:
                    if isinstance(item, Delivered):
                        return item
                    if isinstance(item, StageStarted):
                        timer.cancel()
                        timer = loop.call_later(seconds, expire)
                    state.hear(item)
        except (RequestAborted, asyncio.CancelledError):
            if overdue:
                raise timeout_error(stage, seconds) from None
            raise
        finally:
            timer.cancel()
            self._running_on[stage] -= 1
        raise StageError(stage, "ended without a payload")

    async def _abort_stage(self, state: _RequestState, stage: str) -> None:
        """Ask the stage to stop; a run that does not is given up after its grace."""
        process, run = self._processes.get(self._process_of[stage]), state.runs[stage]
        if process is None:
            return
        grace = self.graph.spec.stages[stage].timeouts.abort_seconds
        with contextlib.suppress(StageError, TimeoutError):
            await asyncio.wait_for(process.abort(state.request.id, stage), timeout=grace)
        done, _ = await asyncio.wait([run], timeout=grace)
        if not done:
            await process.give_up(stage)
            run.cancel()

    async def _finish(self, state: _RequestState, finish: Finish, freed: list[str]) -> None:
        request_id = state.request.id
        final: Event
        try:
            if finish.outcome == "done":
                outputs = await self._read_outputs(state)
                final = Done(request_id=request_id, outputs=outputs, seconds=time.perf_counter() - state.started_at)
            elif finish.error is not None:
                final = Failed(request_id=request_id, error=finish.error)
            else:
                final = Aborted(request_id=request_id, reason=finish.reason)
        except StageError as error:
            final = Failed(request_id=request_id, error=error)
        except asyncio.CancelledError:
            final = Aborted(request_id=request_id, reason="the runner was stopped")
        except Exception as error:  # the same edge for reading the outputs
            details = "".join(traceback.format_exception(error))
            stages = ", ".join(self.graph.output_stages())
            final = Failed(request_id=request_id, error=StageError(stages, one_line(error), details=details))
        try:
            self._free(state, freed)
        finally:
            state.offered.clear()
            self._requests.pop(request_id, None)
            state.hear(final)
            state.over.set()

    async def _read_outputs(self, state: _RequestState) -> dict[str, Any]:
        stages = self.graph.output_stages()
        payloads: dict[str, Payload] = {}
        for stage in stages:
            delivered = state.payloads[stage]
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    payloads[stage] = await self._processes[delivered.process].fetch(delivered.ref)
            except TimeoutError as error:
                raise StageError(stage, f"its output could not be read within {FETCH_SECONDS:g} s") from error
        return {name: payloads[source.stage][source.port] for name, source in self.graph.outputs.items()}

    def _free(self, state: _RequestState, stages: list[str]) -> None:
        for stage in stages:
            state.payloads.pop(stage, None)
            process = self._processes.get(self._process_of[stage])
            if process is not None:
                process.free(state.request.id, stage)

    # building calls -----------------------------------------------------------------------------------------------

    def _build_call(self, state: _RequestState, stage: str) -> tuple[RunCall, tuple[Any, ...]]:
        home = self._process_of[stage]
        sent: dict[FromRequest | str, Any] = {}
        inputs: dict[str, Value | Port | Collected] = {}

        def send(key: FromRequest | str, ref: Any) -> int:
            sent.setdefault(key, ref)
            return list(sent).index(key)

        def resolve(source: FromRequest | FromStage) -> Value | Port:
            if isinstance(source, FromRequest):
                value = state.request.inputs[source.field]
                if home == DRIVER:  # the value is there
                    return Value(value=value)
                if source.field not in state.offered:
                    state.offered[source.field] = self._processes[home].offer(value)
                offered = state.offered[source.field]
                return Value(value=value) if offered is None else Value(sent=send(source, offered))
            delivered = state.payloads[source.stage]
            index = None if delivered.process == home else send(source.stage, delivered.ref)
            return Port(stage=source.stage, port=source.port, produced_at=delivered.produced_at, sent=index)

        def is_there(source: FromRequest | FromStage) -> bool:
            return isinstance(source, FromStage) or source.field in state.request.inputs

        for port, binding in self.graph.bindings[stage].items():
            if isinstance(binding, Gather):
                flags = binding.joined or (False,) * len(binding.sources)
                there = [(s, joined) for s, joined in zip(binding.sources, flags, strict=True) if is_there(s)]
                if there:
                    parts = tuple(resolve(source) for source, _ in there)
                    inputs[port] = Collected(parts=parts, joined=tuple(joined for _, joined in there))
            elif is_there(binding):
                inputs[port] = resolve(binding)
        use = self._uses[stage]
        call = RunCall(
            request_id=state.request.id,
            stage=stage,
            seed=state.request.seed,
            inputs=inputs,
            needed_ports=use.ports,
            keep=use.keep,
            send=use.send,
            preview_every=state.request.preview_every,
        )
        return call, tuple(sent.values())

    def _use_of(self, stage: str) -> _Use:
        home = self._process_of[stage]
        readers = {self._process_of[reader] for reader in self.graph.readers(stage)}
        edges = (edge.source for edge in self.graph.edges())
        sources = [source for source in (*edges, *self.graph.outputs.values()) if source.stage == stage]
        return _Use(
            ports=tuple(dict.fromkeys(source.port for source in sources)),
            keep=home in readers,
            send=bool(readers - {home}) or stage in self.graph.output_stages(),
        )

    def _stop_grace(self) -> float:
        """How long `stop` waits for aborted runs to end, in seconds."""
        return max(spec.timeouts.abort_seconds for spec in self.graph.spec.stages.values())

    def _launches(self, process: str) -> tuple[StageLaunch, ...]:
        """How to make the stages of one process."""
        plan = self.plan.process(process)
        return tuple(
            StageLaunch(
                context=StageContext(
                    name=stage,
                    spec=self.graph.spec.stages[stage],
                    base_dir=self.graph.base_dir,
                    device=self.plan.stage(stage).device,
                    num_threads=plan.num_threads,
                    memory=self.plan.stage(stage).memory,
                ),
                target=find_kind_of(self.graph.spec.stages[stage]).stage,
            )
            for stage in plan.stages
        )
