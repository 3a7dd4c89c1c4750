"""Whether the server lives, and whether every stage answers."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from omni.server.answers import Answer, json_answer
from omni.server.context import Context
from omni.server.errors import RETRY_SECONDS, ErrorAnswer, ErrorDetail
from omni.server.openapi import operation

CHECK_SECONDS = 5.0
"""How long a stage, or the job store, may take to answer."""


class Health(Answer, frozen=True, kw_only=True, omit_defaults=False):
    """GET /health."""

    status: str = "ok"


class Ready(Answer, frozen=True, kw_only=True, omit_defaults=False):
    """GET /ready."""

    status: str = "ready"
    graphs: list[str]


class NotReady(ErrorAnswer, frozen=True, kw_only=True):
    """GET /ready when something is wrong, with every stage that does not answer."""

    stages: dict[str, str]
    """`GRAPH.STAGE` -> why it cannot take requests."""


class Checks:
    """The routes of health."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def health(self, request: Request) -> Response:
        """Whether the process answers."""
        return json_answer(Health())

    async def ready(self, request: Request) -> Response:
        """Whether every stage of every graph and the job store answer, and requests are taken."""
        graphs = self.context.graphs
        found = await asyncio.gather(*(omni.check(CHECK_SECONDS) for omni in graphs.values()))
        faults = {
            f"{name}.{stage}": why for name, part in zip(graphs, found, strict=True) for stage, why in part.items()
        }
        if why := await self.context.service.store.check(CHECK_SECONDS):
            return _not_ready(f"the job store is not ready: {why}", "store_not_ready", None, faults)
        if faults:
            stage, why = next(iter(faults.items()))
            return _not_ready(f"stage '{stage}' is not ready: {why}", "stage_not_ready", stage, faults)
        if self.context.service.draining:
            return _not_ready("the server is stopping", "draining", None, {})
        return json_answer(Ready(graphs=list(graphs)))


def _not_ready(message: str, code: str, stage: str | None, faults: dict[str, str]) -> Response:
    detail = ErrorDetail(message=message, type="server_error", code=code, stage=stage)
    headers = {"Retry-After": str(RETRY_SECONDS)}
    return json_answer(NotReady(error=detail, stages=faults), 503, headers)


def build_router(context: Context) -> APIRouter:
    """/health and /ready; both need no API key."""
    router, checks = APIRouter(tags=["health"]), Checks(context)
    router.add_api_route(
        "/health", checks.health, methods=["GET"], **operation("Whether the process lives", answer=Health, errors=())
    )
    router.add_api_route(
        "/ready",
        checks.ready,
        methods=["GET"],
        **operation("Whether every stage answers", answer=Ready, errors=(503,)),
    )
    return router
