"""The pictures, clips, sounds and tensors that a job was given, so that a client can ask for the same again."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from omni.media import Audio
from omni.server.context import Context
from omni.server.errors import not_found
from omni.server.files import FileStore
from omni.server.job_object import shown_input
from omni.server.openapi import operation
from omni.server.routes.jobs import SAFE_HEADERS, find_job
from omni.server.values import read_inputs, read_long

MEDIA_TYPES = {
    "image": "image/png",
    "video": "video/x-matroska",
    "audio": "audio/wav",
    "tensor": "application/octet-stream",
    "text": "text/plain; charset=utf-8",
    "json": "application/json",
}
WAV_HEADER = "<4sI4s4sIHHIIHH4sI"
FLOAT_SAMPLES = 3
"""WAVE_FORMAT_IEEE_FLOAT, see RFC 2361."""


def float_wav(audio: Audio) -> bytes:
    """The sound as a WAV file of 32-bit floats, without loss."""
    import numpy as np

    data = np.ascontiguousarray(audio.samples.T, dtype="<f4").tobytes()
    num_channels, frame = len(audio.samples), 4 * len(audio.samples)
    form = (b"fmt ", 16, FLOAT_SAMPLES, num_channels, audio.rate, audio.rate * frame, frame, 32)
    return struct.pack(WAV_HEADER, b"RIFF", 36 + len(data), b"WAVE", *form, b"data", len(data)) + data


def read_medium(files: FileStore, reference: dict[str, Any]) -> Path | bytes:
    """The file behind a stored medium: its local path, or its bytes. Blocks; raises FileNotFoundError."""
    if reference["type"] == "text":
        return str(read_long(files, reference)).encode("utf-8", "replace")
    if reference["type"] == "json":
        return msgspec.json.encode(shown_input(read_long(files, reference)))
    if reference["type"] != "audio":
        return files.open_sync(reference["blob"])
    return float_wav(read_inputs(files, {"audio": reference})["audio"])


def build_router(context: Context) -> APIRouter:
    """GET /v1/jobs/{job_id}/inputs/{name}."""
    router = APIRouter(tags=["Omni"])

    @router.get(
        "/v1/jobs/{job_id}/inputs/{name}",
        **operation(
            "A picture, clip, sound, tensor, long text or long JSON that a job was given",
            content={"*/*": {"type": "string", "format": "binary"}},
            errors=(400, 401, 404),
        ),
    )
    async def medium(request: Request, job_id: str, name: str, index: Annotated[int, Query(ge=0)] = 0) -> Response:
        """A medium of an input, `index` of a list, as a file without loss."""
        job = await find_job(context, request, job_id)
        given = job.inputs.get(name)
        items = given if isinstance(given, list) else [given]
        reference = items[index] if index < len(items) else None
        if not isinstance(reference, dict) or "blob" not in reference:
            raise not_found(f"job {job.id} was given no file as '{name}' with index {index}", "name")
        files = context.service.files
        try:
            place = await files.call(lambda: read_medium(files, reference))
        except FileNotFoundError:
            raise not_found(f"the file that job {job.id} was given as '{name}' is gone", "name") from None
        media_type = MEDIA_TYPES[reference["type"]]
        if isinstance(place, Path):
            return FileResponse(place, media_type=media_type, headers=SAFE_HEADERS)
        return Response(place, media_type=media_type, headers=SAFE_HEADERS)

    return router
