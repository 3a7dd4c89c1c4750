"""GraphSpec + hardware + checkpoint sizes -> Plan. Pure and printable; each decision carries its reason."""

from __future__ import annotations

from typing import Literal

import msgspec

from omni.errors import PlanError
from omni.graph import Edge, Graph, base_type
from omni.placement import SHARE_FACTOR, Claim, CpuClaim, CpuShare, Share, Slot, place_cpus, place_gpus
from omni.registry import find_kind_of
from omni.sizes import GIB, format_bytes
from omni.spec import StageSpec

DRIVER = "driver"
"""Name of the process that the user's program is."""


_FLOAT_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element, by the names of safetensors headers and of graph files."""


class Gpu(msgspec.Struct, frozen=True):
    """One kind of GPU: `memory_bytes` of device memory each."""

    name: str
    memory_bytes: int


class Node(msgspec.Struct, frozen=True):
    """One host of a cluster (a node, in Ray's words)."""

    name: str
    cpus: float
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()


class Hardware(msgspec.Struct, frozen=True):
    """What there is to run on."""

    name: str
    nodes: tuple[Node, ...]


class CheckpointFacts(msgspec.Struct, frozen=True):
    """What safetensors headers say about a checkpoint. Nothing but headers is read."""

    components: dict[str, int]
    """Component (folder name, or `model`) -> bytes of its weights."""
    dtypes: dict[str, int] = {}
    """dtype name as in the header (`BF16`) -> bytes."""
    known: bool = True
    """False when the checkpoint is not on this machine yet."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.components.values())

    def loaded_bytes(self, dtype: str = "auto") -> int:
        """Bytes of all weights once loaded as `dtype`; `auto` keeps the checkpoint's own."""
        size = _FLOAT_SIZES.get(dtype)
        if size is None or not self.dtypes:
            return self.total_bytes
        return sum(
            count * size // _FLOAT_SIZES[name] if name in _FLOAT_SIZES else count for name, count in self.dtypes.items()
        )


class StagePlan(msgspec.Struct, frozen=True):
    """Where one stage runs."""

    stage: str
    process: str
    device: str
    """`cpu` or `cuda`, from the stage's point of view."""
    weight_bytes: int | None
    """Bytes of its weights; None when unknown, 0 when it has none."""
    reason: str


class ProcessPlan(msgspec.Struct, frozen=True):
    """One process: the driver, or a Ray actor with its share of the hardware."""

    name: str
    kind: Literal["driver", "actor"]
    stages: tuple[str, ...]
    cpus: float = 0
    gpus: float = 0
    num_threads: int = 0
    """CPU threads for kernels; 0 leaves the library's default."""
    reason: str = ""
    node: str = ""
    """Name of the node it is planned for; Ray has the last word."""
    gpu_ids: tuple[int, ...] = ()
    """Planned GPUs of that node. Actors that share one belong in one placement group bundle (see Plan.bundles)."""


class EdgePlan(msgspec.Struct, frozen=True):
    """How payloads cross one edge."""

    edge: Edge
    transport: Literal["local", "object_store"]
    reason: str


class Plan(msgspec.Struct, frozen=True):
    """What runs where, and why. Nothing has started yet."""

    graph: Graph
    hardware: Hardware
    runner: Literal["inline", "ray"]
    reason: str
    """Why this runner."""
    processes: tuple[ProcessPlan, ...]
    stages: tuple[StagePlan, ...]
    """In topological order."""
    edges: tuple[EdgePlan, ...]
    warnings: tuple[str, ...] = ()

    def stage(self, name: str) -> StagePlan:
        """The plan of one stage."""
        return next(stage for stage in self.stages if stage.stage == name)

    def process(self, name: str) -> ProcessPlan:
        """The plan of one process."""
        return next(process for process in self.processes if process.name == name)

    def bundles(self) -> tuple[tuple[ProcessPlan, ...], ...]:
        """The actors, grouped into placement group bundles: those that share a GPU are together."""
        groups: dict[object, list[ProcessPlan]] = {}
        for process in self.processes:
            if process.kind == "actor":
                key = (process.node, process.gpu_ids) if 0 < process.gpus < 1 else process.name
                groups.setdefault(key, []).append(process)
        return tuple(tuple(group) for group in groups.values())


_PAYLOAD_RANKS = {"video": 2, "image": 1, "audio": 1, "tensor": 1, "any": 1, "text": 0, "json": 0}


class _Want(msgspec.Struct, frozen=True):
    """What one stage asks for, read once from its spec, kind and checkpoint."""

    name: str
    spec: StageSpec
    weight_bytes: int | None
    """None when unknown, 0 when it has no weights."""
    is_heavy: bool
    """It has a model or GPUs of its own, so it cannot ride along with another stage."""
    on_gpu: bool


class _Home(msgspec.Struct, frozen=True):
    """The process that a stage belongs to."""

    process: str
    reason: str


def plan_graph(
    graph: Graph,
    hardware: Hardware,
    facts: dict[str, CheckpointFacts],
    runner: Literal["auto", "inline", "ray"] = "auto",
) -> Plan:
    """Place every stage of `graph` on `hardware`.

    `facts` maps stage -> checkpoint facts, for the stages that have a model; one that is missing counts as unknown.
    `runner` overrides rule 1. Raises PlanError when it cannot work, with the reason and the remedy.
    """
    if not hardware.nodes:
        raise PlanError(f"hardware '{hardware.name}' has no nodes: name at least one")
    wants = {name: _want(name, graph.spec.stages[name], hardware, facts.get(name)) for name in graph.order}
    chosen, reason = _choose_runner(wants, runner)
    if runner == "auto" and chosen == "inline" and len(hardware.nodes) > 1:
        try:
            return _place(graph, hardware, wants, chosen, reason)
        except PlanError:
            chosen, reason = "ray", f"the driver's node '{hardware.nodes[0].name}' cannot hold the graph by itself"
    return _place(graph, hardware, wants, chosen, reason)


def _place(
    graph: Graph, hardware: Hardware, wants: dict[str, _Want], runner: Literal["inline", "ray"], reason: str
) -> Plan:
    homes = _choose_homes(graph, wants, runner)
    shares = _share_gpus(hardware, wants, homes, runner)
    processes = _plan_processes(graph, hardware, wants, homes, shares)
    hosts = {stage: process for process in processes for stage in process.stages}
    stages = tuple(_plan_stage(wants[name], homes[name], shares.get(name), hardware) for name in graph.order)
    return Plan(
        graph=graph,
        hardware=hardware,
        runner=runner,
        reason=reason,
        processes=processes,
        stages=stages,
        edges=tuple(_plan_edge(edge, hosts) for edge in graph.edges()),
        warnings=tuple(_warnings(hardware, wants, shares, hosts)),
    )


# What the stages ask for ----------------------------------------------------------------------------------------


def _want(name: str, spec: StageSpec, hardware: Hardware, facts: CheckpointFacts | None) -> _Want:
    has_model = find_kind_of(spec).checkpoint(spec) is not None
    gpus = spec.resources.gpus
    device = _device_of(spec)
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
        weight_bytes = facts.loaded_bytes(getattr(spec, "dtype", "auto")) if facts and facts.known else None
    return _Want(name, spec, weight_bytes, is_heavy=has_model or bool(gpus), on_gpu=on_gpu)


def _device_of(spec: StageSpec) -> str:
    """Kinds with a model have a `device` in their spec; the base spec has none."""
    return str(getattr(spec, "device", "auto"))


# Rules 1 and 2: runner, processes -------------------------------------------------------------------------------


def _choose_runner(wants: dict[str, _Want], runner: str) -> tuple[Literal["inline", "ray"], str]:
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
        return "ray", f"isolation: actor on {_listed(actors)}"
    if not heavy:
        return "inline", "no stage holds a model or a GPU"
    if len(heavy) == 1:
        return "inline", f"'{heavy[0]}' is the only stage with a model or a GPU, so nothing needs another process"
    if not own:
        return "inline", "isolation: inline on every stage with a model or a GPU"
    return "ray", f"{len(heavy)} stages have a model or a GPU: {_listed(heavy)}"


def _choose_homes(graph: Graph, wants: dict[str, _Want], runner: str) -> dict[str, _Home]:
    """The process of every stage: models first, then the stages that ride along."""
    if runner == "inline":
        return {name: _Home(DRIVER, "inline: every stage runs in the driver") for name in graph.order}
    homes: dict[str, _Home] = {}
    for name, want in wants.items():
        if want.spec.isolation == "inline":
            homes[name] = _Home(DRIVER, "isolation: inline")
        elif want.spec.isolation == "actor":
            homes[name] = _Home(_actor_name(name), "isolation: actor")
        elif want.is_heavy:
            what = "a model" if want.weight_bytes != 0 else "a GPU"
            homes[name] = _Home(_actor_name(name), f"has {what}, so it gets an actor of its own")
    for name in graph.order:
        producers = [edge for edge in graph.edges() if edge.target_stage == name and edge.source.stage in homes]
        if name not in homes and producers:
            source = max(producers, key=lambda edge: _payload_rank(graph, edge)).source.stage
            homes[name] = _Home(homes[source].process, f"rides with '{source}', whose payload it reads")
    for name in reversed(graph.order):
        if name not in homes:
            homes[name] = _ride_with_reader(graph, name, homes)
    return homes


def _ride_with_reader(graph: Graph, name: str, homes: dict[str, _Home]) -> _Home:
    readers = [reader for reader in graph.order if reader in graph.readers(name)]
    if not readers:
        return _Home(DRIVER, "reads no other stage and none reads it, so it stays in the driver")
    return _Home(homes[readers[0]].process, f"rides with '{readers[0]}', which reads its payload")


def _payload_rank(graph: Graph, edge: Edge) -> int:
    """How large a payload of this port type tends to be; `max` keeps the first of equals."""
    port = graph.ports[edge.source.stage].outputs.get(edge.source.port)
    return _PAYLOAD_RANKS.get(base_type(port.type), 1) if port else 1


def _actor_name(stage: str) -> str:
    return stage if stage != DRIVER else f"{stage} actor"


# GPUs -----------------------------------------------------------------------------------------------------------


def _share_gpus(hardware: Hardware, wants: dict[str, _Want], homes: dict[str, _Home], runner: str) -> dict[str, Share]:
    """GPUs of the driver's stages, then of the actors, of what is left."""
    slots = [
        Slot(node, gpu_id, gpu.memory_bytes)
        for node, there in enumerate(hardware.nodes)
        for gpu_id, gpu in enumerate(there.gpus)
    ]
    claims = [
        Claim(want.name, want.weight_bytes, want.spec.resources.gpus, _gpu_id(want.spec) if in_driver else None)
        for want in wants.values()
        if want.on_gpu
        for in_driver in [homes[want.name].process == DRIVER]
    ]
    inside = [claim for claim in claims if homes[claim.stage].process == DRIVER]
    outside = [claim for claim in claims if homes[claim.stage].process != DRIVER]
    first = [slot for slot in slots if slot.node == 0]
    if runner == "ray":  # Ray counts its GPUs from 0, so the driver takes its own from the other end
        first.reverse()
    shares = place_gpus(inside, first)
    return shares | place_gpus(outside, [slot for slot in slots if slot.is_whole])


def _gpu_id(spec: StageSpec) -> int | None:
    _, _, number = _device_of(spec).partition(":")
    return int(number) if number else None


# Processes, edges, warnings -------------------------------------------------------------------------------------


def _plan_processes(
    graph: Graph, hardware: Hardware, wants: dict[str, _Want], homes: dict[str, _Home], shares: dict[str, Share]
) -> tuple[ProcessPlan, ...]:
    members: dict[str, list[str]] = {DRIVER: []}
    for name in graph.order:
        members.setdefault(homes[name].process, []).append(name)
    rivals = _rivals(graph, wants, members)
    asked = {name: [wants[stage].spec.resources.cpus for stage in stages] for name, stages in members.items()}
    claims = []
    for name, stages in members.items():
        numbers = [cpus for cpus in asked[name] if cpus is not None]
        node = next((shares[stage].node for stage in stages if stage in shares), 0 if name == DRIVER else None)
        claims.append(CpuClaim(name, name != DRIVER, sum(numbers) if numbers else None, node, rivals[name]))
    places = place_cpus(claims, [node.cpus for node in hardware.nodes])
    return tuple(_plan_process(claim, members[claim.process], shares, places, hardware) for claim in claims)


def _plan_process(
    claim: CpuClaim, stages: list[str], shares: dict[str, Share], places: dict[str, CpuShare], hardware: Hardware
) -> ProcessPlan:
    place = places[claim.process]
    node = hardware.nodes[place.node]
    held = [shares[stage] for stage in stages if stage in shares]
    gpu_ids = tuple(sorted({gpu_id for share in held for gpu_id in share.gpu_ids}))
    beside = sorted(rival for rival in claim.rivals if places[rival].node == place.node)
    if not stages:
        reason = "hosts no stage: it hands requests on"
    elif claim.cpus:
        reason = f"as many threads as resources.cpus says ({claim.cpus:g})"
    elif beside:
        reason = f"shares the {node.cpus:g} cores with {_listed(beside)}, which may work at the same time"
    else:
        reason = f"may use all {node.cpus:g} cores: no other process works on a request at the same time"
    is_driver = claim.process == DRIVER
    return ProcessPlan(
        name=claim.process,
        kind="driver" if is_driver else "actor",
        stages=tuple(stages),
        cpus=place.cpus,
        gpus=float(len(gpu_ids)) if is_driver else round(sum(share.gpus for share in held), 4),
        num_threads=place.num_threads,
        reason=reason,
        node=node.name,
        gpu_ids=gpu_ids,
    )


def _rivals(graph: Graph, wants: dict[str, _Want], members: dict[str, list[str]]) -> dict[str, frozenset[str]]:
    """Process -> those others that may compute for the same request while it does; cheap stages do not count."""
    before: dict[str, set[str]] = {}
    for name in graph.order:
        upstream = graph.upstream(name)
        before[name] = set(upstream).union(*(before[source] for source in upstream))
    heavy = {process: [name for name in stages if wants[name].is_heavy] for process, stages in members.items()}

    def overlap(one: str, other: str) -> bool:
        return any(a not in before[b] and b not in before[a] for a in heavy[one] for b in heavy[other])

    return {one: frozenset(other for other in members if other != one and overlap(one, other)) for one in members}


def _plan_stage(want: _Want, home: _Home, share: Share | None, hardware: Hardware) -> StagePlan:
    if share is None:
        device = "cpu"
        on = "" if not want.is_heavy else "; " + _why_cpu(want, hardware)
    else:
        first = min(share.gpu_ids)
        device = f"cuda:{first}" if home.process == DRIVER and first else "cuda"
        what = "a whole GPU" if share.gpus == 1 else f"{share.gpus:g} {'GPUs' if share.gpus > 1 else 'of a GPU'}"
        why = ", as resources.gpus says" if want.spec.resources.gpus else ""
        if share.gpus < 1 and not why:
            why = f": its weights of {format_bytes(want.weight_bytes or 0)} with room to work, beside other stages"
        on = f"; {what} ({hardware.nodes[share.node].gpus[first].name}){why}"
    return StagePlan(want.name, home.process, device, want.weight_bytes, home.reason + on)


def _why_cpu(want: _Want, hardware: Hardware) -> str:
    if _device_of(want.spec) == "cpu":
        return "device: cpu"
    if want.spec.resources.gpus == 0:
        return "resources.gpus: 0, so on the CPU"
    return f"on the CPU, since {hardware.name} has no GPU"


def _plan_edge(edge: Edge, processes: dict[str, ProcessPlan]) -> EdgePlan:
    source, target = processes[edge.source.stage], processes[edge.target_stage]
    if source.name == target.name:
        return EdgePlan(edge, "local", "same process: handed over as it is")
    if source.node == target.node:
        return EdgePlan(edge, "object_store", "same node: written once, read by consumers without a copy")
    reason = f"from node {source.node} to {target.node}: object store transfer over the network"
    return EdgePlan(edge, "object_store", reason)


def _warnings(
    hardware: Hardware, wants: dict[str, _Want], shares: dict[str, Share], processes: dict[str, ProcessPlan]
) -> list[str]:
    """What may go wrong although the plan holds."""
    found = []
    host_bytes = dict.fromkeys((node.name for node in hardware.nodes), 0)
    for name, want in wants.items():
        share = shares.get(name)
        if share is None:
            host_bytes[processes[name].node] += want.weight_bytes or 0
        if want.weight_bytes is None:
            whole = ", so it gets a whole GPU" if share else ""
            found.append(f"stage '{name}': its checkpoint is not on this machine, its size is unknown{whole}")
        elif share is not None and share.gpus >= 1:
            memory = sum(hardware.nodes[share.node].gpus[gpu_id].memory_bytes for gpu_id in share.gpu_ids)
            if want.weight_bytes * SHARE_FACTOR > memory:
                sizes = f"{format_bytes(want.weight_bytes)} of {format_bytes(memory)}"
                found.append(f"stage '{name}': its weights take {sizes}, which leaves little room for activations")
        number = _gpu_id(want.spec)
        if number is not None and processes[name].name != DRIVER:
            found.append(f"stage '{name}': device: cuda:{number} counts only in the driver; Ray picks an actor's GPU")
    for node in hardware.nodes:
        if host_bytes[node.name] > node.memory_bytes:
            sizes = f"{format_bytes(host_bytes[node.name])}, more than the {format_bytes(node.memory_bytes)} there are"
            found.append(f"node '{node.name}': the weights on its CPUs take {sizes}")
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
