"""GraphSpec + hardware + checkpoint sizes -> Plan. Pure and printable; each decision carries its reason."""

from __future__ import annotations

from typing import Literal

import msgspec

from omni.graph import Edge, Graph

GIB = 1024**3
DRIVER = "driver"
"""Name of the process that the user's program is."""


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


def plan_graph(
    graph: Graph,
    hardware: Hardware,
    facts: dict[str, CheckpointFacts],
    runner: Literal["auto", "inline", "ray"] = "auto",
) -> Plan:
    """Place every stage of `graph` on `hardware`.

    `facts` maps stage -> checkpoint facts, for the stages that have a model. `runner` overrides rule 1.
    Raises PlanError when it cannot work, with the reason and the remedy.
    """
    raise NotImplementedError
