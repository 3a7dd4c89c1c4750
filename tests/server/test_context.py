"""What a request may ask for, by size."""

from __future__ import annotations

from typing import Any

import pytest

from omni.graph import Graph, resolve
from omni.server.context import check_bounds, made_pixels
from omni.server.errors import ApiError
from omni.server.settings import ServerSettings
from omni.spec import GraphSpec, InputSpec
from omni.testing import DoubleSpec, doubles

SETTINGS = ServerSettings(max_text_chars=100, max_made_pixels=1_000_000)
TYPES = {
    "prompt": "text",
    "notes": "list[text]",
    "details": "json",
    "image": "image",
    "pictures": "list[image]",
    "width": "json",
    "height": "json",
    "num_frames": "json",
    "seconds": "json",
    "fps": "json",
    "num_images_per_prompt": "json",
}


def graph_of(**defaults: Any) -> Graph:
    """A graph with all these inputs."""
    inputs = {
        name: InputSpec(type=kind, **({"default": defaults[name]} if name in defaults else {}))
        for name, kind in TYPES.items()
    }
    with doubles():
        return resolve(GraphSpec(inputs=inputs, stages={"a": DoubleSpec(ports=TYPES)}))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": "x" * 101}, "'prompt' has 101 characters; at most 100 are read"),
        ({"prompt": "data:" + "x" * 101}, "'prompt' has 106 characters; at most 100 are read"),
        ({"details": "data:" + "x" * 101}, "'details' has 106 characters; at most 100 are read"),
        ({"notes": ["x" * 60, "x" * 60]}, "'notes' has 120 characters; at most 100 are read"),
        ({"image": "data:" + "x" * 101}, None),
        ({"pictures": ["data:" + "x" * 101]}, None),
    ],
)
def test_texts_are_bounded_by_the_type_of_their_input(inputs: dict[str, Any], message: str | None) -> None:
    if message is None:
        check_bounds(graph_of(), inputs, SETTINGS)
        return
    with pytest.raises(ApiError) as caught:
        check_bounds(graph_of(), inputs, SETTINGS)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("inputs", "n"),
    [
        ({"width": 1000, "height": 1000}, 2),
        ({"width": 1000, "height": 1000, "num_images_per_prompt": 2}, 1),
        ({"width": 100, "height": 100, "num_frames": 101}, 1),
        ({"width": 100, "height": 100, "seconds": 10.1, "fps": 10}, 1),
        ({"num_frames": 17}, 1),
    ],
)
def test_all_pixels_together_are_bounded(inputs: dict[str, Any], n: int) -> None:
    graph = graph_of(width=256, height=256)
    with pytest.raises(ApiError, match=r"the request asks for [0-9]+ pixels in all; at most 1000000 are made"):
        check_bounds(graph, inputs, SETTINGS, n)
    assert made_pixels(graph, inputs) > 0
    check_bounds(graph, {"width": 100, "height": 100, "num_frames": 10}, SETTINGS, 10)
