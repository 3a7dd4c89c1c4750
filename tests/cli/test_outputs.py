"""Names of output files, and the checks before a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from omni.cli.outputs import OutputPlan, plan_outputs
from omni.errors import UsageError
from omni.files import items_of, read_media
from omni.graph import Graph
from omni.load import load_graph
from omni.media import Audio, Video
from omni.testing import doubles


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with doubles():
        yield


def graph_of(*gives: str, name: str = "pair") -> Graph:
    stages = {f"s{number}": {"kind": "double", "gives": give} for number, give in enumerate(gives)}
    outputs = {f"o{number}": f"s{number}.{give}" for number, give in enumerate(gives)}
    return load_graph({"name": name, "stages": stages, "outputs": outputs}).graph


def plan_of(types: dict[str, str], suffix: str = "", num_requests: int = 1, **sound_of: str) -> OutputPlan:
    return OutputPlan(Path(), "out", suffix, num_requests, types, sound_of)


def image() -> Image.Image:
    return Image.new("RGB", (2, 2))


def written(plan: OutputPlan, request: int = 0, **outputs: Any) -> list[str]:
    return [str(path) for path in plan.write(request, outputs, "")]


# Names ------------------------------------------------------------------------------------------------------------


def test_a_single_file_has_the_name_asked_for() -> None:
    assert written(plan_of({"image": "image"}, ".jpg"), image=[image()]) == ["out.jpg"]


def test_requests_items_and_outputs_are_told_apart_where_there_are_several() -> None:
    assert written(plan_of({"image": "image"}, ".png"), image=[image()] * 2) == ["out-1.png", "out-2.png"]
    assert written(plan_of({"image": "image"}, ".png", 12), 2, image=[image()]) == ["out-03.png"]
    two = plan_of({"a": "image", "b": "image"}, ".png", 2)
    assert written(two, 1, a=[image()] * 2, b=[image()]) == ["out-2-a-1.png", "out-2-a-2.png", "out-2-b.png"]


def test_outputs_of_other_types_take_their_own_suffix() -> None:
    plan = plan_of({"image": "image", "scores": "tensor", "caption": "text"}, ".png")
    assert written(plan, image=[image()], scores=np.zeros(1), caption="c") == ["out.png", "out.safetensors"]


def test_texts_are_written_only_when_asked_for() -> None:
    types = {"image": "image", "caption": "text", "facts": "json"}
    values = {"image": [image()], "caption": "c", "facts": {"a": 1}}
    assert written(plan_of(types), **values) == ["out.png"]
    assert written(plan_of(types, ".txt"), **values) == ["out.png", "out.txt"]
    assert written(plan_of(types, ".json"), **values) == ["out.png", "out.json"]


def test_outputs_of_any_type_go_by_their_value() -> None:
    plan = plan_of({"x": "any"}, ".webp")
    assert written(plan, x=[image()]) == ["out.webp"]
    assert written(plan, x={"a": 1}) == []


def test_a_sound_goes_into_its_clip() -> None:
    clip = Video(np.zeros((4, 8, 8, 3), dtype=np.uint8), 4.0)
    sound = Audio(np.zeros((1, 16000), dtype=np.float32), 16000)
    plan = plan_of({"video": "video", "audio": "audio"}, ".mp4", video="audio")
    assert written(plan, video=clip, audio=sound) == ["out.mp4"]
    assert read_media("out.mp4", "audio").samples.shape[0] == 1
    apart = plan_of({"video": "video", "audio": "audio"}, ".gif")
    assert written(apart, video=clip, audio=sound) == ["out.gif", "out.wav"]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3))
def test_names_never_meet(num_requests: int, num_items: int, num_outputs: int) -> None:
    plan = plan_of({f"o{number}": "image" for number in range(num_outputs)}, ".png", num_requests)
    names = [
        plan.path(request, name, item, num_items, "image")
        for request in range(num_requests)
        for name in plan.types
        for item in range(num_items)
    ]
    assert len(set(names)) == len(names) == num_requests * num_items * num_outputs
    assert [path for name in plan.types for path in sorted(p for p in names if name in p.name)] == [
        path for name in plan.types for path in names if name in path.name
    ]


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([["a"], ["b", "c"]], ["a", "b", "c"]),
        ([1, 2], [[1, 2]]),
        (["a", 1], [["a", 1]]),
        ([], [[]]),
        ({"a": ["b"]}, [{"a": ["b"]}]),
    ],
)
def test_lists_of_media_are_taken_apart(value: Any, items: list[Any]) -> None:
    assert items_of(value) == items


# Checks -----------------------------------------------------------------------------------------------------------


def test_names_of_our_own_are_free() -> None:
    graph = graph_of("image")
    assert plan_outputs(graph, None, 1).path(0, "o0", 0, 1, "image") == Path("pair-001.png")
    Path("pair-001-2.jpg").touch()
    Path("pair-002.txt").touch()
    Path("pair-xyz").touch()
    assert plan_outputs(graph, None, 1).stem == "pair-003"
    Path("pair-004.png").touch()
    assert plan_outputs(graph, None, 1).stem == "pair-003"


def test_a_name_taken_meanwhile_is_left_alone() -> None:
    plan = plan_outputs(graph_of("image"), None, 1)
    Path("pair-001.png").write_bytes(b"another run's")
    Path("pair-002.png").write_bytes(b"another run's")
    assert written(plan, o0=[image()]) == ["pair-003.png"]
    assert Path("pair-001.png").read_bytes() == b"another run's"
    assert sorted(path.name for path in Path().iterdir()) == ["pair-001.png", "pair-002.png", "pair-003.png"]
    assert written(plan_outputs(graph_of("image"), "pair-001.png", 1), o0=[image()]) == ["pair-001.png"]


def test_strange_graph_names_make_plain_file_names() -> None:
    assert plan_outputs(graph_of("image", name="a/b: c"), None, 1).stem == "a_b_c-001"
    assert plan_outputs(graph_of("image", name=".."), None, 1).stem == "graph-001"


def test_a_folder_takes_names_of_our_own(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "pair-001.png").touch()
    for output in ("there", "there/"):
        plan = plan_outputs(graph_of("image"), output, 1)
        assert plan.path(0, "o0", 0, 1, "image") == Path("there/pair-002.png")


def test_suffixes_may_be_in_capitals() -> None:
    assert plan_outputs(graph_of("image"), "A.PNG", 1).suffix == ".png"


@pytest.mark.parametrize(
    ("gives", "output", "message"),
    [
        (
            ("image", "text"),
            "a.bmp",
            "--output a.bmp: the graph gives o0 (image), o1 (text); allowed suffixes: .jpeg .jpg .png .txt .webp",
        ),
        (("text",), "a.png", "--output a.png: the graph gives o0 (text); allowed suffixes: .txt"),
        (("text",), "a", "--output a: a suffix is missing, or the folder does not exist (.txt)"),
        (("text",), "gone/a.txt", "gone: no such folder; make it first, or choose another --output"),
        (("text",), "gone/", "gone: no such folder; make it first, or choose another --output"),
        (("text",), "file/a.txt", "file: no such folder; make it first, or choose another --output"),
    ],
)
def test_outputs_that_cannot_be_are_told(gives: tuple[str, ...], output: str, message: str) -> None:
    Path("file").touch()
    with pytest.raises(UsageError) as caught:
        plan_outputs(graph_of(*gives), output, 1)
    assert str(caught.value) == message


def test_a_sound_of_the_same_stage_is_found(tmp_path: Path) -> None:
    code = """
from omni.media import Audio, Video
from typing import NamedTuple
class Film(NamedTuple):
    video: Video
    audio: Audio
def shoot() -> Film: ...
def hum() -> Audio: ...
"""
    (tmp_path / "film_of_outputs.py").write_text(code)
    film = {"kind": "function", "call": "film_of_outputs:shoot"}
    hum = {"kind": "function", "call": "film_of_outputs:hum"}
    outputs = {"video": "film.video", "audio": "film.audio"}
    same = load_graph({"stages": {"film": film}, "outputs": outputs}, base_dir=tmp_path).graph
    assert plan_outputs(same, "a.mp4", 1).sound_of == {"video": "audio"}
    assert plan_outputs(same, None, 1).sound_of == {"video": "audio"}
    assert plan_outputs(same, "a.wav", 1).sound_of == {}
    stages = {"film": film, "hum": hum}
    other = load_graph({"stages": stages, "outputs": {**outputs, "audio": "hum.audio"}}, base_dir=tmp_path).graph
    assert plan_outputs(other, "a.mp4", 1).sound_of == {}
