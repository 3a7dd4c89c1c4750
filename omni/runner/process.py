"""The stages of one process, and how the driver sees them: `StageProcess` is the interface to a process,
`LocalProcess` sets its stages up, runs them, and holds the payloads that stay there.

The inline runner has one LocalProcess in the driver; each Ray actor is a thin shell around one. This is one of the
three edges where any exception of a stage is caught and becomes a StageError.
"""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec

from omni.errors import (
    RequestAborted,
    StageDiedError,
    StageError,
    StageSetupError,
    StageTimeoutError,
    one_line,
)
from omni.messages import (
    Event,
    HopFinished,
    LoadProgress,
    Message,
    Output,
    Payload,
    Preview,
    Progress,
    StageFinished,
    StageItem,
    StagePreview,
    StageProgress,
    StageStarted,
    StageText,
    Started,
    TextDelta,
)
from omni.registry import import_string
from omni.stage import Report, Stage, StageCall, StageContext
from omni.transport.payload import SharedInputGuard, num_bytes, share

SPIN_COUNT = "1000"
"""How long torch's CPU threads spin for each other before they sleep; read when torch is imported. OpenMP's default is
so long that one more busy process on the cores slows a picture down tenfold; this costs nothing on a quiet machine."""


class StageLaunch(msgspec.Struct, frozen=True):
    """How to make one stage in its process."""

    context: StageContext
    target: str
    """`module:name` of the Stage class or factory."""


class Value(Message, frozen=True, kw_only=True):
    """An input that comes with the call: a field of the request."""

    value: Any = None
    sent: int | None = None
    """Index among what is sent with the call: a large value is there instead."""


class Port(Message, frozen=True, kw_only=True):
    """An input that is a port of another stage's payload."""

    stage: str
    port: str
    produced_at: float
    """`time.time()` when the producer had it; on another host its clock may differ."""
    sent: int | None = None
    """Index among the payloads sent with the call; None: the payload is held in this process."""


class Collected(Message, frozen=True, kw_only=True):
    """An input that is a list of several others (fan-in)."""

    parts: tuple[Value | Port, ...]
    joined: tuple[bool, ...]
    """For each part: whether it is a list whose items join one by one."""


class RunCall(Message, frozen=True, kw_only=True):
    """Everything a process needs to run one stage for one request."""

    request_id: str
    stage: str
    seed: int
    inputs: dict[str, Value | Port | Collected]
    needed_ports: tuple[str, ...]
    """Output ports that someone will read."""
    keep: bool
    """Hold the payload here, for readers in this process."""
    send: bool = True
    """Readers elsewhere, or the caller, want the payload."""
    preview_every: int = 0
    """As in Request."""


class Produced(Message, frozen=True, kw_only=True):
    """Last item of a run: the payload, for readers elsewhere."""

    payload: Payload
    produced_at: float


class Delivered(msgspec.Struct, frozen=True):
    """What the driver holds for a payload: `ref` is the payload itself or a reference that processes can read."""

    process: str
    produced_at: float
    ref: Any


class StageProcess(ABC):
    """The driver's view of one process that hosts stages."""

    @abstractmethod
    async def setup(self, report: Report) -> None:
        """Bring up the process and all its stages."""

    async def ready(self, request_id: str, stage: str) -> None:
        """Wait until a run may begin, outside its deadline; a dead process is replaced. `abort` ends the wait too."""

    @abstractmethod
    def run(self, call: RunCall, sent: tuple[Any, ...]) -> AsyncGenerator[Event | Delivered, None]:
        """Run one stage: events, then what was delivered. `sent` are the `ref`s that the call's ports index."""

    def offer(self, value: Any) -> Any:
        """What `run` is sent for a value of a request, so that it crosses once for all its readers; None: it goes
        along in each call. The same for every process but the driver."""
        return None

    @abstractmethod
    async def abort(self, request_id: str, stage: str) -> None:
        """Ask a running stage to stop."""

    @abstractmethod
    async def give_up(self, stage: str) -> None:
        """A run neither ended nor stopped in time: make sure that it does no more harm."""

    @abstractmethod
    async def fetch(self, ref: Any) -> Payload:
        """Bring a delivered payload into the driver."""

    @abstractmethod
    def free(self, request_id: str, stage: str) -> None:
        """Drop a payload that the process keeps."""

    @abstractmethod
    async def teardown(self) -> None:
        """Stop the process. Never raises for a process that is already gone."""


class LocalProcess:
    """Hosts the stages of one process."""

    def __init__(self, launches: tuple[StageLaunch, ...]) -> None:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        self._launches = launches
        self._stages: dict[str, Stage] = {}
        self._held: dict[tuple[str, str], Payload] = {}

    async def setup(self, report: Report) -> None:
        """Make and set up all stages at once. Raises StageSetupError; stages that came up are torn down again."""
        for launch in self._launches:
            self._stages[launch.context.name] = _build_stage(launch)
        setups = (self._setup_one(name, report) for name in self._stages)
        results = await asyncio.gather(*setups, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            await self.teardown()
            raise errors[0]

    async def _setup_one(self, name: str, report: Report) -> None:
        stage = self._stages[name]
        seconds = stage.context.spec.timeouts.setup_seconds
        try:
            async with asyncio.timeout(seconds):
                await stage.setup(_measured(stage, report))
        except StageError:
            raise
        except TimeoutError as error:
            raise StageSetupError(
                name, f"was not ready after {seconds:g} s", f"raise stages.{name}.timeouts.setup_seconds"
            ) from error
        except Exception as error:
            raise StageSetupError(name, one_line(error), details=traceback.format_exc()) from error

    async def run(self, call: RunCall, sent: tuple[Payload, ...] = ()) -> AsyncGenerator[Event | Produced, None]:
        """Run one stage for one request: events, then the payload.

        Raises StageError when the stage fails and RequestAborted when it was aborted.
        """
        stage = self._stages[call.stage]
        # Counted from when the last input was there: waiting for the others is no part of a hop.
        seconds = max(0.0, time.time() - max((port.produced_at for port in _ports_of(call)), default=time.time()))
        inputs: dict[str, Any] = {}
        for port, source in call.inputs.items():
            value, hops = self._resolve(call, port, source, sent, seconds)
            inputs[port] = share(value)
            for hop in hops:
                yield hop
        guard = SharedInputGuard(inputs)
        stage_call = StageCall(call.request_id, inputs, call.seed, call.preview_every)
        run = stage.run(stage_call)
        started_at = 0.0
        try:
            async for item in run:
                if not started_at:
                    started_at = time.perf_counter()
                    yield StageStarted(request_id=call.request_id, stage=call.stage)
                if isinstance(item, Output):
                    guard.check(call.stage)
                    payload = _check_ports(call, item.payload)
                    yield StageFinished(
                        request_id=call.request_id,
                        stage=call.stage,
                        seconds=time.perf_counter() - started_at,
                        bytes=num_bytes(payload),
                        peak_device_bytes=stage.peak_device_bytes(),
                        peak_host_bytes=_peak_host_bytes(),
                    )
                    if call.keep:
                        self._held[call.request_id, call.stage] = payload
                    yield Produced(payload=payload, produced_at=time.time())
                    return
                if not isinstance(item, Started):
                    yield _as_event(call, item)
            raise StageError(call.stage, "ended without an output", "a stage's last item must be an Output")
        except (StageError, RequestAborted):
            raise
        except Exception as error:
            raise StageError(call.stage, one_line(error), details=traceback.format_exc()) from error
        finally:
            await run.aclose()

    def _resolve(
        self, call: RunCall, port: str, source: Value | Port | Collected, sent: tuple[Payload, ...], seconds: float
    ) -> tuple[Any, list[HopFinished]]:
        if isinstance(source, Value):
            return source.value if source.sent is None else sent[source.sent], []
        if isinstance(source, Collected):
            values: list[Any] = []
            collected: list[HopFinished] = []
            for part, joined in zip(source.parts, source.joined, strict=True):
                value, hops = self._resolve(call, port, part, sent, seconds)
                values.extend(value if joined else [value])
                collected.extend(hops)
            return values, collected
        if source.sent is not None:
            payload = sent[source.sent]
        elif (call.request_id, source.stage) in self._held:
            payload = self._held[call.request_id, source.stage]
        else:
            lost = f"its input from '{source.stage}' was lost when their process died"
            raise StageDiedError(call.stage, lost, "ask again")
        value = payload[source.port]
        hop = HopFinished(
            request_id=call.request_id,
            source=f"{source.stage}.{source.port}",
            target=f"{call.stage}.{port}",
            transport="local" if source.sent is None else "object_store",
            seconds=seconds,
            bytes=num_bytes(value),
        )
        return value, [hop]

    def stage(self, name: str) -> Stage:
        """The live stage of that name. Raises KeyError."""
        return self._stages[name]

    def is_blocked(self, stage: str) -> bool:
        """Whether a stage cannot take runs, because earlier ones did not stop."""
        return self._stages[stage].is_blocked()

    async def abort(self, request_id: str, stage: str) -> None:
        """Make a running stage stop; its run ends with RequestAborted. Raises StageError when the stage cannot."""
        try:
            await self._stages[stage].abort(request_id)
        except Exception as error:
            raise StageError(stage, one_line(error), details=traceback.format_exc()) from error

    def free(self, request_id: str, stage: str) -> None:
        """Drop a payload that was kept here."""
        self._held.pop((request_id, stage), None)

    def num_held(self) -> int:
        """How many payloads are held, for tests and metrics."""
        return len(self._held)

    async def teardown(self) -> None:
        """Tear down all stages; a stage that fails or hangs in it does not keep the others."""
        stages, self._stages = self._stages, {}
        self._held.clear()
        deadlines = (asyncio.wait_for(stage.teardown(), TEARDOWN_SECONDS) for stage in stages.values())
        await asyncio.gather(*deadlines, return_exceptions=True)


TEARDOWN_SECONDS = 10.0
"""How long a stage may take to release what it holds."""


def _peak_host_bytes() -> int:
    """The most memory that this process has had, mapped files included; 0 where the system does not say."""
    try:
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024
    except (OSError, ValueError):
        return 0


def _measured(stage: Stage, report: Report) -> Report:
    """`report` that adds to the news of a stage that is ready how long it took, and what the process took."""
    started_at = time.perf_counter()

    def add(progress: LoadProgress) -> None:
        if progress.state == "ready":
            progress = msgspec.structs.replace(
                progress,
                load_seconds=time.perf_counter() - started_at,
                peak_device_bytes=stage.peak_device_bytes(),
                peak_host_bytes=_peak_host_bytes(),
            )
        report(progress)

    return add


def _ports_of(call: RunCall) -> list[Port]:
    """All ports of other stages that a call reads."""
    sources = [
        part
        for source in call.inputs.values()
        for part in (source.parts if isinstance(source, Collected) else [source])
    ]
    return [source for source in sources if isinstance(source, Port)]


def _build_stage(launch: StageLaunch) -> Stage:
    try:
        stage: Stage = import_string(launch.target)(launch.context)
    except (ImportError, AttributeError) as error:
        raise StageSetupError(
            launch.context.name, f"cannot import {launch.target}: {error}", "install what provides this kind of stage"
        ) from error
    return stage


def _check_ports(call: RunCall, payload: Payload) -> Payload:
    missing = [port for port in call.needed_ports if port not in payload]
    if missing:
        raise StageError(
            call.stage,
            f"gave no '{missing[0]}'; it gave {', '.join(sorted(payload)) or 'nothing'}",
            "change the graph's edges and outputs to the ports that the stage gives",
        )
    return payload


def _as_event(call: RunCall, item: StageItem) -> Event:
    match item:
        case Progress(step=step, num_steps=num_steps, unit=unit):
            return StageProgress(
                request_id=call.request_id, stage=call.stage, step=step, num_steps=num_steps, unit=unit
            )
        case TextDelta(text=text):
            return StageText(request_id=call.request_id, stage=call.stage, text=text)
        case Preview(step=step, num_steps=num_steps, image=image):
            return StagePreview(
                request_id=call.request_id, stage=call.stage, step=step, num_steps=num_steps, image=image
            )
    raise TypeError(
        f"stage '{call.stage}' yielded {type(item).__name__}; allowed: Progress, TextDelta, Preview, Output"
    )


def timeout_error(stage: str, seconds: float) -> StageTimeoutError:
    """The error of a run that missed its deadline."""
    return StageTimeoutError(
        stage, f"did not finish within {seconds:g} s", f"raise stages.{stage}.timeouts.run_seconds, or ask for less"
    )
