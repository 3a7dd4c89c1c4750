"""Events as JSON lines."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.cli.events import Written, encode_event
from omni.errors import StageDiedError
from omni.media import Audio, Video
from omni.messages import Done, Failed, HopFinished, LoadProgress, StageProgress


def decoded(event: Any) -> dict[str, Any]:
    line = encode_event(event)
    assert "\n" not in line
    return dict(json.loads(line))


def test_plain_events_keep_their_fields() -> None:
    assert decoded(StageProgress(request_id="r", stage="draw", step=1, num_steps=4, unit="denoise step")) == {
        "type": "StageProgress",
        "request_id": "r",
        "stage": "draw",
        "step": 1,
        "num_steps": 4,
        "unit": "denoise step",
    }
    hop = HopFinished(request_id="r", source="a.text", target="b.x", transport="local", seconds=0.5, bytes=3)
    assert decoded(hop)["transport"] == "local"
    assert decoded(LoadProgress(stage="a", component="vae", done_bytes=1, total_bytes=2))["type"] == "LoadProgress"
    assert decoded(Written(request_id="r", seed=7, files=["a.png"]))["files"] == ["a.png"]


def test_errors_are_told_in_parts() -> None:
    error = StageDiedError("draw", "went away", "try again", "frames")
    expected = {"type": "StageDiedError", "stage": "draw", "cause": "went away", "remedy": "try again"}
    assert decoded(Failed(request_id="r", error=error))["error"] == expected


@pytest.mark.parametrize(
    ("value", "summary"),
    [
        ("two\nlines", "two\nlines"),
        ([Image.new("L", (4, 3))], [{"kind": "image", "width": 4, "height": 3, "mode": "L"}]),
        (
            Video(np.zeros((2, 3, 4, 3), dtype=np.uint8), 8.0),
            {"kind": "video", "num_frames": 2, "width": 4, "height": 3, "fps": 8.0},
        ),
        (
            Audio(np.zeros((2, 9), dtype=np.float32), 16000),
            {"kind": "audio", "num_channels": 2, "num_samples": 9, "rate": 16000},
        ),
        (np.zeros((2, 3), dtype=np.float16), {"kind": "tensor", "shape": [2, 3], "dtype": "float16"}),
        ({"a": [1, None, 2.5]}, {"a": [1, None, 2.5]}),
        ({"a": {1}}, {"a": [1]}),
        (1 + 2j, "(1+2j)"),
    ],
)
def test_outputs_are_summarised(value: Any, summary: Any) -> None:
    assert decoded(Done(request_id="r", outputs={"x": value}))["outputs"] == {"x": summary}
