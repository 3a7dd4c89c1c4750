"""Events as JSON lines: what `omni run --events` prints. docs/cli.md describes them."""

from __future__ import annotations

from typing import Any

import msgspec

from omni.errors import StageError
from omni.files import kind_of
from omni.messages import Message


class Written(Message, frozen=True, kw_only=True):
    """The last line of a request that is done: its seed and the files it became."""

    request_id: str
    seed: int
    files: list[str]


def encode_event(event: Message) -> str:
    """One line of JSON; `type` is the class of the event, and media are summarised by `kind`, size and shape."""
    fields = {name: _summary(getattr(event, name)) for name in event.__struct_fields__}
    return msgspec.json.encode({"type": type(event).__name__, **fields}, enc_hook=repr).decode()


def _summary(value: Any) -> Any:
    if isinstance(value, StageError):
        return {"type": type(value).__name__, "stage": value.stage, "cause": value.cause, "remedy": value.remedy}
    if isinstance(value, dict):
        return {str(key): _summary(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_summary(item) for item in value]
    match kind_of(value):
        case "image":
            return {"kind": "image", "width": value.width, "height": value.height, "mode": value.mode}
        case "video":
            num_frames, height, width = value.frames.shape[:3]
            return {"kind": "video", "num_frames": num_frames, "width": width, "height": height, "fps": value.fps}
        case "audio":
            num_channels, num_samples = value.samples.shape
            return {"kind": "audio", "num_channels": num_channels, "num_samples": num_samples, "rate": value.rate}
        case "tensor":
            return {"kind": "tensor", "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return value
