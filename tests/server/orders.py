"""Orders to a service, and waiting for what becomes of them."""

from __future__ import annotations

import asyncio
from typing import Any

from omni.messages import Event, StageStarted
from omni.server.jobs import Job, JobEvent, JobOrder
from omni.server.observer import Observer
from omni.server.service import Service

WAIT_SECONDS = 60


def order(prompt: str = "x", graph: str = "g", **fields: Any) -> JobOrder:
    return JobOrder(graph=graph, inputs={"prompt": prompt}, **fields)


async def all_events(service: Service, job: Job | str, after: int = 0) -> list[JobEvent]:
    job_id = job if isinstance(job, str) else job.id
    async with asyncio.timeout(WAIT_SECONDS):
        return [event async for event in service.events(job_id, after)]


async def reached(service: Service, job: Job, kind: str) -> None:
    """Until a job's event of a type."""
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in service.events(job.id):
            if event.type == kind:
                return
    raise AssertionError(f"no event {kind}")


async def state_of(service: Service, job: Job) -> str:
    found = await service.get(job.id)
    return "gone" if found is None else found.state


class Log(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, ...]] = []

    def accepted(self, request_id: str, graph: str, kind: str) -> None:
        self.lines.append(("accepted", graph, kind))

    def refused(self, graph: str, kind: str, reason: str) -> None:
        self.lines.append(("refused", graph, kind, reason))

    def started(self, request_id: str, graph: str, kind: str, waited_seconds: float) -> None:
        assert waited_seconds >= 0
        self.lines.append(("started", graph, kind))

    def event(self, request_id: str, graph: str, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.lines.append(("stage", event.stage))

    def finished(self, request_id: str, graph: str, kind: str, outcome: str, seconds: float) -> None:
        self.lines.append(("finished", graph, kind, outcome))
