"""Inputs and outputs as JSON and files. What runs get is tested with the service."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omni.errors import InputError, UsageError
from omni.files import read_media
from omni.media import Audio, Video
from omni.server.files import FileStore
from omni.server.values import check_plain, digest_of, read_inputs, store_inputs, store_outputs

TEXTS = st.sampled_from(["blob", "json", "type", "a", ""])
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(tmp_path)
    yield store
    store.close()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text("ab", min_size=1), PLAIN, max_size=3))
def test_json_comes_back_as_it_is(files: FileStore, inputs: dict[str, Any]) -> None:
    """No object of a client is taken for a file."""
    for name, value in inputs.items():
        check_plain(name, value)
    stored, size = store_inputs(files, "job_1", inputs)
    assert size == 0
    assert read_inputs(files, json.loads(json.dumps(stored))) == inputs


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16", "I", "F", "CMYK", "HSV"])
def test_pictures_come_back_to_the_last_bit(files: FileStore, mode: str) -> None:
    size = len(Image.new(mode, (8, 2)).tobytes())
    image = Image.frombytes(mode, (8, 2), bytes(range(100, 100 + size)))
    stored, num_bytes = store_inputs(files, "job_1", {"image": [image]})
    (again,) = read_inputs(files, stored)["image"]
    assert (again.mode, again.size, again.tobytes()) == (mode, (8, 2), image.tobytes())
    assert num_bytes > 0


def test_palettes_become_colours(files: FileStore) -> None:
    stored, _ = store_inputs(files, "job_1", {"image": Image.new("RGB", (2, 2), "red").convert("P")})
    again = read_inputs(files, stored)["image"]
    assert (again.mode, again.getpixel((0, 0))) == ("RGBA", (255, 0, 0, 255))


def test_arrays_come_back(files: FileStore) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored, _ = store_inputs(files, "job_1", {"x": array})
    again = read_inputs(files, stored)["x"]
    assert again.dtype == np.float32
    assert (again == array).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "input 'x' holds nan, which JSON does not have"),
        ([math.inf], "input 'x' holds inf"),
        (2**63, "a whole number of more than 64 bits"),
        ({"a": b"bytes"}, "input 'x' holds a bytes, which cannot be stored"),
        ({1: 2}, "an object whose key is no text: 1"),
        (object(), "input 'x' holds a object"),
    ],
)
def test_what_cannot_be_stored_is_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_plain("x", value)


def test_depth_is_bounded() -> None:
    value: Any = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(InputError, match="more than 64 deep"):
        check_plain("x", value)


def test_digests_tell_values_apart() -> None:
    frames = np.zeros((2, 2, 2, 3), np.uint8)
    values: list[Any] = [
        "a",
        ["a"],
        {"a": 1},
        {"a": 2},
        Image.new("L", (1, 2)),
        Image.new("L", (2, 1)),
        Image.new("P", (2, 1)),
        Video(frames, 8.0),
        Video(frames, 9.0),
        Video(frames + 1, 8.0),
        Audio(np.zeros((1, 4), np.float32), 8000),
        Audio(np.zeros((2, 2), np.float32), 8000),
        np.zeros(2, np.uint8),
        np.zeros(2, np.int8),
    ]
    digests = [digest_of({"x": value}) for value in values]
    assert len(set(digests)) == len(values)
    assert digests == [digest_of({"x": value}) for value in values]
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_outputs_have_their_formats(files: FileStore) -> None:
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    sound = Audio(np.zeros((1, 8000), np.float32), 8000)
    outputs = {
        "pictures": [Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2))],
        "clip": Video(frames, 8.0),
        "sound": sound,
        "words": ["a", "b" * 100_000],
        "facts": {"a": [1, 2]},
        "numbers": np.zeros(3, np.float32),
    }
    stored = store_outputs(files, "job_1", outputs, {"clip": "sound"})
    shown = [(o.name, o.index, o.type, o.media_type.split(";")[0], o.text) for o in stored]
    assert shown == [
        ("pictures", 0, "image", "image/png", None),
        ("pictures", 1, "image", "image/png", None),
        ("clip", 0, "video", "video/mp4", None),
        ("sound", 0, "audio", "audio/wav", None),
        ("words", 0, "text", "text/plain", "a"),
        ("words", 1, "text", "text/plain", None),
        ("facts", 0, "json", "application/json", '{"a": [1, 2]}'),
        ("numbers", 0, "tensor", "application/octet-stream", None),
    ]
    for output in stored:
        if output.blob:
            path = files.open_sync(output.blob)
            assert isinstance(path, Path)
            assert path.stat().st_size == output.bytes
    clip = files.open_sync(stored[2].blob)
    assert isinstance(clip, Path)
    assert read_media(clip, "audio").samples.shape[0] == 1  # it has its sound


def test_what_no_file_can_hold_leaves_none(files: FileStore) -> None:
    outputs = {"good": Image.new("RGB", (2, 2)), "bad": Video(np.zeros((0, 1, 1, 3), np.uint8), 0.0)}
    with pytest.raises(UsageError) as caught:
        store_outputs(files, "job_1", outputs, {})
    assert files.folder is not None
    assert str(files.folder) not in str(caught.value)
    assert list((files.folder / "job_1").iterdir()) == []


@pytest.mark.parametrize(
    "value", ["\u00e9" * 40_000, {"blob": "x" * 70_000}, [{"json": 1}, "y" * 70_000], {"a": ["z"] * 30_000}]
)
def test_long_texts_and_json_lie_in_files(files: FileStore, value: Any) -> None:
    """Else every list of jobs would read them."""
    stored, size = store_inputs(files, "job_1", {"value": value, "short": "x"})
    assert len(json.dumps(stored)) < 200
    assert size > 64 * 1024
    assert stored["value"]["type"] == ("text" if isinstance(value, str) else "json")
    assert read_inputs(files, json.loads(json.dumps(stored))) == {"value": value, "short": "x"}
