"""Request fields: names, types, defaults, seeds, and reading them from text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from omni.errors import InputError
from omni.graph import Graph
from omni.inputs import MAX_SEED, build_request, is_media, parse_field
from omni.load import load_graph
from omni.media import Audio, Video
from omni.testing import doubles

TYPES = ("text", "image", "video", "audio", "tensor", "json", "any")
VALUES: dict[str, Any] = {
    "text": "a",
    "image": Image.new("RGB", (1, 1)),
    "video": Video(np.zeros((1, 1, 1, 3), dtype=np.uint8), 1.0),
    "audio": Audio(np.zeros((1, 1), dtype=np.float32), 1),
    "tensor": np.zeros(1),
    "json": {"a": 1},
}


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with doubles():
        yield


def graph_of(inputs: dict[str, Any], **stage: Any) -> Graph:
    ports = {name: field["type"] for name, field in inputs.items()}
    return load_graph({"inputs": inputs, "stages": {"s": {"kind": "double", "ports": ports, **stage}}}).graph


def one(port_type: str, **field: Any) -> Graph:
    return graph_of({"x": {"type": port_type, **field}})


def test_defaults_fill_what_is_left_out() -> None:
    graph = one("text", default="water")
    assert build_request(graph, {}).inputs == {"x": "water"}
    assert build_request(graph, {"x": "oil"}).inputs == {"x": "oil"}
    assert build_request(graph, {"x": None}).inputs == {"x": "water"}


def test_defaults_are_copies() -> None:
    graph = one("json", default={"a": [1]})
    build_request(graph, {}).inputs["x"]["a"].append(2)
    assert build_request(graph, {}).inputs == {"x": {"a": [1]}}


@pytest.mark.parametrize("value", ["a\udcff", {"a": ["\ud800"]}, {"\udcff": 1}])
def test_text_that_is_not_utf_8_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"input 'x' is not valid UTF-8 text: '.*\\ud"):
        build_request(one("json"), {"x": value})


def test_unknown_inputs_get_the_nearest_match() -> None:
    with pytest.raises(InputError) as caught:
        build_request(graph_of({"style": {"type": "text"}}), {"stile": "oil"})
    assert str(caught.value) == "unknown input 'stile', did you mean 'style'? (this graph takes: style)"


def test_a_needed_input_is_named_with_its_stage(tmp_path: Path) -> None:
    (tmp_path / "frames_of_inputs.py").write_text("def shout(words: str) -> str:\n    return words.upper()\n")
    document = {
        "inputs": {"words": {"type": "text"}},
        "stages": {"shout": {"kind": "function", "call": "frames_of_inputs:shout"}},
    }
    graph = load_graph(document, base_dir=tmp_path).graph
    with pytest.raises(InputError) as caught:
        build_request(graph, {})
    assert str(caught.value) == "input 'words' is missing: stage 'shout' needs it"


@pytest.mark.parametrize("wanted", TYPES)
@pytest.mark.parametrize("given_type", VALUES)
def test_each_type_takes_its_own_values(wanted: str, given_type: str) -> None:
    fits = wanted in (given_type, "any") or (wanted == "json" and given_type == "text")
    graph = one(wanted)
    if fits:
        assert build_request(graph, {"x": VALUES[given_type]}).inputs["x"] is VALUES[given_type]
    else:
        with pytest.raises(InputError, match=r"input 'x' must be .*, not "):
            build_request(graph, {"x": VALUES[given_type]})


@pytest.mark.parametrize("kind", VALUES)
def test_lists_hold_their_type(kind: str) -> None:
    graph = one(f"list[{kind}]")
    assert build_request(graph, {"x": [VALUES[kind]] * 2}).inputs["x"] == [VALUES[kind]] * 2
    with pytest.raises(InputError, match="input 'x' must be a list, each item "):
        build_request(graph, {"x": VALUES[kind]})
    if kind not in ("json", "text"):
        with pytest.raises(InputError, match=r"input 'x' must be .*, not str"):
            build_request(graph, {"x": ["word"]})


def test_a_list_needs_a_stage_that_takes_one() -> None:
    with pytest.raises(InputError, match="must be text, not a list: stage 's' takes one"):
        build_request(one("text"), {"x": ["a", "b"]})


@given(st.integers(0, MAX_SEED))
def test_seeds_are_kept(seed: int) -> None:
    assert build_request(one("text"), {}, seed=seed).seed == seed


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.5, "7", True])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(InputError, match=r"seed must be a whole number from 0 to 4294967295, not "):
        build_request(one("text"), {}, seed=seed)


@pytest.mark.parametrize("every", [-1, 1.5, "5", True])
def test_previews_come_every_so_many_steps(every: Any) -> None:
    assert build_request(one("text"), {}, preview_every=5).preview_every == 5
    with pytest.raises(InputError, match="preview_every must be a number of steps"):
        build_request(one("text"), {}, preview_every=every)


def test_missing_seeds_and_ids_differ() -> None:
    requests = [build_request(one("text"), {}) for _ in range(20)]
    assert len({request.seed for request in requests}) > 1
    assert len({request.id for request in requests}) == 20


@pytest.mark.parametrize(
    ("port_type", "text", "value"),
    [
        ("text", "42", "42"),
        ("list[text]", "[1]", "[1]"),
        ("json", "42", 42),
        ("json", '{"a": [1]}', {"a": [1]}),
        ("json", "plain words", "plain words"),
        ("any", "true", True),
        ("any", "yes", "yes"),
    ],
)
def test_texts_are_read_by_type(port_type: str, text: str, value: Any) -> None:
    assert parse_field(one(port_type), "x", text) == value


def test_unknown_fields_stay_text() -> None:
    assert parse_field(one("json"), "y", "1") == "1"


def test_media_are_files(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    assert parse_field(one("list[image]"), "x", str(tmp_path / "a.png")).size == (3, 2)
    assert is_media(one("list[image]"), "x")
    assert not is_media(one("json"), "x")
    assert not is_media(one("image"), "y")
