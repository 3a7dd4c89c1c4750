"""From a runner's events to what a job's listeners hear, and how far the job is."""

from __future__ import annotations

from typing import Any

from omni.errors import StageDiedError, StageError, StageSetupError, StageTimeoutError
from omni.messages import Event, HopFinished, StageFinished, StagePreview, StageProgress, StageStarted, StageText
from omni.server.changes import Draft
from omni.server.encoding import preview_url
from omni.server.jobs import JobError, OutputFile, output_url

MAX_CAUSE_CHARACTERS = 4000
CODES: tuple[tuple[type[StageError], str], ...] = (
    (StageTimeoutError, "stage_timeout"),
    (StageDiedError, "stage_died"),
    (StageSetupError, "stage_setup"),
    (StageError, "stage_failed"),
)


class Translator:
    """The events of one run of a job."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = max(num_stages, 1)
        self._parts: dict[str, float] = {}

    @property
    def progress(self) -> float:
        """0 to 1: each stage counts the same, since nobody knows how long it will take."""
        return min(sum(self._parts.values()) / self._num_stages, 1.0)

    def translate(self, event: Event) -> Draft | None:
        """The job's event; None for `Queued` and the final ones, which the run itself records."""
        match event:
            case StageStarted():
                return Draft("stage_started", {"stage": event.stage})
            case StageProgress():
                part = event.step / event.num_steps if event.num_steps else 0.0
                self._parts[event.stage] = max(self._parts.get(event.stage, 0.0), min(part, 1.0))
                return Draft("progress", self._progress_data(event))
            case StageText():
                return Draft("text", {"stage": event.stage, "text": clean(event.text)})
            case StagePreview():
                return Draft("preview", {"stage": event.stage, "step": event.step, "image": preview_url(event.image)})
            case StageFinished():
                self._parts[event.stage] = 1.0
                data = {"stage": event.stage, "seconds": event.seconds, "bytes": event.bytes}
                return Draft("stage_finished", data)
            case HopFinished():
                return Draft("hop", hop_data(event))
        return None

    def _progress_data(self, event: StageProgress) -> dict[str, Any]:
        return {
            "stage": event.stage,
            "step": event.step,
            "num_steps": event.num_steps,
            "unit": event.unit,
            "progress": round(self.progress, 4),
        }


def hop_data(event: HopFinished) -> dict[str, Any]:
    """Fields of a hop."""
    return {name: getattr(event, name) for name in ("source", "target", "transport", "seconds", "bytes")}


def job_error(error: StageError) -> JobError:
    """What a client is told of a stage's error: no traceback."""
    code = next(code for kind, code in CODES if isinstance(error, kind))
    cause, remedy = clean(error.cause[:MAX_CAUSE_CHARACTERS]), clean(error.remedy[:MAX_CAUSE_CHARACTERS])
    return JobError(stage=error.stage, cause=cause, remedy=remedy, code=code)


def clean(text: str) -> str:
    """Text that can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def output_data(job_id: str, output: OutputFile) -> dict[str, Any]:
    """What listeners hear of an output."""
    url = output_url(job_id, output)
    about = {"name": output.name, "index": output.index, "type": output.type, "url": url}
    return about | {"media_type": output.media_type, "bytes": output.bytes}
