"""Stored jobs as a waiting client sees them: followed to their end, and their outputs read back."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.errors import StageError
from omni.files import SUFFIXES, read_media
from omni.messages import Aborted, Done, Event, Failed, Queued, StagePreview, StageProgress, StageText
from omni.server.jobs import Draining, Job, JobEvent, JobOrder, StoreError
from omni.server.media_inputs import parse_data_url
from omni.server.service import Service
from omni.server.timing import note_graph_seconds

if TYPE_CHECKING:
    from PIL import Image

ABORT_SECONDS = 10.0
MAX_PREVIEW_BYTES = 1024**2


async def finish_job(service: Service, order: JobOrder) -> Job:
    """Store an order, and wait until its job is over; a caller that is cancelled aborts the job,
    as `submit` does while the order is stored.

    With an idempotency key the job goes on without its caller: who sends the key again will find it.
    """
    job = await service.submit(order)
    try:
        await wait_for_end(service, job)
    except BaseException:
        if order.idempotency_key is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(service.abort(job.id)), ABORT_SECONDS)
        raise
    return await reload(service, job)


async def wait_for_end(service: Service, job: Job) -> None:
    """Return when the job is over. Raises Draining when the server stops before."""
    if not job.is_final:
        async for event in service.events(job.id):
            if event.is_final:
                if event.type == "done":
                    note_graph_seconds(event.data["seconds"])
                return
        await _check_over(service, job)


async def stored_events(service: Service, order: JobOrder) -> AsyncGenerator[Event, None]:
    """The events of a stored order, old and new, as those of a request that runs here."""
    job = await service.submit(order)
    async for event in service.events(job.id):
        if event.is_final:
            break
        if (told := as_event(event)) is not None:
            yield told
    yield await final_event(service, await _check_over(service, job))


async def _check_over(service: Service, job: Job) -> Job:
    """The job, which should be over: its events have ended."""
    now = await reload(service, job)
    if not now.is_final:
        raise Draining(f"the server stops before {job.id} is over; ask for the job again later")
    return now


async def reload(service: Service, job: Job) -> Job:
    """The job as it is now. Raises StoreError when it was removed meanwhile."""
    now = await service.get(job.id)
    if now is None:
        raise StoreError(f"{job.id} was removed while it was waited for")
    return now


def as_event(event: JobEvent) -> Event | None:
    """The message behind a stored event, for those that answers are made of."""
    data = event.data
    match event.type:
        case "queued":
            return Queued(request_id=event.job_id)
        case "progress":
            kept = {name: data[name] for name in ("stage", "step", "num_steps", "unit")}
            return StageProgress(request_id=event.job_id, **kept)
        case "text":
            return StageText(request_id=event.job_id, stage=data["stage"], text=data["text"])
        case "preview":
            step = data["step"]
            image = open_image(parse_data_url(data["image"], MAX_PREVIEW_BYTES, "preview")[1])
            num_steps = data.get("num_steps", step)
            return StagePreview(
                request_id=event.job_id, stage=data["stage"], step=step, num_steps=num_steps, image=image
            )
    return None


async def final_event(service: Service, job: Job) -> Event:
    """How a job ended, with its outputs."""
    if job.state == "done":
        return Done(request_id=job.id, outputs=await read_outputs(service, job))
    if job.error is not None:
        error = StageError(job.error.stage or job.graph, job.error.cause, job.error.remedy)
        return Failed(request_id=job.id, error=error)
    return Aborted(request_id=job.id)


async def read_outputs(service: Service, job: Job) -> dict[str, Any]:
    """A finished job's outputs as values: a list for each output, in order."""
    outputs: dict[str, Any] = {}
    for output in job.outputs:
        found = await service.open_output(job.id, output.name, output.index)
        if found is None:
            raise StoreError(f"{job.id}: the file of its output '{output.name}' is gone")
        file, place = found
        outputs.setdefault(output.name, []).append(await asyncio.to_thread(_read_value, file.type, place))
    return {name: values if _is_list(job, name) else values[0] for name, values in outputs.items()}


def _is_list(job: Job, name: str) -> bool:
    found = [output for output in job.outputs if output.name == name]
    return len(found) > 1 or found[0].type == "image"


def _read_value(kind: str, place: Path | bytes) -> Any:
    if kind in ("text", "json"):
        text = (place if isinstance(place, bytes) else place.read_bytes()).decode()
        return text if kind == "text" else json.loads(text)
    if kind == "image":
        return open_image(place)
    if isinstance(place, Path):
        return read_media(place, kind)
    with tempfile.NamedTemporaryFile(suffix=SUFFIXES[kind][0]) as file:
        file.write(place)
        file.flush()
        return read_media(file.name, kind)


def open_image(place: Path | bytes) -> Image.Image:
    """A picture of the store, or of an event. Blocks."""
    from PIL import Image

    with Image.open(io.BytesIO(place) if isinstance(place, bytes) else place) as image:
        image.load()
        return image
