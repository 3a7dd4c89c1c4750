"""A job as clients see it, on the wire and in webhooks."""

from __future__ import annotations

from typing import Any

import msgspec

from omni.server.answers import Answer
from omni.server.jobs import Job, JobError, JobState, output_url


class OutputObject(Answer, frozen=True, kw_only=True):
    """One value of an output."""

    url: str
    type: str
    """text, image, video, audio, tensor or json."""
    media_type: str
    bytes: int
    text: str | None = None
    """A short text, or JSON as text, so that it need not be fetched."""


class JobObject(Answer, frozen=True, kw_only=True, tag_field="object", tag="job", omit_defaults=False):
    """A job. Times are seconds since 1970."""

    id: str
    graph: str
    kind: str
    """The API that made it: job, image, video or audio."""
    state: JobState
    created_at: float
    started_at: float | None
    finished_at: float | None
    seed: int
    priority: int
    attempt: int
    progress: float
    """0 to 1, over all stages."""
    inputs: dict[str, Any]
    """What it was made of; a medium is `{"type": "image"}`, a long text `{"type": "text"}`."""
    outputs: dict[str, list[OutputObject]]
    """Empty until it is done."""
    error: JobError | None


class JobList(Answer, frozen=True, kw_only=True, tag_field="object", tag="list", omit_defaults=False):
    """GET /v1/jobs."""

    data: list[JobObject]
    has_more: bool


class JobDeleted(Answer, frozen=True, kw_only=True, tag_field="object", tag="job.deleted"):
    """DELETE /v1/jobs/{id}, for a job that was over."""

    id: str
    deleted: bool


def job_object(job: Job, base: str = "") -> JobObject:
    """The job on the wire; `base` is put before the addresses of its outputs."""
    outputs: dict[str, list[OutputObject]] = {}
    for output in job.outputs:
        outputs.setdefault(output.name, []).append(
            OutputObject(
                url=base + output_url(job.id, output),
                type=output.type,
                media_type=output.media_type,
                bytes=output.bytes,
                text=output.text,
            )
        )
    return JobObject(
        id=job.id,
        graph=job.graph,
        kind=job.kind,
        state=job.state,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        seed=job.seed,
        priority=job.priority,
        attempt=job.attempt,
        progress=job.progress,
        inputs={name: shown_input(value) for name, value in job.inputs.items()},
        outputs=outputs,
        error=job.error,
    )


def job_document(job: Job) -> dict[str, Any]:
    """The job as plain data, for webhooks."""
    return dict(msgspec.to_builtins(job_object(job)))


def shown_input(value: Any) -> Any:
    """An input without the names of files in the store."""
    if isinstance(value, list):
        return [shown_input(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "blob" in value:
        return {"type": value["type"]}
    if value.keys() == {"json"}:
        return value["json"]
    return {name: shown_input(item) for name, item in value.items()}
