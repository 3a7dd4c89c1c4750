"""Parameters to inputs: names of other servers, sizes, lengths, what is refused and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from omni.graph import Graph, resolve
from omni.server.errors import ApiError
from omni.server.fields import BY_NAME, PARAMETERS, own_inputs, translate
from omni.server.limits import JsonTexts
from omni.server.settings import ServerSettings
from omni.spec import GraphSpec, InputSpec
from omni.testing import DoubleSpec, doubles


def graph_of(**types: str) -> Graph:
    """A graph with inputs of these types, all of which its stage reads."""
    inputs = {name: InputSpec(type=kind) for name, kind in types.items()}
    with doubles():
        return resolve(GraphSpec(inputs=inputs, stages={"a": DoubleSpec(ports=types)}))


PAINTER = graph_of(
    prompt="text", width="json", height="json", num_inference_steps="json", guidance_scale="json", flow_shift="json"
)


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ({"prompt": "x"}, {"prompt": "x"}),
        ({"size": "64x96"}, {"width": 64, "height": 96}),
        ({"size": "auto"}, {}),
        ({"steps": 4, "cfg_scale": 2}, {"num_inference_steps": 4, "guidance_scale": 2.0}),
        ({"shift": 3}, {"flow_shift": 3.0}),
        ({"quality": "high", "style": "vivid", "user": "me"}, {}),
        ({"width": 64}, {"width": 64}),
    ],
)
def test_parameters_go_to_inputs(given: dict[str, Any], inputs: dict[str, Any]) -> None:
    assert translate(PAINTER, given, "image") == inputs


def test_inputs_of_the_graph_come_first() -> None:
    graph = graph_of(quality="text", size="text", step="json")
    given = {"quality": "high", "size": "large", "step": 3}
    assert translate(graph, given, "image") == given


@pytest.mark.parametrize(
    ("types", "given", "inputs"),
    [
        ({"num_frames": "json"}, {"seconds": 2}, {"num_frames": 32}),
        ({"num_frames": "json", "fps": "json"}, {"seconds": 2, "fps": 24}, {"num_frames": 48, "fps": 24.0}),
        ({"video_length": "json"}, {"seconds": 1}, {"video_length": 16}),
        ({"seconds": "json"}, {"seconds": 2}, {"seconds": 2.0}),
        ({"duration": "json"}, {"seconds": 2}, {"duration": 2.0}),
    ],
)
def test_lengths(types: dict[str, str], given: dict[str, Any], inputs: dict[str, Any]) -> None:
    assert translate(graph_of(**types), given, "video") == inputs


def test_text_of_forms_is_read() -> None:
    given = {"size": "64x64", "steps": "4", "guidance_scale": "2.5"}
    found = translate(PAINTER, given, "image", texts=JsonTexts(ServerSettings()))
    assert found == {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 2.5}
    graph = graph_of(options="json", words="json")
    assert own_inputs(graph, {"options": '{"a": 1}', "words": "plain"}, texts=JsonTexts(ServerSettings())) == {
        "options": {"a": 1},
        "words": "plain",
    }


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"size": "64"}, "size", "WIDTHxHEIGHT"),
        ({"size": 64}, "size", "expected `str`"),
        ({"steps": "four"}, "steps", "expected `int`"),
        ({"steps": 0}, "steps", ">= 1"),
        ({"seconds": 2}, "seconds", "unknown parameter"),
        ({"negative_prompt": "x"}, "negative_prompt", "takes no 'negative_prompt' (it takes: flow_shift"),
        ({"size": "8x8", "width": 8}, "width", "say the same thing twice"),
        ({"heigth": 8}, "heigth", "did you mean 'height'?"),
        ({"temperature": 1}, "temperature", "unknown parameter"),
    ],
)
def test_what_fits_nowhere_is_refused_by_name(given: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        translate(PAINTER, given, "image")
    assert (caught.value.status, caught.value.param) == (400, param)
    assert message in str(caught.value)


def test_a_graph_without_sizes_says_so() -> None:
    with pytest.raises(ApiError, match="this graph takes no size"):
        translate(graph_of(prompt="text"), {"size": "64x64"}, "image")
    with pytest.raises(ApiError, match="this graph takes no 'speed': say 1"):
        translate(graph_of(prompt="text"), {"speed": 2.0}, "audio")
    assert translate(graph_of(prompt="text"), {"speed": 1.0}, "audio") == {}


def test_extra_parameters_may_be_unknown() -> None:
    assert translate(PAINTER, {"prompt": "x"}, "image", extra={"steps": 3, "odd": 1}) == {
        "prompt": "x",
        "num_inference_steps": 3,
    }
    assert translate(PAINTER, {"odd": 1}, "image", allow_unknown=True) == {}
    with pytest.raises(ApiError, match="'steps'"):
        translate(PAINTER, {}, "image", extra={"steps": "x"})


def test_unknown_inputs_of_jobs_have_a_nearest_match() -> None:
    with pytest.raises(ApiError, match="unknown input 'promt', did you mean 'prompt'"):
        own_inputs(PAINTER, {"promt": "x"})
    assert own_inputs(PAINTER, {"prompt": "x", "width": None}) == {"prompt": "x"}


def test_every_name_means_one_thing() -> None:
    assert len(BY_NAME) == sum(len(parameter.names) for parameter in PARAMETERS)
