"""A checked graph: names, edges with typed ports, cycles, topological order.

`resolve` turns a GraphSpec into a Graph or raises GraphError with every fault at once. Pure: no files, no models.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any

import msgspec

from omni.errors import GraphError, Mistake, UsageError
from omni.port_types import ALL_TYPES, default_fault, default_fits, fit, list_of, taken
from omni.port_types import base_type as base_type  # part of this module's interface, too
from omni.registry import Port, Ports, StageKind, find_kind, kind_names
from omni.spec import PORT_TYPES, GraphSpec, InputSpec

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
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

    def __str__(self) -> str:
        return self.field


class FromStage(msgspec.Struct, frozen=True, tag=True):
    """The value is a port of another stage's payload: an edge."""

    stage: str
    port: str

    def __str__(self) -> str:
        return f"{self.stage}.{self.port}"


class Gather(msgspec.Struct, frozen=True, tag=True):
    """The value is a list of the values of several sources (fan-in)."""

    sources: tuple[FromRequest | FromStage, ...]
    joined: tuple[bool, ...] = ()
    """For each source, whether its value is a list whose items join the result one by one; empty: none is."""


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


def nearest(name: str, allowed: Any) -> str:
    """`, did you mean 'x'?` when something allowed is close to `name`, else an empty string."""
    close = difflib.get_close_matches(str(name), [str(item) for item in allowed], n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def kind_or_fault(name: str) -> StageKind | str:
    """The kind of stage called `name`, or what is wrong with it."""
    try:
        return find_kind(name)
    except KeyError:
        return f"unknown kind '{name}'{nearest(name, kind_names())} (allowed: {_listed(kind_names())})"
    except UsageError as error:
        return str(error)


def resolve(spec: GraphSpec, base_dir: str = ".") -> Graph:
    """Check names, edges, types and cycles of `spec`. Raises GraphError with all mistakes."""
    graph, mistakes = check_graph(spec, base_dir)
    if graph is None:
        raise GraphError(tuple(mistakes))
    return graph


def check_graph(
    spec: GraphSpec, base_dir: str = ".", unclear: frozenset[str] = frozenset()
) -> tuple[Graph | None, list[Mistake]]:
    """The graph, or None and what is wrong with it.

    The stages named in `unclear` have faults of their own, told elsewhere: only what does not depend on their ports
    is checked, and there is no graph.
    """
    resolver = _Resolver(spec, base_dir, unclear)
    graph = resolver.resolve()
    return (None if resolver.mistakes or unclear else graph), resolver.mistakes


class _Resolver:
    def __init__(self, spec: GraphSpec, base_dir: str, unclear: frozenset[str]) -> None:
        self.spec = spec
        self.base_dir = base_dir
        self.unclear = set(unclear)
        self.mistakes: list[Mistake] = []
        self.ports: dict[str, Ports] = {}
        self.bindings: dict[str, dict[str, Binding]] = {name: {} for name in spec.stages}
        self.outputs: dict[str, FromStage] = {}
        self.field_types = {name: field.type for name, field in {**USUAL_INPUTS, **spec.inputs}.items()}

    def resolve(self) -> Graph:
        if not self.spec.stages:
            self.wrong("stages", "is empty; name at least one stage")
        self.check_names()
        self.check_inputs()
        self.find_ports()
        for stage in self.spec.stages:
            self.bind_named(stage)
            self.bind_unnamed(stage)
        order = self.find_order()
        for stage in order:
            self.check_types(stage)
        self.find_outputs()
        read = [source.field for stage in order for source in self.sources(stage) if isinstance(source, FromRequest)]
        usual = {name: spec for name, spec in USUAL_INPUTS.items() if name in read and name not in self.spec.inputs}
        inputs = {**self.spec.inputs, **usual}
        return Graph(self.spec, self.base_dir, self.ports, order, self.bindings, self.outputs, inputs)

    def wrong(self, path: str, message: str) -> None:
        self.mistakes.append(Mistake(path, message))

    def sources(self, stage: str) -> list[FromRequest | FromStage]:
        return [source for binding in self.bindings[stage].values() for source in sources_of(binding)]

    def check_names(self) -> None:
        """Names appear in `stage.port` and as Python names, in templates and results."""
        for key in ("inputs", "stages", "outputs"):
            for name in getattr(self.spec, key):
                if not NAME.fullmatch(name):
                    self.wrong(f"{key}.{name}", "a name has letters, digits and _ and starts with a letter or _")
        for name in self.spec.stages:
            if name in self.spec.inputs:
                self.wrong(f"stages.{name}", f"'{name}' is the name of an input too; rename one of them")

    def check_inputs(self) -> None:
        for name, spec in self.spec.inputs.items():
            if spec.type not in ALL_TYPES:
                near = nearest(spec.type, ALL_TYPES)
                fault = f"unknown type '{spec.type}'{near} (allowed: {_listed(PORT_TYPES)}, and list[T] of each)"
                self.wrong(f"inputs.{name}.type", fault)
                self.field_types[name] = "any"
            elif spec.default is not msgspec.UNSET and not default_fits(spec.default, spec.type):
                self.wrong(f"inputs.{name}.default", default_fault(spec.type))

    def find_ports(self) -> None:
        for name, spec in self.spec.stages.items():
            if name in self.unclear:
                continue
            self.unclear.add(name)
            kind = kind_or_fault(str(spec.__struct_config__.tag))
            if isinstance(kind, str):
                self.wrong(f"stages.{name}.kind", kind)
                continue
            faults = kind.check(spec, self.base_dir)
            for fault in faults:
                self.wrong(f"stages.{name}.{fault.path}".rstrip("."), fault.message)
            if not faults:
                self.ports[name] = kind.ports(spec, self.base_dir)
                self.unclear.discard(name)

    # Edges --------------------------------------------------------------------------------------------------------

    def bind_named(self, stage: str) -> None:
        """Bind the ports that the stage's `inputs` name."""
        ports = self.ports.get(stage)
        for port, source in self.spec.stages[stage].inputs.items():
            path = f"stages.{stage}.inputs.{port}"
            if not (ports is None or port in ports.inputs or ports.open_inputs):
                self.wrong(path, f"unknown input port{nearest(port, ports.inputs)} (allowed: {_listed(ports.inputs)})")
            if isinstance(source, str):
                binding: Binding | None = self.source(source, path)
            else:
                if not source:
                    self.wrong(path, "the list is empty; name at least one source")
                found = [self.source(item, f"{path}[{index}]") for index, item in enumerate(source)]
                binding = Gather(tuple(item for item in found if item is not None))
            if binding is not None:
                self.bindings[stage][port] = binding

    def bind_unnamed(self, stage: str) -> None:
        """Ports that `inputs` leaves out take the request's field of their name, if there is one that fits.

        A stage of which no port is known takes the usual fields, so that the smallest graph gets its prompt.
        """
        ports = self.ports.get(stage, Ports({}, {}))
        usual_ports = {name: Port("any") for name in USUAL_INPUTS if ports.open_inputs}
        for name, port in (ports.inputs or usual_ports).items():
            if name in self.spec.stages[stage].inputs:
                continue
            usual = USUAL_INPUTS.get(name)
            if name in self.spec.inputs or (usual is not None and fit(usual.type, port) is not None):
                self.bindings[stage][name] = FromRequest(name)
            elif port.required:
                remedy = f"declare '{name}' under the graph's inputs, or wire it with {name}: STAGE.PORT"
                self.wrong(f"stages.{stage}.inputs.{name}", f"no source for this {port.type}; {remedy}")

    def source(self, text: str, path: str) -> FromRequest | FromStage | None:
        """What `stage.port` or a field's name means; None when it means nothing."""
        if "." in text:
            return self.stage_port(text, path)
        if text in self.spec.inputs:
            return FromRequest(text)
        if text in self.spec.stages:
            main = next(iter(self.ports[text].outputs), "PORT") if text in self.ports else "PORT"
            self.wrong(path, f"'{text}' is a stage; name its output port, as in '{text}.{main}'")
            return None
        if text in USUAL_INPUTS:
            return FromRequest(text)
        fields = (*self.spec.inputs, *USUAL_INPUTS)
        near = nearest(text, (*fields, *self.spec.stages))
        self.wrong(path, f"unknown request field '{text}'{near} (declare it under inputs, or write STAGE.PORT)")
        return None

    def stage_port(self, text: str, path: str) -> FromStage | None:
        stage, _, port = text.partition(".")
        if stage not in self.spec.stages:
            near = nearest(stage, self.spec.stages)
            self.wrong(path, f"unknown stage '{stage}'{near} (stages: {_listed(self.spec.stages)})")
            return None
        if stage in self.ports and port not in self.ports[stage].outputs:
            outputs = self.ports[stage].outputs
            fault = f"stage '{stage}' has no output port '{port}'{nearest(port, outputs)}"
            self.wrong(path, f"{fault} (it has: {_listed(outputs)})")
            return None
        return FromStage(stage, port)

    def find_order(self) -> tuple[str, ...]:
        """Topological order. Each cycle is told once and then cut, so that what follows can still be checked."""
        upstream = {
            stage: dict.fromkeys(s.stage for s in self.sources(stage) if isinstance(s, FromStage))
            for stage in self.spec.stages
        }
        while True:
            try:
                return tuple(TopologicalSorter(upstream).static_order())
            except CycleError as error:
                cycle: list[str] = error.args[1][:-1]
                first = min(range(len(cycle)), key=lambda i: list(self.spec.stages).index(cycle[i]))
                cycle = [*cycle[first:], *cycle[:first], cycle[first]]
                target, source = cycle[0], cycle[-2]
                edges = [(p, s) for p, b in self.bindings[target].items() for s in sources_of(b)]
                port = next(p for p, s in edges if isinstance(s, FromStage) and s.stage == source)
                self.wrong(f"stages.{target}.inputs.{port}", f"the stages form a cycle: {' -> '.join(cycle)}")
                del upstream[target][source]

    # Types --------------------------------------------------------------------------------------------------------

    def check_types(self, stage: str) -> None:
        """Check the types of all bindings of `stage`; make its outputs lists where it runs once per item."""
        ports = self.ports.get(stage)
        if ports is None:
            return
        lifted = False
        for name, binding in list(self.bindings[stage].items()):
            port = ports.inputs.get(name, Port("any"))
            path = f"stages.{stage}.inputs.{name}"
            if isinstance(binding, Gather):
                self.bindings[stage][name], given = self.gather(binding, path)
            else:
                given = self.type_of(binding)
            how = None if given is None else fit(given, port)
            if given is not None and how is None:
                what = "the list" if isinstance(binding, Gather) else f"'{binding}'"
                self.wrong(path, f"{what} is {given}, but this port takes {taken(port)}")
            elif how == "wrap" and not isinstance(binding, Gather):
                self.bindings[stage][name] = Gather((binding,))
            lifted |= how == "lift"
        if lifted:
            outputs = {name: Port(list_of(port.type)) for name, port in ports.outputs.items()}
            self.ports[stage] = Ports(ports.inputs, outputs, ports.open_inputs)

    def type_of(self, source: FromRequest | FromStage) -> str | None:
        """The port type of a source; None when its stage is unclear."""
        if isinstance(source, FromRequest):
            return self.field_types[source.field]
        ports = self.ports.get(source.stage)
        return ports.outputs[source.port].type if ports is not None else None

    def gather(self, binding: Gather, path: str) -> tuple[Gather, str | None]:
        """The list's binding and type: `list[T]` from sources that are T or lists of T. None when it is unclear."""
        types = [self.type_of(source) for source in binding.sources]
        kinds = {base_type(kind) for kind in types if kind is not None} - {"any"}
        joined = tuple(kind is not None and kind.startswith("list[") for kind in types)
        if len(kinds) > 1:
            told = ", ".join(f"'{s}' is {t}" for s, t in zip(binding.sources, types, strict=True) if t is not None)
            self.wrong(path, f"the items of a list must be of one type, but {told}")
        unclear = len(kinds) > 1 or None in types
        binding = Gather(binding.sources, joined if any(joined) else ())
        return binding, None if unclear else list_of(next(iter(kinds), "any"))

    def find_outputs(self) -> None:
        if not self.spec.outputs:
            self.outputs = self.default_outputs()
            if self.spec.stages and not self.outputs and not self.mistakes and not self.unclear:
                self.wrong("", "no stage gives an output that nobody reads; name what the graph gives under outputs")
        for name, text in self.spec.outputs.items():
            path = f"outputs.{name}"
            source = self.main_output(text) if text in self.spec.stages else self.stage_port(text, path)
            if source is not None:
                self.outputs[name] = source
            elif text in self.ports:
                self.wrong(path, f"stage '{text}' has no output port")

    def main_output(self, stage: str) -> FromStage | None:
        ports = self.ports.get(stage)
        return FromStage(stage, next(iter(ports.outputs))) if ports is not None and ports.outputs else None

    def default_outputs(self) -> dict[str, FromStage]:
        """The main port of each stage that nobody reads: named by its type if that is unique, else by its stage."""
        read = {s.stage for stage in self.spec.stages for s in self.sources(stage) if isinstance(s, FromStage)}
        last = [source for stage in self.spec.stages if stage not in read and (source := self.main_output(stage))]
        kinds = [base_type(self.type_of(source) or "any") for source in last]
        stages = [source.stage for source in last]
        return {
            kind if kinds.count(kind) == 1 and kind not in stages else source.stage: source
            for kind, source in zip(kinds, last, strict=True)
        }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
