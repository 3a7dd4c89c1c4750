"""Budgets of stages that share GPUs and hosts, through whole plans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import registry
from omni.checkpoint import CheckpointFacts
from omni.component_facts import BlockList, ComponentFacts
from omni.errors import PlanError
from omni.graph import resolve
from omni.hardware import Gpu, Hardware, Node
from omni.memory import ComponentUse, MemoryPlan
from omni.memory_layouts import CONTEXT_BYTES
from omni.plan import Plan, plan_graph
from omni.registry import CheckpointRef, Port, Ports, StageKind
from omni.sizes import GIB
from omni.spec import GraphSpec, OffloadSpec, ResourcesSpec, StageSpec


class BudgetSpec(StageSpec, frozen=True, kw_only=True, tag="budgeted"):
    """A stage that can offload."""

    offload: OffloadSpec = OffloadSpec()
    device: str = "auto"
    model: str = "model"
    dtype: str = "bfloat16"


KIND = StageKind(
    name="budgeted",
    spec_type=BudgetSpec,
    stage="nowhere:Stage",
    ports=lambda spec, base_dir: Ports({name: Port("any") for name in spec.inputs}, {"text": Port("text")}),
    checkpoint=lambda spec: CheckpointRef(spec.model),
    uses=lambda spec, facts: {"model": ComponentUse(num_runs=10, activation_bytes=GIB)},
)


@pytest.fixture(autouse=True, scope="module")
def kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILT_IN, "budgeted", f"{__name__}:KIND")
        yield
    registry.find_kind.cache_clear()


def model(gib: int) -> CheckpointFacts:
    """Blocks of a GiB each."""
    blocks = BlockList("blocks", ({"BF16": GIB},) * gib)
    return CheckpointFacts({"model": gib * GIB}, parts={"model": ComponentFacts({"BF16": gib * GIB}, {}, (blocks,))})


def stage(gpus: float | None = None, device: str = "auto", **offload: Any) -> BudgetSpec:
    return BudgetSpec(resources=ResourcesSpec(gpus=gpus), device=device, offload=OffloadSpec(**offload))


def plan(stages: dict[str, tuple[BudgetSpec, int]], *gpu_gib: int, host_gib: int = 512) -> Plan:
    node = Node("one", 8, host_gib * GIB, tuple(Gpu("gpu", size * GIB) for size in gpu_gib))
    graph = resolve(GraphSpec(stages={name: spec for name, (spec, _) in stages.items()}))
    return plan_graph(graph, Hardware("bench", (node,)), {name: model(gib) for name, (_, gib) in stages.items()})


def memory(found: Plan, name: str) -> MemoryPlan:
    there = found.stage(name).memory
    assert there is not None
    return there


def outcome(found: Plan) -> dict[str, tuple[str, int]]:
    """Stage -> policy, and GiB of weights that stay on the device."""
    memories = {stage.stage: memory(found, stage.stage) for stage in found.stages}
    return {name: (m.policy, sum(part.device_bytes for part in m.components) // GIB) for name, m in memories.items()}


PLANS = [
    ("fits", {"a": (stage(), 20)}, [24], {"a": ("none", 20)}),
    ("a model larger than the GPU is offloaded", {"a": (stage(), 40)}, [24], {"a": ("layerwise", 19)}),
    ("each its own GPU", {"a": (stage(), 40), "b": (stage(), 20)}, [24, 24],
     {"a": ("layerwise", 19), "b": ("none", 20)}),
    ("sharing beats offloading", {"a": (stage(), 30), "b": (stage(), 30)}, [24, 80],
     {"a": ("none", 30), "b": ("none", 30)}),
    ("both fit side by side", {"a": (stage(), 30), "b": (stage(), 40)}, [80], {"a": ("none", 30), "b": ("none", 40)}),
    ("both give way", {"a": (stage(), 50), "b": (stage(), 50)}, [80], {"a": ("layerwise", 23), "b": ("layerwise", 23)}),
    ("vram: is the claim", {"a": (stage(vram="16GiB"), 50), "b": (stage(), 60)}, [80],
     {"a": ("layerwise", 11), "b": ("none", 60)}),
    ("vram: of more than it needs", {"a": (stage(vram="60GiB"), 10), "b": (stage(), 60)}, [80],
     {"a": ("none", 10), "b": ("none", 60)}),
    ("a fraction is a budget", {"a": (stage(gpus=0.25), 30), "b": (stage(), 40)}, [80],
     {"a": ("layerwise", 15), "b": ("none", 40)}),
    ("layerwise takes the least", {"a": (stage(policy="layerwise"), 50), "b": (stage(), 60)}, [80],
     {"a": ("layerwise", 0), "b": ("none", 60)}),
    ("a GPU of its own by number", {"a": (stage(device="cuda:1"), 30)}, [80, 24], {"a": ("layerwise", 19)}),
    ("unknown memory", {"a": (stage(), 500)}, [0], {"a": ("none", 500)}),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "gpus", "expected"), [row[1:] for row in PLANS], ids=[row[0] for row in PLANS])
def test_budgets(
    stages: dict[str, tuple[BudgetSpec, int]], gpus: list[int], expected: dict[str, tuple[str, int]]
) -> None:
    assert outcome(plan(stages, *gpus)) == expected


def test_hosts_memory_is_parted_too() -> None:
    two = {"a": (stage(), 40), "b": (stage(), 40)}
    assert {policy for policy, _ in outcome(plan(two, 24, 24, host_gib=90)).values()} == {"layerwise"}
    assert {policy for policy, _ in outcome(plan(two, 24, 24, host_gib=60)).values()} == {"disk"}


def test_stages_with_the_same_weights_in_host_memory_have_one_copy() -> None:
    spec = stage(policy="layerwise")
    found = plan({"a": (spec, 40), "b": (spec, 40), "c": (stage(), 20)}, 24, 24, 24)
    first, second = memory(found, "a"), memory(found, "b")
    assert first.shares_host
    assert second.shares_host
    assert not memory(found, "c").shares_host
    assert first.peak_host_bytes - second.peak_host_bytes == 40 * GIB


@pytest.mark.parametrize(
    "other",
    [
        {"model": "another"},
        {"dtype": "float32"},
        {"offload": OffloadSpec(policy="disk")},
        {"offload": OffloadSpec(policy="none")},
        {"device": "cpu"},
    ],
)
def test_other_weights_are_not_shared(other: dict[str, Any]) -> None:
    specs = (stage(policy="layerwise"), msgspec.structs.replace(stage(policy="layerwise"), **other))
    found = plan({"a": (specs[0], 20), "b": (specs[1], 20)}, 24, 24)
    assert [memory(found, name).shares_host for name in ("a", "b")] == [False, False]


def test_nodes_share_nothing() -> None:
    nodes = tuple(Node(name, 8, 512 * GIB, (Gpu("gpu", 24 * GIB),)) for name in ("one", "two"))
    spec = stage(policy="layerwise", resident="18GiB")
    graph = resolve(GraphSpec(stages={"a": spec, "b": spec}))
    found = plan_graph(graph, Hardware("bench", nodes), {"a": model(40), "b": model(40)})
    assert {process.node for process in found.processes if process.kind == "actor"} == {"one", "two"}
    assert not memory(found, "a").shares_host


def test_a_stage_on_the_cpu_has_its_host_bytes_counted() -> None:
    found = memory(plan({"a": (stage(device="cpu"), 40)}, 24), "a")
    assert (found.policy, found.room.device, found.budget_bytes) == ("none", "cpu", 0)
    assert found.peak_host_bytes > 41 * GIB


@pytest.mark.parametrize(
    ("spec", "gpus", "message"),
    [
        (stage(), [4], "stage 'a': with its offload policy it needs at least 5.0 GiB and the largest GPU has 4.0 GiB"),
        (
            stage(policy="none"),
            [24],
            "stage 'a': with its offload policy it needs at least 42.0 GiB and the largest GPU",
        ),
        (stage(policy="component"), [24], "stage 'a': offload.policy: component needs several components"),
        (
            stage(policy="layerwise", resident="30GiB"),
            [24],
            "stage 'a': offload.policy: layerwise does not fit: 30.0 GiB",
        ),
        (stage(gpus=0.1), [40], "need at least 5.0 GiB of GPU memory, the CUDA context included, and there are 4.0"),
    ],
)
def test_refused(spec: BudgetSpec, gpus: list[int], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan({"a": (spec, 40)}, *gpus)
    assert message in str(caught.value)


sized = st.tuples(st.builds(stage, st.sampled_from([None, None, None, 0.5])), st.integers(4, 90))


@settings(max_examples=150)
@given(st.lists(sized, min_size=1, max_size=4), st.lists(st.sampled_from([8, 24, 80]), min_size=1, max_size=3))
def test_budgets_add_up_to_what_a_gpu_has(stages: list[tuple[BudgetSpec, int]], gpus: list[int]) -> None:
    try:
        found = plan({f"s{index}": one for index, one in enumerate(stages)}, *gpus)
    except PlanError:
        return
    taken = dict.fromkeys(range(len(gpus)), 0)
    for one in found.stages:
        there = memory(found, one.stage)
        assert there.peak_device_bytes + CONTEXT_BYTES <= there.budget_bytes
        process = found.process(one.process)
        gpu_id = int(one.device.partition(":")[2] or 0) if process.kind == "driver" else process.gpu_ids[0]
        taken[gpu_id] += there.budget_bytes
    assert all(taken[gpu_id] <= gpus[gpu_id] * GIB for gpu_id in taken)
