"""GraphSpec + hardware + checkpoint sizes -> Plan. Pure and printable; each decision carries its reason."""

from __future__ import annotations

from typing import Literal

import msgspec

from omni.budgets import build_claim, plan_memories, share_hosts
from omni.checkpoint import CheckpointFacts
from omni.choices import RunnerChoice
from omni.errors import PlanError
from omni.graph import Edge, Graph
from omni.hardware import Gpu, Hardware, Node
from omni.memory import MemoryPlan
from omni.placement import SHARE_FACTOR, CpuClaim, CpuShare, Share, Slot, place_cpus, place_gpus
from omni.processes import DRIVER, Home, Want, choose_homes, choose_runner, device_of, listed, read_want
from omni.sizes import format_bytes
from omni.spec import StageSpec

__all__ = [
    "DRIVER",
    "CheckpointFacts",
    "EdgePlan",
    "Gpu",
    "Hardware",
    "Node",
    "Plan",
    "ProcessPlan",
    "StagePlan",
    "plan_graph",
]


class StagePlan(msgspec.Struct, frozen=True):
    """Where one stage runs."""

    stage: str
    process: str
    device: str
    """`cpu` or `cuda`, from the stage's point of view."""
    weight_bytes: int | None
    """Bytes of its weights; None when unknown, 0 when it has none."""
    reason: str
    memory: MemoryPlan | None = None
    """Where its weights live; None when it has none."""


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


def plan_graph(
    graph: Graph,
    hardware: Hardware,
    facts: dict[str, CheckpointFacts],
    runner: RunnerChoice = "auto",
) -> Plan:
    """Place every stage of `graph` on `hardware`.

    `facts` maps stage -> checkpoint facts, for the stages that have a model; one that is missing counts as unknown.
    `runner` overrides rule 1. Raises PlanError when it cannot work, with the reason and the remedy.
    """
    if not hardware.nodes:
        raise PlanError(f"hardware '{hardware.name}' has no nodes: name at least one")
    wants = {name: read_want(name, graph.spec.stages[name], hardware, facts.get(name)) for name in graph.order}
    chosen, reason = choose_runner(wants, runner)
    if runner == "auto" and chosen == "inline" and len(hardware.nodes) > 1:
        try:
            return _place(graph, hardware, wants, chosen, reason)
        except PlanError:
            chosen, reason = "ray", f"the driver's node '{hardware.nodes[0].name}' cannot hold the graph by itself"
    return _place(graph, hardware, wants, chosen, reason)


def _place(
    graph: Graph, hardware: Hardware, wants: dict[str, Want], runner: Literal["inline", "ray"], reason: str
) -> Plan:
    homes = choose_homes(graph, wants, runner)
    shares = _share_gpus(hardware, wants, homes, runner)
    processes = _plan_processes(graph, hardware, wants, homes, shares)
    hosts = {stage: process for process in processes for stage in process.stages}
    nodes = {stage: process.node for stage, process in hosts.items()}
    memories = share_hosts(plan_memories(hardware, wants, shares, nodes), wants, nodes, graph.base_dir)
    stages = tuple(
        _plan_stage(wants[name], homes[name], shares.get(name), memories.get(name), hardware) for name in graph.order
    )
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


# GPUs -----------------------------------------------------------------------------------------------------------


def _share_gpus(hardware: Hardware, wants: dict[str, Want], homes: dict[str, Home], runner: str) -> dict[str, Share]:
    """GPUs of the driver's stages, then of the actors, of what is left."""
    slots = [
        Slot.of(node, gpu_id, gpu.memory_bytes)
        for node, there in enumerate(hardware.nodes)
        for gpu_id, gpu in enumerate(there.gpus)
    ]
    claims = [
        build_claim(want, hardware, in_driver=homes[want.name].process == DRIVER)
        for want in wants.values()
        if want.on_gpu
    ]
    inside = [claim for claim in claims if homes[claim.stage].process == DRIVER]
    outside = [claim for claim in claims if homes[claim.stage].process != DRIVER]
    first = [slot for slot in slots if slot.node == 0]
    if runner == "ray":  # Ray counts its GPUs from 0, so the driver takes its own from the other end
        first.reverse()
    shares = place_gpus(inside, first)
    return shares | place_gpus(outside, [slot for slot in slots if slot.is_whole])


def _gpu_id(spec: StageSpec) -> int | None:
    _, _, number = device_of(spec).partition(":")
    return int(number) if number else None


# Processes, edges, warnings -------------------------------------------------------------------------------------


def _plan_processes(
    graph: Graph, hardware: Hardware, wants: dict[str, Want], homes: dict[str, Home], shares: dict[str, Share]
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
        gpu_ids = {gpu_id for stage in stages if stage in shares for gpu_id in shares[stage].gpu_ids}
        part = len(gpu_ids) / len(hardware.nodes[node].gpus) if node is not None and gpu_ids else 0.0
        cpus = sum(numbers) if numbers else None
        claims.append(CpuClaim(name, name != DRIVER, cpus, node, part, rivals[name]))
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
    elif 0 < claim.gpu_part <= 1 / (1 + len(beside)) and claim.gpu_part < 1:
        reason = f"gets the same part of the {node.cpus:g} cores as of the {len(node.gpus)} GPUs"
    elif beside:
        reason = f"shares the {node.cpus:g} cores with {listed(beside)}, which may work at the same time"
    else:
        reason = f"may use all {node.cpus:g} cores: no process beside it works on a request at the same time"
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


def _rivals(graph: Graph, wants: dict[str, Want], members: dict[str, list[str]]) -> dict[str, frozenset[str]]:
    """Process -> those others that may compute for the same request while it does; cheap stages do not count."""
    before: dict[str, set[str]] = {}
    for name in graph.order:
        upstream = graph.upstream(name)
        before[name] = set(upstream).union(*(before[source] for source in upstream))
    heavy = {process: [name for name in stages if wants[name].is_heavy] for process, stages in members.items()}

    def overlap(one: str, other: str) -> bool:
        return any(a not in before[b] and b not in before[a] for a in heavy[one] for b in heavy[other])

    return {one: frozenset(other for other in members if other != one and overlap(one, other)) for one in members}


def _plan_stage(
    want: Want, home: Home, share: Share | None, memory: MemoryPlan | None, hardware: Hardware
) -> StagePlan:
    if share is None:
        device = "cpu"
        on = "" if not want.is_heavy else "; " + _why_cpu(want, hardware)
    else:
        first = min(share.gpu_ids)
        device = f"cuda:{first}" if home.process == DRIVER and first else "cuda"
        what = "a whole GPU" if share.gpus == 1 else f"{share.gpus:g} {'GPUs' if share.gpus > 1 else 'of a GPU'}"
        why = ", as resources.gpus says" if want.spec.resources.gpus else ""
        if share.gpus < 1 and not why:
            why = f": for its weights of {format_bytes(want.weight_bytes or 0)} with room to work, beside other stages"
        on = f"; {what} ({hardware.nodes[share.node].gpus[first].name}){why}"
    return StagePlan(want.name, home.process, device, want.weight_bytes, home.reason + on, memory)


def _why_cpu(want: Want, hardware: Hardware) -> str:
    if device_of(want.spec) == "cpu":
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
    hardware: Hardware, wants: dict[str, Want], shares: dict[str, Share], processes: dict[str, ProcessPlan]
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
        elif share is not None and share.gpus >= 1 and not hasattr(want.spec, "offload"):
            memory = sum(hardware.nodes[share.node].gpus[gpu_id].memory_bytes for gpu_id in share.gpu_ids)
            if want.weight_bytes * SHARE_FACTOR > memory > 0:
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
