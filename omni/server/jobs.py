"""The nouns of the server: jobs, what happens to them, what clients order, and why an order is refused.

Instants are wall-clock seconds since 1970 (`time.time()`); sizes are bytes. Everything but JobOrder is plain data that
the store keeps and JSON can carry.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any, Literal, get_args

import msgspec

from omni.errors import OmniError

JobState = Literal["queued", "running", "done", "failed", "aborted"]
FINAL_STATES = ("done", "failed", "aborted")
EventType = Literal[
    "queued",
    "stage_started",
    "progress",
    "text",
    "preview",
    "stage_finished",
    "hop",
    "restarted",
    "output",
    "done",
    "failed",
    "aborted",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
FINAL_EVENTS = FINAL_STATES
"""Types of the event that ends a job; each bears the name of the job's state from then on."""


JOB_ID = re.compile(r"job_[0-9a-f]{24}")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is stored."""


class OutputFile(Record, frozen=True, kw_only=True):
    """One value of one output of a job."""

    name: str
    """Of the graph's output."""
    index: int = 0
    """Number of the value in a list, from 0."""
    type: str
    """Port type: image, video, audio, text, json or tensor."""
    media_type: str
    """MIME type of the file."""
    blob: str
    """Name in the FileStore; empty when `text` holds the value."""
    bytes: int
    text: str | None = None
    """A short text, or JSON as text; None for what has a file."""


class JobError(Record, frozen=True, kw_only=True):
    """Why a job failed."""

    stage: str = ""
    """The stage that failed; empty when it was none."""
    cause: str
    remedy: str = ""
    """What the user can do, or empty."""
    code: str = "stage_failed"
    """Short word for programs: stage_failed, stage_died, stage_timeout, invalid_input, output_failed, poisoned, ..."""


class Job(Record, frozen=True, kw_only=True):
    """A stored request, from its acceptance until retention removes it."""

    id: str
    graph: str
    kind: str = "job"
    """The API that made it: job, video, image or audio."""
    state: JobState = "queued"
    created_at: float
    started_at: float | None = None
    """When its last run began."""
    finished_at: float | None = None
    inputs: dict[str, Any] = {}
    """JSON; a medium is `{"blob": name in the FileStore, "type": port type, ...}`."""
    seed: int = 0
    priority: int = 0
    key: str = ""
    """Who asked: name of the API key, or empty."""
    attempt: int = 1
    """1, and one more for each time that it went back to the queue."""
    progress: float = 0.0
    """0 to 1, over all stages."""
    outputs: tuple[OutputFile, ...] = ()
    error: JobError | None = None
    meta: dict[str, Any] = {}
    """What the API that made it keeps: size, model, webhook, preview_every ..."""
    idempotency_key: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in FINAL_STATES


class JobEvent(Record, frozen=True, kw_only=True):
    """Something that happened to a job. Numbers of a job's events start at 1 and have no gap."""

    job_id: str
    sequence: int
    type: EventType
    data: dict[str, Any] = {}
    at: float = 0.0

    @property
    def is_final(self) -> bool:
        """Whether it is the job's last event."""
        return self.type in FINAL_EVENTS


class JobOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for."""

    graph: str
    inputs: dict[str, Any] = {}
    """Python values: text, numbers, PIL images, omni.media.Video and Audio, arrays."""
    seed: int | None = None
    """Drawn at random when None."""
    kind: str = "job"
    priority: int = 0
    """Higher runs first; -100 to 100."""
    key: str = ""
    meta: dict[str, Any] = {}
    """JSON. `webhook` in it is an address that is told when the job is over."""
    idempotency_key: str | None = None
    preview_every: int = 0
    """Send a preview at most every so many steps; 0: none."""
    request_id: str | None = None
    """For `Service.stream`: the id in its events. A job has its own."""


class ServiceError(OmniError):
    """The service does not take an order, or cannot do its work."""


class QueueFull(ServiceError):
    """As many requests wait as may wait; `retry_after_seconds` is when it is worth another try."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message, retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return str(self.args[0])


class Draining(ServiceError):
    """The service is stopping and takes nothing new."""


class IdempotencyConflict(ServiceError):
    """The idempotency key belongs to another order."""


class StoreError(ServiceError):
    """The job store or the file store cannot be used; the message names the remedy."""


def new_job_id() -> str:
    """`job_` and 24 hex digits: 8 of the time in seconds, so that its age can be told, and 16 at random."""
    return f"job_{int(time.time()) & 0xFFFFFFFF:08x}{secrets.token_hex(8)}"


def age_of(job_id: str) -> float:
    """Seconds since a job's id was made, by the time in it."""
    return time.time() - int(job_id[4:12], 16)


def output_url(job_id: str, output: OutputFile) -> str:
    """Address of an output's value, from the server's root."""
    return f"/v1/jobs/{job_id}/outputs/{output.name}?index={output.index}"
