"""Omni's jobs: any graph with any inputs, stored until retention removes it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse
from msgspec import Meta

from omni.errors import InputError
from omni.server.answers import json_answer
from omni.server.calls import until_left
from omni.server.context import Context, idempotency_key, key_of
from omni.server.encoding import IMAGE_TYPES, ImageFormat, encode_image
from omni.server.errors import bad_request, not_found
from omni.server.fields import own_inputs
from omni.server.job_object import JobDeleted, JobList, JobObject, job_object
from omni.server.jobs import JOB_ID, Draining, Job, JobOrder, JobState, OutputFile
from omni.server.openapi import EVENTS, Routes, add_routes, reference
from omni.server.reading import Body, convert, read_body
from omni.server.stored import open_image, wait_for_end
from omni.server.streaming import EventStream, ServerEvent

WAIT = re.compile(r"(?:^|[,;\s])wait=([0-9]{1,6})(?:$|[,;\s])")
MAX_LIST = 100
MAX_SEQUENCE = 10**18
WRITE_ERRORS = (400, 401, 404, 409, 413, 415, 429, 500, 503)
SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox; default-src 'none'"}
"""What a graph made is data: a browser that opens it runs nothing in it."""


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/graphs/{name}/jobs. In a form, `request` holds this as JSON, and other fields and files are inputs."""

    inputs: dict[str, Any] = {}
    """Inputs of the graph; media are data URLs or allowed URLs."""
    seed: int | None = None
    """Makes the job repeatable, 0 to 4294967295; drawn at random when left out."""
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    """Higher runs first."""
    preview_every: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """Denoise steps from one preview to the next; 0: none."""
    webhook: str | None = None
    """An allowed address that is told when the job is over."""


class Jobs:
    """The routes of jobs."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def create(self, request: Request, name: str) -> Response:
        """Store a job; with `Prefer: wait=SECONDS` wait for its end."""
        omni = self.context.find(name)
        body = await read_body(request, self.context.settings)
        asked, given = split_job(body)
        raw = own_inputs(omni.graph, given, texts=body.texts)
        reading = self.context.read_inputs(omni.graph, raw, self.context.open_media(request, name))
        order = JobOrder(
            graph=name,
            inputs=await until_left(request, reading, self.context.settings.request_seconds),
            seed=asked.seed,
            priority=asked.priority,
            key=key_of(request),
            meta={} if asked.webhook is None else {"webhook": asked.webhook},
            idempotency_key=idempotency_key(request),
            preview_every=asked.preview_every,
        )
        job = await self.context.service.submit(order)
        seconds = wait_seconds(request)
        if seconds and not job.is_final:
            seconds = min(seconds, self.context.settings.request_seconds)
            with contextlib.suppress(TimeoutError, Draining):  # not over yet: the client asks again
                await until_left(request, wait_for_end(self.context.service, job), seconds)
            job = await self.context.service.get(job.id) or job
        return json_answer(job_object(job), 200 if job.is_final else 202, {"Location": f"/v1/jobs/{job.id}"})

    async def list_all(
        self,
        request: Request,
        graph: str | None = None,
        state: JobState | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """Jobs, the newest first."""
        if graph is not None and not graph.isprintable():
            raise bad_request("query parameter 'graph': is no name of a graph", "graph")
        jobs = await self.context.service.list_jobs(
            graph=graph,
            state=state,
            key=key_of(request),
            limit=limit + 1,
            after=None if after is None else (await find_job(self.context, request, after)).id,
            order=order,
        )
        return json_answer(JobList(data=[job_object(job) for job in jobs[:limit]], has_more=len(jobs) > limit))

    async def one(self, request: Request, job_id: str) -> Response:
        """One job."""
        return json_answer(job_object(await find_job(self.context, request, job_id)))

    async def events(
        self,
        request: Request,
        job_id: str,
        after: Annotated[int, Query(ge=0, le=MAX_SEQUENCE)] = 0,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> Response:
        """What happens to a job, as server-sent events: from the first, or from the one after a number.

        204 when the job is over and nothing is left to tell: a browser that asks again after the end stops then.
        """
        job = await find_job(self.context, request, job_id)
        if last_event_id is not None:
            if not re.fullmatch(r"[0-9]{1,18}", last_event_id, re.ASCII):
                raise bad_request("Last-Event-ID must be the number of an event", "Last-Event-ID")
            after = int(last_event_id)
        if job.is_final and not await self._has_events(job, after):
            return Response(status_code=204)
        return EventStream(self._events(job, after), self.context.settings.request_seconds)

    async def _has_events(self, job: Job, after: int) -> bool:
        async with contextlib.aclosing(self._events(job, after)) as events:
            return await anext(events, None) is not None

    async def _events(self, job: Job, after: int) -> AsyncGenerator[ServerEvent, None]:
        async with contextlib.aclosing(self.context.service.events(job.id, after)) as events:  # type: ignore[type-var]
            async for event in events:
                yield ServerEvent(event.data, event.type, str(event.sequence))

    async def output(
        self,
        request: Request,
        job_id: str,
        name: str,
        index: Annotated[int, Query(ge=0)] = 0,
        format: ImageFormat | None = None,
    ) -> Response:
        """One value of an output, as a file; pictures in another `format` on demand."""
        job = await find_job(self.context, request, job_id)
        found = await self.context.service.open_output(job.id, name, index)
        if found is None:
            raise not_found(f"job {job.id} has no output '{name}' with index {index}; it is {job.state}", "name")
        return await output_answer(*found, image_format=format)

    async def delete(self, request: Request, job_id: str) -> Response:
        """Abort a job that waits or runs; remove one that is over."""
        job = await find_job(self.context, request, job_id)
        if await self.context.service.abort(job.id):
            job = await self.context.service.get(job.id) or job
            return json_answer(job_object(job), 202)
        await self.context.service.delete(job.id)
        return json_answer(JobDeleted(id=job.id, deleted=True))


async def find_job(context: Context, request: Request, job_id: str, kind: str | None = None) -> Job:
    """A job that the caller may see: another key's jobs are not there for it. Raises ApiError (404)."""
    # Only what may be an id reaches the store: some databases fail at a NUL in a text.
    job = await context.service.get(job_id) if JOB_ID.fullmatch(job_id) else None
    if job is None or job.key != key_of(request) or kind not in (None, job.kind):
        raise not_found(f"there is no {kind or 'job'} {job_id[:60]!a}", "id", f"{kind or 'job'}_not_found")
    return job


async def output_answer(file: OutputFile, place: Path | bytes, image_format: ImageFormat | None = None) -> Response:
    """A file of the store: ranges and caching for those on this machine."""
    if image_format is not None and file.type == "image" and file.media_type != IMAGE_TYPES[image_format]:
        data = await asyncio.to_thread(lambda: encode_image(open_image(place), image_format))
        return Response(data, media_type=IMAGE_TYPES[image_format], headers=SAFE_HEADERS)
    if isinstance(place, bytes):
        return Response(place, media_type=file.media_type, headers=SAFE_HEADERS)
    return FileResponse(place, media_type=file.media_type, headers=SAFE_HEADERS)


def split_job(body: Body) -> tuple[JobRequest, dict[str, Any]]:
    """What is asked for and the inputs, from JSON or from a form. Raises ApiError."""
    if body.texts is None:
        asked: JobRequest = convert(body.fields, JobRequest)
        return asked, asked.inputs
    fields = dict(body.fields)
    text = fields.pop("request", "{}")
    try:
        value = body.texts.decode(text if isinstance(text, str) else "", "the form's field 'request'")
    except InputError as error:
        raise bad_request(str(error), "request") from None
    asked = convert(value, JobRequest, name="request")
    if both := sorted(asked.inputs.keys() & fields.keys()):
        raise bad_request(f"'{both[0]}' is in 'request' and beside it", both[0])
    return asked, {**asked.inputs, **fields}


def wait_seconds(request: Request) -> float:
    """Of the header `Prefer: wait=SECONDS`; 0 without it."""
    match = WAIT.search(request.headers.get("prefer", ""))
    return float(match[1]) if match else 0.0


def build_router(context: Context) -> APIRouter:
    """Routes below /v1/jobs, and the one that makes jobs."""
    router, jobs = APIRouter(tags=["Omni"]), Jobs(context)
    routes: Routes = (
        (
            "POST",
            "/v1/graphs/{name}/jobs",
            jobs.create,
            {
                "summary": "Make a job",
                "answer": JobObject,
                "status": 202,
                "also": (200,),
                "body": JobRequest,
                "files": ("request",),
                "errors": WRITE_ERRORS,
                "headers": ("Idempotency-Key", "Prefer"),
            },
        ),
        ("GET", "/v1/jobs", jobs.list_all, {"summary": "List jobs", "answer": JobList}),
        ("GET", "/v1/jobs/{job_id}", jobs.one, {"summary": "One job", "answer": JobObject, "errors": (401, 404)}),
        (
            "GET",
            "/v1/jobs/{job_id}/events",
            jobs.events,
            {"summary": "What happens to a job", "content": EVENTS, "also": (204,)},
        ),
        (
            "GET",
            "/v1/jobs/{job_id}/outputs/{name}",
            jobs.output,
            {"summary": "One value of an output", "content": {"*/*": {"type": "string", "format": "binary"}}},
        ),
        (
            "DELETE",
            "/v1/jobs/{job_id}",
            jobs.delete,
            {
                "summary": "Abort or remove a job",
                "answer": {"anyOf": [reference(JobObject), reference(JobDeleted)]},
                "also": (202,),
            },
        ),
    )
    add_routes(router, routes)
    return router
