"""What a graph tells about its requests: outputs, steps, frames per second, and a JSON Schema of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from omni.graph import FromStage, Graph, base_type
from omni.inputs import required_fields
from omni.spec import DiffusionSpec, InputSpec

DEFAULT_FPS = 16.0
DEFAULT_STEPS = 20
FPS_INPUTS = ("frame_rate", "fps")
FRAMES_INPUTS = ("num_frames", "video_length")
STEPS_INPUT = "num_inference_steps"
WORDS = {
    "image": "a data URL, an allowed URL, or a file of a form",
    "video": "a data URL, an allowed URL, or a file of a form",
    "audio": "a data URL, an allowed URL, or a file of a form",
    "tensor": "a data URL of a safetensors file, or a file of a form",
}
NUMBERS: dict[str, dict[str, Any]] = {
    "height": {"type": "integer", "minimum": 1},
    "width": {"type": "integer", "minimum": 1},
    "num_frames": {"type": "integer", "minimum": 1},
    "num_inference_steps": {"type": "integer", "minimum": 1},
    "guidance_scale": {"type": "number"},
    "true_cfg_scale": {"type": "number"},
    "strength": {"type": "number", "minimum": 0, "maximum": 1},
}
"""Usual inputs of type json that are numbers."""


def output_types(graph: Graph) -> dict[str, str]:
    """The graph's outputs: name -> port type, without `list[...]`."""
    return {name: base_type(port_of(graph, source)) for name, source in graph.outputs.items()}


def port_of(graph: Graph, source: FromStage) -> str:
    """The type of a stage's output port."""
    return graph.ports[source.stage].outputs[source.port].type


def frames_per_second(graph: Graph) -> float:
    """What a graph's clips have when a request does not say."""
    for name in FPS_INPUTS:
        default = graph.inputs[name].default if name in graph.inputs else msgspec.UNSET
        if isinstance(default, (int, float)):
            return float(default)
    for spec in diffusion_specs(graph):
        said = next((spec.call[name] for name in FPS_INPUTS if name in spec.call), spec.fps)
        return float(said)
    return DEFAULT_FPS


def steps_of(graph: Graph, inputs: Mapping[str, Any]) -> int:
    """Denoise steps of a request, as far as can be told before it runs."""
    said = [inputs.get(STEPS_INPUT)]
    if STEPS_INPUT in graph.inputs:
        said.append(graph.inputs[STEPS_INPUT].default)
    said += [spec.call.get(STEPS_INPUT) for spec in diffusion_specs(graph)]
    return next((steps for steps in said if isinstance(steps, int) and steps > 0), DEFAULT_STEPS)


def default_of(graph: Graph, name: str) -> Any:
    """What the field of a request is when it is left out: the graph's default, else a diffusion stage's; or None."""
    if name in graph.inputs and graph.inputs[name].default is not msgspec.UNSET:
        return graph.inputs[name].default
    return next((spec.call[name] for spec in diffusion_specs(graph) if name in spec.call), None)


def diffusion_specs(graph: Graph) -> list[DiffusionSpec]:
    """The diffusion stages, the last ones first: these make what the client gets."""
    specs = (graph.spec.stages[stage] for stage in reversed(graph.order))
    return [spec for spec in specs if isinstance(spec, DiffusionSpec)]


def inputs_schema(graph: Graph) -> dict[str, Any]:
    """JSON Schema of the inputs. `x-type` is the type in the graph; media are text, a data URL or an allowed URL."""
    required = [name for name in required_fields(graph) if graph.inputs[name].default is msgspec.UNSET]
    return {
        "type": "object",
        "properties": {name: _input_schema(graph, name, spec) for name, spec in graph.inputs.items()},
        "required": required,
        "additionalProperties": False,
    }


def _input_schema(graph: Graph, name: str, spec: InputSpec) -> dict[str, Any]:
    schema = _value_schema(name, base_type(spec.type))
    if spec.type.startswith("list["):
        schema = {"type": "array", "items": schema}
    schema |= {"x-type": spec.type}
    if spec.description:
        schema |= {"description": spec.description}
    default = default_of(graph, name)
    return schema if default is None else schema | {"default": default}


def _value_schema(name: str, kind: str) -> dict[str, Any]:
    if kind == "text":
        return {"type": "string"}
    if kind in WORDS:
        media_type = "application/octet-stream" if kind == "tensor" else f"{kind}/*"
        return {"type": "string", "format": "uri", "contentMediaType": media_type, "x-accepts": WORDS[kind]}
    return dict(NUMBERS.get(name, {}))
