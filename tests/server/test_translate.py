"""From a runner's events to a job's."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from omni.errors import StageDiedError, StageError, StageTimeoutError
from omni.messages import (
    Event,
    HopFinished,
    Queued,
    StageFinished,
    StagePreview,
    StageProgress,
    StageStarted,
    StageText,
)
from omni.server.encoding import PREVIEW_PIXELS
from omni.server.jobs import JobError
from omni.server.translate import Translator, job_error


def about(stage: str) -> dict[str, str]:
    return {"request_id": "r", "stage": stage}


@pytest.mark.parametrize(
    ("event", "draft"),
    [
        (Queued(request_id="r"), None),
        (StageStarted(**about("a")), ("stage_started", {"stage": "a"})),
        (StageText(**about("a"), text="x\ud800"), ("text", {"stage": "a", "text": "x?"})),
        (
            StageFinished(**about("a"), seconds=1.0, bytes=2),
            ("stage_finished", {"stage": "a", "seconds": 1.0, "bytes": 2}),
        ),
        (
            HopFinished(request_id="r", source="a.x", target="b.y", transport="local", seconds=0.5, bytes=3),
            ("hop", {"source": "a.x", "target": "b.y", "transport": "local", "seconds": 0.5, "bytes": 3}),
        ),
    ],
)
def test_events(event: Event, draft: object) -> None:
    assert Translator(2).translate(event) == draft


def test_progress_counts_all_stages_and_never_falls() -> None:
    translator = Translator(4)
    seen = []
    for stage, step, num_steps in (("a", 1, 2), ("a", 2, 2), ("b", 5, 10), ("b", 1, 10), ("c", 9, 3), ("d", 1, 0)):
        draft = translator.translate(StageProgress(**about(stage), step=step, num_steps=num_steps))
        assert draft is not None
        seen.append(draft.data["progress"])
    assert seen == [0.125, 0.25, 0.375, 0.375, 0.625, 0.625]
    translator.translate(StageFinished(**about("b"), seconds=0.0, bytes=0))
    assert translator.progress == 0.75


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_previews_are_small(mode: str) -> None:
    image = Image.new(mode, (1024, 512))
    draft = Translator(1).translate(StagePreview(**about("a"), step=3, num_steps=9, image=image))
    assert draft is not None
    assert (draft.data["stage"], draft.data["step"]) == ("a", 3)
    head, _, data = draft.data["image"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as small:
        assert (small.format, small.size) == ("JPEG", (PREVIEW_PIXELS, PREVIEW_PIXELS // 2))
    assert image.size == (1024, 512)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StageError("a", "bad", "do this", "Traceback"), "stage_failed"),
        (StageTimeoutError("a", "bad", "do this"), "stage_timeout"),
        (StageDiedError("a", "bad", "do this"), "stage_died"),
    ],
)
def test_errors_have_codes_and_no_traceback(error: StageError, code: str) -> None:
    assert job_error(error) == JobError(stage="a", cause="bad", remedy="do this", code=code)
