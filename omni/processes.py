"""Rules 1 and 2 of the planner: which runner a graph gets, and which process each of its stages belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from omni.checkpoint import CheckpointFacts
from omni.errors import PlanError
from omni.graph import Edge, Graph, base_type
from omni.hardware import Hardware
from omni.registry import find_kind_of
from omni.spec import StageSpec

DRIVER = "driver"
"""Name of the process that the user's program is."""

_PAYLOAD_RANKS = {"video": 2, "image": 1, "audio": 1, "tensor": 1, "any": 1, "text": 0, "json": 0}


class Want(msgspec.Struct, frozen=True):
    """What one stage asks for, read once from its spec, kind and checkpoint."""

    name: str
    spec: StageSpec
    weight_bytes: int | None
    """None when unknown, 0 when it has no weights."""
    is_heavy: bool
    """It has a model or GPUs of its own, so it cannot ride along with another stage."""
    on_gpu: bool
    facts: CheckpointFacts | None = None


class Home(msgspec.Struct, frozen=True):
    """The process that a stage belongs to."""

    process: str
    reason: str


# What the stages ask for ----------------------------------------------------------------------------------------


def read_want(name: str, spec: StageSpec, hardware: Hardware, facts: CheckpointFacts | None) -> Want:
    """Raises PlanError when the stage asks for what contradicts itself or is not there."""
    has_model = find_kind_of(spec).checkpoint(spec) is not None
    gpus = spec.resources.gpus
    device = device_of(spec)
    num_gpus = sum(len(node.gpus) for node in hardware.nodes)
    if device == "cpu" and gpus:
        raise PlanError(f"stage '{name}': device: cpu and resources.gpus: {gpus:g} contradict each other: drop one")
    if device.startswith("cuda") and gpus == 0:
        raise PlanError(f"stage '{name}': device: {device} and resources.gpus: 0 contradict each other: drop one")
    if (device.startswith("cuda") or gpus) and not num_gpus:
        asked = f"resources.gpus: {gpus:g}" if gpus else f"device: {device}"
        raise PlanError(f"stage '{name}': {asked}, but {hardware.name} has no GPU: say device: cpu, or drop it")
    on_gpu = bool(gpus) or device.startswith("cuda") or (has_model and num_gpus > 0 and device != "cpu" and gpus != 0)
    if not has_model:
        weight_bytes: int | None = 0
    else:
        kind, dtype = "cuda" if on_gpu else "cpu", getattr(spec, "dtype", None)
        weight_bytes = facts.loaded_bytes(dtype, kind) if facts and facts.known else None
    return Want(name, spec, weight_bytes, has_model or bool(gpus), on_gpu, facts)


def device_of(spec: StageSpec) -> str:
    """Kinds with a model have a `device` in their spec; the base spec has none."""
    return str(getattr(spec, "device", "auto"))


# Rules 1 and 2: runner, processes -------------------------------------------------------------------------------


def choose_runner(wants: dict[str, Want], runner: str) -> tuple[Literal["inline", "ray"], str]:
    """The runner and the reason for it. Raises PlanError when the one asked for cannot run a stage."""
    actors = [want.name for want in wants.values() if want.spec.isolation == "actor"]
    own = [want.name for want in wants.values() if want.is_heavy and want.spec.isolation == "auto"]
    heavy = [want.name for want in wants.values() if want.is_heavy]
    if runner == "inline":
        if actors:
            raise PlanError(
                f"stage '{actors[0]}': isolation: actor needs a process of its own, and the inline runner has none: "
                "use the ray runner, or drop the isolation"
            )
        return "inline", "the inline runner was asked for"
    if runner == "ray":
        return "ray", "the ray runner was asked for"
    if actors:
        return "ray", f"isolation: actor on {listed(actors)}"
    if not heavy:
        return "inline", "no stage holds a model or a GPU"
    if len(heavy) == 1:
        return "inline", f"'{heavy[0]}' is the only stage with a model or a GPU, so nothing needs another process"
    if not own:
        return "inline", "isolation: inline on every stage with a model or a GPU"
    return "ray", f"{len(heavy)} stages have a model or a GPU: {listed(heavy)}"


def choose_homes(graph: Graph, wants: dict[str, Want], runner: str) -> dict[str, Home]:
    """The process of every stage: models first, then the stages that ride along."""
    if runner == "inline":
        return {name: Home(DRIVER, "inline: every stage runs in the driver") for name in graph.order}
    homes: dict[str, Home] = {}
    for name, want in wants.items():
        if want.spec.isolation == "inline":
            homes[name] = Home(DRIVER, "isolation: inline")
        elif want.spec.isolation == "actor":
            homes[name] = Home(_actor_name(name), "isolation: actor")
        elif want.is_heavy:
            what = "a model" if want.weight_bytes != 0 else "a GPU"
            homes[name] = Home(_actor_name(name), f"has {what}, so it gets an actor of its own")
    for name in graph.order:
        producers = [edge for edge in graph.edges() if edge.target_stage == name and edge.source.stage in homes]
        if name not in homes and producers:
            producers.sort(key=lambda edge: graph.order.index(edge.source.stage))  # `max` keeps the first of equals
            source = max(producers, key=lambda edge: _payload_rank(graph, edge)).source.stage
            homes[name] = Home(homes[source].process, f"rides with '{source}', whose payload it reads")
    for name in reversed(graph.order):
        if name not in homes:
            homes[name] = _ride_with_reader(graph, name, homes)
    return homes


def _ride_with_reader(graph: Graph, name: str, homes: dict[str, Home]) -> Home:
    readers = [reader for reader in graph.order if reader in graph.readers(name)]
    if not readers:
        return Home(DRIVER, "reads no other stage and none reads it, so it stays in the driver")
    return Home(homes[readers[0]].process, f"rides with '{readers[0]}', which reads its payload")


def _payload_rank(graph: Graph, edge: Edge) -> int:
    """How large a payload of this port type tends to be."""
    port = graph.ports[edge.source.stage].outputs.get(edge.source.port)
    return _PAYLOAD_RANKS.get(base_type(port.type), 1) if port else 1


def _actor_name(stage: str) -> str:
    return stage if stage != DRIVER else f"{stage} actor"


def listed(names: Sequence[str]) -> str:
    """`'a', 'b'`, for messages."""
    return ", ".join(f"'{name}'" for name in names)
