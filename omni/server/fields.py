"""From the parameters of OpenAI's API and of other servers to the inputs of a graph: one table, PARAMETERS.

A parameter that is named like an input of the graph goes there. Otherwise the table says which inputs it may go to; the
first that the graph has takes it. What fits nowhere is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from omni.errors import InputError
from omni.graph import Graph, base_type
from omni.server.errors import MAX_QUOTED, ApiError, bad_request, quoted
from omni.server.graph_facts import FPS_INPUTS, FRAMES_INPUTS, frames_per_second
from omni.server.limits import JsonTexts, NotJson
from omni.server.reading import convert

Api = Literal["image", "video", "audio", "chat"]
ALL: tuple[Api, ...] = ("image", "video", "audio", "chat")
MADE: tuple[Api, ...] = ("image", "video", "audio")
SEEN: tuple[Api, ...] = ("image", "video")
SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")

Whole = Annotated[int, Meta(ge=1, le=2**31)]
Real = Annotated[float, Meta(ge=-1e6, le=1e6)]
"""Bounded, so that neither infinity nor what is no number gets through."""
Positive = Annotated[float, Meta(gt=0, le=1e15)]
Text = Annotated[str, Meta(min_length=0)]
Spread = Callable[[Graph, Any, Mapping[str, Any]], dict[str, Any]]


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that clients can say."""

    names: tuple[str, ...]
    """OpenAI's or diffusers' name, then those of other servers."""
    inputs: tuple[str, ...]
    """Inputs of a graph that it may go to."""
    type: Any
    description: str
    apis: tuple[Api, ...] = ALL
    ignored: bool = False
    """A graph without such an input is asked all the same: clients send it to every model."""
    spread: Spread | None = None
    """(graph, value, all parameters) -> inputs, for a graph without such an input."""


def spread_size(graph: Graph, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`WIDTHxHEIGHT` to width and height; `auto` leaves the size to the graph."""
    if value == "auto":
        return {}
    match = SIZE.fullmatch(value)
    if match is None:
        raise bad_request(f"size {value[:40]!a} must be WIDTHxHEIGHT in pixels, or auto", "size")
    if not {"width", "height"} <= graph.inputs.keys():
        raise bad_request("this graph takes no size: say auto, or leave it out", "size")
    if not (int(match[1]) and int(match[2])):
        raise bad_request(f"size {value} has no pixels", "size")
    return {"width": int(match[1]), "height": int(match[2])}


def spread_seconds(graph: Graph, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A length in seconds to a number of frames."""
    target = next((name for name in FRAMES_INPUTS if name in graph.inputs), None)
    if target is None:
        raise bad_request("this graph takes no length: leave 'seconds' out", "seconds")
    said = next((given[name] for name in FPS_INPUTS if name in given), None)
    fps = frames_per_second(graph) if said is None else convert(said, Positive, True, "fps")
    if not value * fps < 2**31:  # infinite, perhaps
        raise bad_request(f"{value:g} s at {fps:g} frames per second are too many frames", "seconds")
    return {target: max(1, round(value * fps))}


PARAMETERS = (
    Parameter(names=("prompt", "input"), inputs=("prompt", "text", "input"), type=Text, description="What to make."),
    Parameter(
        names=("negative_prompt",), inputs=("negative_prompt",), type=Text, description="What to avoid.", apis=MADE
    ),
    Parameter(
        names=("size",),
        inputs=("size",),
        type=str,
        description="WIDTHxHEIGHT in pixels, or auto.",
        apis=SEEN,
        spread=spread_size,
    ),
    Parameter(names=("width",), inputs=("width",), type=Whole, description="Pixels; instead of size.", apis=SEEN),
    Parameter(names=("height",), inputs=("height",), type=Whole, description="Pixels; instead of size.", apis=SEEN),
    Parameter(
        names=("seconds", "duration"),
        inputs=("seconds", "duration", "audio_end_in_s", "audio_length_in_s"),
        type=Positive,
        description="Length of a clip or sound.",
        apis=("video", "audio"),
        spread=spread_seconds,
    ),
    Parameter(names=("num_frames",), inputs=FRAMES_INPUTS, type=Whole, description="Frames.", apis=("video",)),
    Parameter(names=FPS_INPUTS, inputs=FPS_INPUTS, type=Positive, description="Frames per second.", apis=("video",)),
    Parameter(
        names=("num_inference_steps", "steps"),
        inputs=("num_inference_steps",),
        type=Whole,
        description="Denoise steps.",
        apis=MADE,
    ),
    Parameter(
        names=("guidance_scale", "cfg_scale"),
        inputs=("guidance_scale",),
        type=Real,
        description="Strength of the prompt.",
        apis=MADE,
    ),
    Parameter(
        names=("guidance_scale_2",),
        inputs=("guidance_scale_2",),
        type=Real,
        description="Strength of the prompt in the second denoiser.",
        apis=SEEN,
    ),
    Parameter(
        names=("true_cfg_scale",),
        inputs=("true_cfg_scale",),
        type=Real,
        description="Strength of the prompt, for distilled models.",
        apis=SEEN,
    ),
    Parameter(
        names=("flow_shift", "shift"),
        inputs=("flow_shift", "shift"),
        type=Real,
        description="Shift of the noise schedule.",
        apis=SEEN,
    ),
    Parameter(
        names=("strength",),
        inputs=("strength",),
        type=Annotated[float, Meta(ge=0, le=1)],
        description="How much an input picture may change.",
        apis=SEEN,
    ),
    Parameter(
        names=("quality",), inputs=("quality",), type=str, description="Passed on.", apis=("image",), ignored=True
    ),
    Parameter(names=("style",), inputs=("style",), type=str, description="Passed on.", apis=("image",), ignored=True),
    Parameter(
        names=("input_fidelity",),
        inputs=("input_fidelity",),
        type=str,
        description="Passed on.",
        apis=("image",),
        ignored=True,
    ),
    Parameter(names=("voice",), inputs=("voice",), type=Any, description="Who speaks.", apis=("audio",), ignored=True),
    Parameter(
        names=("instructions",),
        inputs=("instructions",),
        type=Text,
        description="How to speak.",
        apis=("audio",),
    ),
    Parameter(
        names=("speed",),
        inputs=("speed",),
        type=Annotated[float, Meta(ge=0.25, le=4)],
        description="How fast to speak; 1 is normal.",
        apis=("audio",),
        spread=lambda graph, value, given: _only("speed", value, 1),
    ),
    Parameter(
        names=("max_completion_tokens", "max_tokens"),
        inputs=("max_new_tokens", "max_tokens"),
        type=Whole,
        description="Longest answer.",
        apis=("chat",),
    ),
    Parameter(
        names=("temperature",),
        inputs=("temperature",),
        type=Annotated[float, Meta(ge=0, le=2)],
        description="How freely tokens are picked.",
        apis=("chat",),
    ),
    Parameter(
        names=("top_p",),
        inputs=("top_p",),
        type=Annotated[float, Meta(ge=0, le=1)],
        description="Share of likely tokens to pick from.",
        apis=("chat",),
    ),
    Parameter(names=("user",), inputs=("user",), type=str, description="Ignored.", ignored=True),
    Parameter(names=("safety_identifier",), inputs=("user",), type=str, description="Ignored.", ignored=True),
    Parameter(names=("moderation",), inputs=("moderation",), type=Any, description="Ignored.", ignored=True),
    Parameter(names=("store",), inputs=("store",), type=bool, description="Ignored.", apis=("chat",), ignored=True),
    Parameter(names=("metadata",), inputs=("metadata",), type=Any, description="Ignored.", ignored=True),
)

BY_NAME = {name: parameter for parameter in PARAMETERS for name in parameter.names}


def translate(
    graph: Graph,
    given: Mapping[str, Any],
    api: Api,
    *,
    extra: Mapping[str, Any] = {},
    texts: JsonTexts | None = None,
    allow_unknown: bool = False,
) -> dict[str, Any]:
    """Inputs of the graph by name, values as they came where no parameter tells their type.

    `texts` reads the JSON of a form. `extra` are parameters of which those that nobody knows are dropped. Raises
    ApiError naming the parameter.
    """
    both = {**extra, **given}
    inputs: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in both.items():
        lenient = allow_unknown or name not in given
        for target, translated in _targets(graph, name, value, both, api, texts, lenient).items():
            if target in inputs:
                raise bad_request(f"'{name}' and '{said[target]}' say the same thing twice", name)
            inputs[target], said[target] = translated, name
    return inputs


def _targets(
    graph: Graph, name: str, value: Any, given: Mapping[str, Any], api: Api, texts: JsonTexts | None, lenient: bool
) -> dict[str, Any]:
    parameter = BY_NAME.get(name)
    if name in graph.inputs:
        return {name: typed_value(graph, name, value, texts)}
    if parameter is None or api not in parameter.apis:
        if lenient:
            return {}
        raise _unknown(graph, name, api)
    found = next((target for target in parameter.inputs if target in graph.inputs), None)
    if found is not None:
        return {found: convert(value, parameter.type, texts is not None, name)}
    if parameter.spread is not None:
        return parameter.spread(graph, convert(value, parameter.type, texts is not None, name), given)
    if parameter.ignored or lenient:
        return {}
    raise bad_request(f"this graph takes no '{name}' (it takes: {_listed(graph)})", name, "unsupported_parameter")


def own_inputs(graph: Graph, given: Mapping[str, Any], *, texts: JsonTexts | None = None) -> dict[str, Any]:
    """Values for the graph's own inputs; None counts as left out. Raises ApiError for a name that it does not have."""
    for name in given:
        if name not in graph.inputs:
            message = f"unknown input {quoted(name, graph.inputs)} (this graph takes: {_listed(graph)})"
            raise bad_request(message, name[:MAX_QUOTED], "unknown_parameter")
    values = {name: value for name, value in given.items() if value is not None}
    return {name: typed_value(graph, name, value, texts) for name, value in values.items()}


def typed_value(graph: Graph, name: str, value: Any, texts: JsonTexts | None = None) -> Any:
    """A value for the graph's own input `name`: well-known numbers are checked, text of a form may be JSON."""
    if base_type(graph.inputs[name].type) not in ("json", "any"):
        return value
    parameter = BY_NAME.get(name)
    if parameter is not None and name in parameter.inputs:
        return convert(value, parameter.type, texts is not None, name)
    if texts is not None and isinstance(value, str):
        try:
            return texts.decode(value, f"'{name}'")
        except NotJson:
            return value
        except InputError as error:
            raise bad_request(str(error), name) from None
    return value


def _only(name: str, value: Any, only: Any) -> dict[str, Any]:
    if value != only:
        raise bad_request(f"this graph takes no '{name}': say {only}, or leave it out", name, "unsupported_parameter")
    return {}


def _unknown(graph: Graph, name: str, api: Api) -> ApiError:
    known = [*graph.inputs, *(n for p in PARAMETERS if api in p.apis for n in p.names)]
    return bad_request(
        f"unknown parameter {quoted(name, known)} (this graph takes: {_listed(graph)})",
        name[:MAX_QUOTED],
        "unknown_parameter",
    )


def _listed(graph: Graph) -> str:
    return ", ".join(sorted(graph.inputs)) or "nothing"
