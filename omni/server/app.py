"""The HTTP app: all routes around one Service. Nothing here is global, so that a process may have several apps."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from starlette.requests import ClientDisconnect

import omni
from omni.errors import OmniError
from omni.server import answers, bodies
from omni.server.answers import json_answer
from omni.server.context import Context
from omni.server.errors import as_api_error
from omni.server.job_object import JobDeleted, JobList, JobObject
from omni.server.limits import add_guards, form_limits
from omni.server.media_inputs import MediaReader
from omni.server.openapi import describe
from omni.server.routes import audio, chat, graphs, health, images, jobs, models, videos
from omni.server.service import Service
from omni.server.settings import ServerSettings

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


def build_app(service: Service, settings: ServerSettings) -> FastAPI:
    """The app of a service; whoever runs it starts and stops the service."""
    app = FastAPI(
        title="Omni",
        version=omni.__version__,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        docs_url=None,
        redoc_url=None,
        form_limits=form_limits(settings),
    )
    context = Context(service, settings, MediaReader(settings))
    for module in (images, videos, audio, chat, models, graphs, jobs, health):
        app.include_router(module.build_router(context))
    for kind in (OmniError, StarletteHTTPException, RequestValidationError, ClientDisconnect, TimeoutError, Exception):
        app.add_exception_handler(kind, answer_error)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    add_guards(app, settings)
    return app


async def answer_error(request: Request, error: Exception) -> Response:
    """The one place where errors become answers: OpenAI's shape, the right status, and no traceback."""
    told = as_api_error(error)
    if told.status >= 500:
        log.error("%s %s: %s", request.method, request.url.path, told, exc_info=None if told is error else error)
    return json_answer(told.body(), told.status, told.headers)


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = describe(app, STRUCTS)
    return app.openapi_schema
