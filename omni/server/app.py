"""The HTTP app: all routes around one Service. Nothing here is global, so that a process may have several apps."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import omni
from omni.errors import OmniError
from omni.server import answers, bodies
from omni.server.answers import json_answer
from omni.server.context import Context
from omni.server.errors import answer_headers, as_api_error
from omni.server.job_object import JobDeleted, JobList, JobObject
from omni.server.limits import add_guards, form_limits
from omni.server.media_inputs import MediaReader
from omni.server.metrics import GraphLoad, Load, Metrics, MetricsMiddleware, MetricsObserver
from omni.server.metrics import build_router as build_metrics_router
from omni.server.openapi import describe
from omni.server.routes import audio, chat, graphs, health, images, job_inputs, jobs, models, page, videos
from omni.server.service import Service
from omni.server.settings import ServerSettings
from omni.server.timing import TimingMiddleware
from omni.server.tracing import Tracing, telemetry_of

log = logging.getLogger(__name__)
DESCRIPTION = "Graphs of generative models over OpenAI's routes, and as jobs that survive restarts."
TAGS = [
    {"name": "OpenAI", "description": "Routes that OpenAI's clients use without change."},
    {"name": "Omni", "description": "Graphs and jobs."},
    {"name": "health", "description": "Whether the server works."},
]
STRUCTS: tuple[Any, ...] = (
    bodies.ImageRequest,
    bodies.ImageEditRequest,
    bodies.VideoRequest,
    bodies.SpeechRequest,
    bodies.SoundRequest,
    bodies.ChatRequest,
    answers.ModelList,
    answers.ImagesAnswer,
    answers.ImageEvent,
    answers.VideoList,
    answers.VideoDeleted,
    answers.SpeechDelta,
    answers.SpeechDone,
    answers.ChatCompletion,
    answers.ChatChunk,
    graphs.GraphList,
    health.Health,
    health.Ready,
    jobs.JobRequest,
    JobObject,
    JobList,
    JobDeleted,
)
"""What the OpenAPI document describes."""


def build_app(
    service: Service, settings: ServerSettings, *, metrics: Metrics | None = None, tracing: Tracing | None = None
) -> FastAPI:
    """The app of a service; whoever runs it starts and stops the service.

    `metrics` are its own when left out; without `tracing` it makes no spans.
    """
    metrics = metrics or Metrics()
    app = FastAPI(
        title="Omni",
        version=omni.__version__,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        docs_url=None,
        redoc_url=None,
        form_limits=form_limits(settings),  # type: ignore[arg-type]
        telemetry=telemetry_of(tracing),
    )
    context = Context(service, settings, MediaReader(settings))
    for module in (images, videos, audio, chat, models, graphs, jobs, job_inputs, health):
        app.include_router(module.build_router(context))
    app.include_router(build_metrics_router(metrics, service.store.counts))
    app.include_router(page.build_router(settings))
    for kind in (OmniError, HTTPException, RequestValidationError, ClientDisconnect, TimeoutError, Exception):
        app.add_exception_handler(kind, answer_error)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    service.observe(MetricsObserver(metrics, service.graphs))
    if tracing is not None:
        service.observe(tracing)
    metrics.watch(lambda: load_of(service))
    app.add_middleware(TimingMiddleware)
    add_guards(app, settings)
    app.add_middleware(MetricsMiddleware, metrics=metrics)  # outermost: it counts what the guards refuse, too
    return app


def load_of(service: Service) -> Load:
    """How busy the service is now, for metrics."""
    graphs = {name: GraphLoad(service.waiting(name), service.running(name)) for name in service.graphs}
    return Load(graphs, service.num_listeners, service.num_events)


async def answer_error(request: Request, error: Exception) -> Response:
    """The one place where errors become answers: OpenAI's shape, the right status, and no traceback."""
    told = as_api_error(error)
    if told.status >= 500:
        cause = None if isinstance(error, OmniError) else error
        log.error("%s %s: %s", request.method, request.url.path, told, exc_info=cause)
    return json_answer(told.body(), told.status, answer_headers(told))


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = describe(app, STRUCTS)
    return app.openapi_schema
