"""A checked graph: names, edges with typed ports, cycles, topological order.

`resolve` turns a GraphSpec into a Graph or raises GraphError with every fault at once. Pure: no files, no models.
"""

from __future__ import annotations

import difflib
from typing import Any

import msgspec

from omni.errors import GraphError, Mistake
from omni.registry import Port, Ports, find_kind_of
from omni.spec import GraphSpec, InputSpec

USUAL_INPUTS: dict[str, InputSpec] = {
    "prompt": InputSpec(type="text", description="what to make"),
    "negative_prompt": InputSpec(type="text", description="what to avoid"),
    "image": InputSpec(type="image", description="picture to start from or to edit"),
    "mask_image": InputSpec(type="image", description="white where the picture may change"),
    "video": InputSpec(type="video", description="clip to start from"),
    "audio": InputSpec(type="audio", description="sound to start from"),
    "height": InputSpec(type="json", description="pixels"),
    "width": InputSpec(type="json", description="pixels"),
    "num_frames": InputSpec(type="json", description="length of a video"),
    "num_inference_steps": InputSpec(type="json", description="denoise steps"),
    "guidance_scale": InputSpec(type="json", description="strength of the prompt"),
    "true_cfg_scale": InputSpec(type="json", description="strength of the prompt, for distilled models"),
    "strength": InputSpec(type="json", description="how much an input image may change, 0 to 1"),
}
"""Fields that a request may carry without the graph naming them."""


class FromRequest(msgspec.Struct, frozen=True, tag=True):
    """The value is a field of the request."""

    field: str


class FromStage(msgspec.Struct, frozen=True, tag=True):
    """The value is a port of another stage's payload: an edge."""

    stage: str
    port: str

    def __str__(self) -> str:
        return f"{self.stage}.{self.port}"


class Gather(msgspec.Struct, frozen=True, tag=True):
    """The value is a list of the values of several sources (fan-in)."""

    sources: tuple[FromRequest | FromStage, ...]


Binding = FromRequest | FromStage | Gather


class Edge(msgspec.Struct, frozen=True):
    """One declared link: `source` is `stage.port` of the producer, `target` of the consumer."""

    source: FromStage
    target_stage: str
    target_port: str

    def __str__(self) -> str:
        return f"{self.source} -> {self.target_stage}.{self.target_port}"


class Graph(msgspec.Struct, frozen=True):
    """A graph that can be planned and run."""

    spec: GraphSpec
    base_dir: str
    ports: dict[str, Ports]
    """Stage -> its ports, with types lifted to lists where a function runs once per item."""
    order: tuple[str, ...]
    """Topological order of the stages."""
    bindings: dict[str, dict[str, Binding]]
    """Stage -> input port -> where its value comes from. Optional request fields are bound too."""
    outputs: dict[str, FromStage]
    inputs: dict[str, InputSpec]
    """All fields that a request may carry: the declared ones and the usual ones that some stage reads."""

    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in order of the consumer."""
        return tuple(
            Edge(source, stage, port)
            for stage in self.order
            for port, binding in self.bindings[stage].items()
            for source in sources_of(binding)
            if isinstance(source, FromStage)
        )

    def upstream(self, stage: str) -> tuple[str, ...]:
        """Stages whose payload `stage` reads, each once."""
        return tuple(dict.fromkeys(edge.source.stage for edge in self.edges() if edge.target_stage == stage))

    def readers(self, stage: str) -> tuple[str, ...]:
        """Stages that read the payload of `stage`, each once."""
        return tuple(dict.fromkeys(edge.target_stage for edge in self.edges() if edge.source.stage == stage))

    def output_stages(self) -> tuple[str, ...]:
        """Stages whose payload is a graph output, each once."""
        return tuple(dict.fromkeys(source.stage for source in self.outputs.values()))


def sources_of(binding: Binding) -> tuple[FromRequest | FromStage, ...]:
    """The single sources of a binding."""
    return binding.sources if isinstance(binding, Gather) else (binding,)


def base_type(port_type: str) -> str:
    """`list[image]` -> `image`; other types stay."""
    return port_type[5:-1] if port_type.startswith("list[") else port_type


def nearest(name: str, allowed: Any) -> str:
    """`, did you mean 'x'?` when something allowed is close to `name`, else an empty string."""
    close = difflib.get_close_matches(str(name), [str(item) for item in allowed], n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def resolve(spec: GraphSpec, base_dir: str = ".") -> Graph:
    """Check names, edges, types and cycles of `spec`. Raises GraphError with all mistakes."""
    return _Resolver(spec, base_dir).resolve()


class _Resolver:
    def __init__(self, spec: GraphSpec, base_dir: str) -> None:
        self.spec = spec
        self.base_dir = base_dir
        self.mistakes: list[Mistake] = []
        self.ports: dict[str, Ports] = {}
        self.bindings: dict[str, dict[str, Binding]] = {}

    def resolve(self) -> Graph:
        raise NotImplementedError
