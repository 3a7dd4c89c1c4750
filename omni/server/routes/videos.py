"""OpenAI's videos: jobs that are polled, downloaded and deleted."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from omni.graph import Graph
from omni.server.answers import Video, VideoDeleted, VideoError, VideoList, json_answer
from omni.server.bodies import VideoRequest
from omni.server.calls import orders_for, until_left
from omni.server.context import Context, idempotency_key, key_of
from omni.server.encoding import encode_image
from omni.server.errors import ApiError, bad_request, not_found
from omni.server.fields import translate
from omni.server.graph_facts import FRAMES_INPUTS, default_of, frames_per_second
from omni.server.jobs import Job, JobOrder
from omni.server.media_room import RequestMedia
from omni.server.openapi import FILE, Routes, add_routes
from omni.server.reading import Body, read_body, split_fields
from omni.server.routes.jobs import MAX_LIST, find_job, output_answer

KIND: Literal["video"] = "video"
CREATE_ERRORS = (400, 401, 404, 409, 413, 415, 429, 500, 503)
REFERENCE_INPUTS = ("image", "video")
"""Inputs that a reference may go to, the first that the graph has."""
STATES: dict[str, Literal["queued", "in_progress", "completed", "failed"]] = {
    "queued": "queued",
    "running": "in_progress",
    "done": "completed",
    "failed": "failed",
    "aborted": "failed",
}


class Videos:
    """The routes of videos."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def create(self, request: Request) -> Response:
        """Store a job that makes a video."""
        form = await read_body(request, self.context.settings)
        body, rest = split_fields(form, VideoRequest)
        name = self.context.choose(body.model, "video")
        graph = self.context.graphs[name].graph
        reading = self._inputs(graph, body, rest, form, self.context.open_media(request, name))
        inputs = await until_left(request, reading, self.context.settings.request_seconds)
        order = JobOrder(
            graph=name,
            inputs=inputs,
            seed=body.seed,
            kind=KIND,
            priority=body.priority,
            key=key_of(request),
            meta=describe(graph, inputs) | ({} if body.webhook is None else {"webhook": body.webhook}),
            idempotency_key=idempotency_key(request),
        )
        (order,) = orders_for(order, 1)
        return json_answer(video_of(await self.context.service.submit(order), self.context))

    async def _inputs(
        self, graph: Graph, body: VideoRequest, rest: dict[str, Any], form: Body, counted: RequestMedia
    ) -> dict[str, Any]:
        raw = translate(
            graph,
            rest,
            KIND,
            extra=body.extra_body,
            texts=form.texts,
            allow_unknown=self.context.settings.allow_unknown_fields,
        )
        if body.input_reference is not None:
            target = next((name for name in REFERENCE_INPUTS if name in graph.inputs), None)
            if target is None:
                raise bad_request(
                    "this graph takes no picture to start from", "input_reference", "unsupported_parameter"
                )
            medium = await self.context.read_medium(body.input_reference, target, "input_reference", counted)
            return {**await self.context.read_inputs(graph, raw, counted), target: medium}
        return await self.context.read_inputs(graph, raw, counted)

    async def list_all(
        self,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """Videos, the newest first."""
        if after is not None:
            await find_job(self.context, request, after, KIND)
        jobs = await self.context.service.list_jobs(
            kind=KIND, key=key_of(request), limit=limit + 1, after=after, order=order
        )
        videos = [video_of(job, self.context) for job in jobs[:limit]]
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        return json_answer(VideoList(data=videos, has_more=len(jobs) > limit, first_id=first, last_id=last))

    async def one(self, request: Request, video_id: str) -> Response:
        """One video."""
        return json_answer(video_of(await find_job(self.context, request, video_id, KIND), self.context))

    async def content(
        self, request: Request, video_id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
    ) -> Response:
        """The MP4, whole or in ranges; or its first frame."""
        job = await find_job(self.context, request, video_id, KIND)
        if job.state != "done":
            raise ApiError(409, f"video {job.id} is {STATES[job.state]}: it has no content", "id", "video_not_ready")
        output = next((output for output in job.outputs if output.type == "video"), None)
        found = await self.context.service.open_output(job.id, output.name, output.index) if output else None
        if found is None:
            raise not_found(f"video {job.id} has no content any more", "id", "content_gone")
        if variant == "spritesheet":
            raise bad_request("only the variants video and thumbnail are made", "variant", "unsupported_parameter")
        if variant == "thumbnail":
            return Response(await asyncio.to_thread(first_frame, found[1]), media_type="image/webp")
        return await output_answer(*found)

    async def delete(self, request: Request, video_id: str) -> Response:
        """Remove a video; one that is being made is aborted."""
        job = await find_job(self.context, request, video_id, KIND)
        await self.context.service.delete(job.id)
        return json_answer(VideoDeleted(id=job.id, deleted=True))


def describe(graph: Graph, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the video object says of a request: prompt, size and length, as far as they are known."""

    def said(*names: str) -> Any:
        values = (inputs.get(name, default_of(graph, name)) for name in names)
        return next((value for value in values if isinstance(value, (int, float)) and value), None)

    width, height, num_frames = said("width"), said("height"), said(*FRAMES_INPUTS)
    seconds = said("seconds", "duration")
    if seconds is None and num_frames is not None:
        seconds = num_frames / (said("frame_rate", "fps") or frames_per_second(graph))
    return {
        "prompt": inputs["prompt"] if isinstance(inputs.get("prompt"), str) else None,
        "size": f"{width}x{height}" if width and height else "auto",
        "seconds": "auto" if seconds is None else f"{seconds:.4g}",
    }


def video_of(job: Job, context: Context) -> Video:
    """A job as OpenAI's video object."""
    error = None
    if job.error is not None:
        message = f"{job.error.cause} ({job.error.remedy})" if job.error.remedy else job.error.cause
        error = VideoError(code=job.error.code, message=message)
    elif job.state == "aborted":
        error = VideoError(code="aborted", message="it was aborted")
    finished = job.finished_at if job.state == "done" else None
    return Video(
        id=job.id,
        model=job.graph,
        status=STATES[job.state],
        progress=100 if job.state == "done" else min(int(job.progress * 100), 99),
        created_at=int(job.created_at),
        completed_at=None if finished is None else int(finished),
        expires_at=None if finished is None else int(finished + context.service.settings.keep_seconds),
        prompt=job.meta.get("prompt"),
        size=job.meta.get("size", "auto"),
        seconds=job.meta.get("seconds", "auto"),
        seed=job.seed,
        error=error,
    )


def first_frame(place: Path | bytes) -> bytes:
    """The first picture of a clip of ours, as WebP. Blocks."""
    import av

    with av.open(io.BytesIO(place) if isinstance(place, bytes) else str(place), "r") as container:
        frame = next(container.decode(video=0))
        return encode_image(frame.to_image(), "webp")  # type: ignore[no-untyped-call]


def build_router(context: Context) -> APIRouter:
    """Routes below /v1/videos."""
    router, videos = APIRouter(tags=["OpenAI"]), Videos(context)
    routes: Routes = (
        (
            "POST",
            "/v1/videos",
            videos.create,
            {
                "summary": "Make a video",
                "answer": Video,
                "body": VideoRequest,
                "api": KIND,
                "files": ("input_reference",),
                "errors": CREATE_ERRORS,
                "headers": ("Idempotency-Key",),
            },
        ),
        ("GET", "/v1/videos", videos.list_all, {"summary": "List videos", "answer": VideoList}),
        ("GET", "/v1/videos/{video_id}", videos.one, {"summary": "One video", "answer": Video}),
        (
            "GET",
            "/v1/videos/{video_id}/content",
            videos.content,
            {
                "summary": "Download a video",
                "content": {"video/mp4": FILE, "image/webp": FILE},
                "errors": (400, 401, 404, 409),
            },
        ),
        ("DELETE", "/v1/videos/{video_id}", videos.delete, {"summary": "Delete a video", "answer": VideoDeleted}),
    )
    add_routes(router, routes)
    return router
