"""The inline runner: every stage in the driver process, models in threads. Never imports Ray."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from omni.errors import StageError
from omni.messages import Event, Payload
from omni.plan import DRIVER
from omni.runner.base import Runner
from omni.runner.process import Delivered, LocalProcess, Produced, RunCall, StageLaunch, StageProcess
from omni.stage import Report, Stage


class DriverProcess(StageProcess):
    """The driver itself as a process of the plan: payloads are handed over as they are."""

    def __init__(self, launches: tuple[StageLaunch, ...]) -> None:
        self._local = LocalProcess(launches)
        self._stuck: set[str] = set()
        """Stages with a run that did not stop in time; its thread may still come back."""

    async def setup(self, report: Report) -> None:
        await self._local.setup(report)

    async def run(self, call: RunCall, sent: tuple[Any, ...]) -> AsyncGenerator[Event | Delivered, None]:
        if call.stage in self._stuck and self._local.is_blocked(call.stage):
            raise StageError(
                call.stage,
                "an earlier request is stuck in it, and a thread cannot be stopped by force",
                "restart Omni; `isolation: actor` gives the stage a process that is replaced when it hangs",
            )
        self._stuck.discard(call.stage)
        async with contextlib.aclosing(self._local.run(call, sent)) as items:
            async for item in items:
                if isinstance(item, Produced):
                    yield Delivered(process=DRIVER, produced_at=item.produced_at, ref=item.payload)
                else:
                    yield item

    async def abort(self, request_id: str, stage: str) -> None:
        await self._local.abort(request_id, stage)

    async def give_up(self, stage: str) -> None:
        self._stuck.add(stage)

    async def check(self, stage: str) -> str:
        is_stuck = stage in self._stuck and self._local.is_blocked(stage)
        return "an earlier request is stuck in it" if is_stuck else ""

    def stage(self, name: str) -> Stage:
        """The live stage of that name. Raises KeyError."""
        return self._local.stage(name)

    async def fetch(self, ref: Any) -> Payload:
        payload: Payload = ref
        return payload

    def free(self, request_id: str, stage: str) -> None:
        self._local.free(request_id, stage)

    async def teardown(self) -> None:
        await self._local.teardown()


class InlineRunner(Runner):
    """Runs a plan whose only process is the driver."""

    async def _build_processes(self) -> dict[str, StageProcess]:
        self._driver = DriverProcess(self._launches(DRIVER))
        return {DRIVER: self._driver}

    def stage(self, name: str) -> Stage:
        """The live stage of that name, for programs that want to reach its model. Raises KeyError."""
        return self._driver.stage(name)
