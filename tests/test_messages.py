"""Every message survives a pickle with its type and fields, and cannot be changed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from omni import messages
from omni.errors import StageSetupError
from omni.messages import Failed, Message

ERROR = StageSetupError("draw", "no such folder", "check the path")
VALUES: dict[str, Any] = {
    "id": "r1",
    "request_id": "r1",
    "inputs": {"prompt": "a circle", "height": 128},
    "seed": 7,
    "step": 2,
    "num_steps": 8,
    "unit": "denoise step",
    "preview_every": 5,
    "image": b"pixels",
    "text": "a small blue",
    "payload": {"images": [b"pixels"]},
    "stage": "draw",
    "source": "rewrite",
    "target": "draw",
    "transport": "object_store",
    "seconds": 0.25,
    "bytes": 4096,
    "outputs": {"image": [b"pixels"]},
    "error": ERROR,
    "reason": "client went away",
    "component": "transformer",
    "done_bytes": 1,
    "total_bytes": 2,
    "state": "ready",
    "load_seconds": 1.5,
    "peak_device_bytes": 8192,
    "peak_host_bytes": 16384,
}
"""Field name -> a value for it: a name means the same in every message."""


def all_kinds(base: type[Message] = Message) -> Iterator[type[Message]]:
    """Every message of messages.py."""
    for kind in base.__subclasses__():
        if kind.__module__ == messages.__name__:
            yield kind
        yield from all_kinds(kind)


def sample(kind: type[Message]) -> Message:
    """A message of this kind with every field set."""
    return kind(**{name: VALUES[name] for name in kind.__struct_fields__})


@pytest.mark.parametrize("kind", list(all_kinds()), ids=lambda kind: kind.__name__)
def test_pickle_keeps_type_and_fields(kind: type[Message]) -> None:
    message = sample(kind)
    copy = pickle.loads(pickle.dumps(message))
    assert type(copy) is kind
    for name in kind.__struct_fields__:
        assert repr(getattr(copy, name)) == repr(VALUES[name])


@pytest.mark.parametrize(
    "kind", [kind for kind in all_kinds() if kind.__struct_fields__], ids=lambda kind: kind.__name__
)
def test_messages_are_frozen(kind: type[Message]) -> None:
    message = sample(kind)
    with pytest.raises(AttributeError, match="immutable"):
        setattr(message, kind.__struct_fields__[0], None)


def test_a_failure_keeps_the_type_of_its_error() -> None:
    copy = pickle.loads(pickle.dumps(Failed(request_id="r1", error=ERROR)))
    assert type(copy.error) is StageSetupError
    assert copy.error.remedy == "check the path"


def test_tags_are_unique_so_that_json_can_tell_messages_apart() -> None:
    tags = [kind.__struct_config__.tag for kind in all_kinds()]
    assert len(tags) == len(set(tags))
    assert msgspec.to_builtins(sample(messages.Progress))["type"] == "Progress"
