"""The planner: GPUs, CPUs, edges and reasons, in tables and as properties of random graphs on random hardware."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import registry
from omni.errors import PlanError
from omni.graph import resolve
from omni.hardware import Gpu, Hardware, Node, preset
from omni.placement import SHARE_FACTOR
from omni.plan import DRIVER, CheckpointFacts, Plan, ProcessPlan, plan_graph
from omni.registry import CheckpointRef, Port, Ports, StageKind
from omni.sizes import GIB
from omni.spec import GraphSpec, ResourcesSpec, StageSpec


class ModelSpec(StageSpec, frozen=True, kw_only=True, tag="planned"):
    """A stage with all that the planner looks at."""

    has_model: bool = True
    device: str = "auto"
    dtype: str = "auto"


KIND = StageKind(
    name="planned",
    spec_type=ModelSpec,
    stage="nowhere:Stage",
    ports=lambda spec, base_dir: Ports({name: Port("any") for name in spec.inputs}, {"text": Port("text")}),
    checkpoint=lambda spec: CheckpointRef("model") if spec.has_model else None,
)


@pytest.fixture(autouse=True, scope="module")
def kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILT_IN, "planned", f"{__name__}:KIND")
        yield
    registry.find_kind.cache_clear()


def stage(*reads: str, gpus: float | None = None, cpus: float | None = None, **fields: Any) -> ModelSpec:
    inputs = {f"in{index}": f"{source}.text" for index, source in enumerate(reads)}
    return ModelSpec(inputs=inputs, resources=ResourcesSpec(cpus=cpus, gpus=gpus), **fields)


def plan(
    stages: dict[str, ModelSpec],
    hardware: str | Hardware = "cpu4",
    gib: dict[str, float | None] | float | None = 10,
    runner: Any = "auto",
) -> Plan:
    """Plan `stages`; `gib` is the size of their weights, None for unknown."""
    sizes = gib if isinstance(gib, dict) else dict.fromkeys(stages, gib)
    facts = {
        name: CheckpointFacts({}, known=False) if size is None else CheckpointFacts({"model": int(size * GIB)})
        for name, size in sizes.items()
    }
    hardware = preset(hardware) if isinstance(hardware, str) else hardware
    return plan_graph(resolve(GraphSpec(stages=stages)), hardware, facts, runner)


def machine(*gpu_gib: int, cpus: float = 8) -> Hardware:
    """One node with GPUs of these sizes."""
    return Hardware("bench", (Node("one", cpus, 64 * GIB, tuple(Gpu("gpu", size * GIB) for size in gpu_gib)),))


def on_gpus(found: Plan) -> dict[str, tuple[tuple[int, ...], float]]:
    return {process.name: (process.gpu_ids, process.gpus) for process in found.processes if process.gpus}


# GPUs -----------------------------------------------------------------------------------------------------------

CHAIN = {"a": stage(), "b": stage("a")}
THREE = {**CHAIN, "c": stage("b")}

AFTER_A = stage("a")
TWO = machine(80, 80)


@pytest.mark.parametrize(
    ("stages", "hardware", "expected"),
    [
        (CHAIN, TWO, {"a": ((0,), 1), "b": ((1,), 1)}),
        (CHAIN, machine(80), {"a": ((0,), 0.18), "b": ((0,), 0.18)}),
        ({"a": stage(device="cpu"), "b": AFTER_A}, machine(80), {"b": ((0,), 1)}),
        ({"a": stage(gpus=0), "b": AFTER_A}, machine(80), {"b": ((0,), 1)}),
        ({"a": stage(gpus=2), "b": AFTER_A}, machine(80, 80, 80), {"a": ((0, 1), 2), "b": ((2,), 1)}),
        ({"a": stage()}, TWO, {DRIVER: ((0,), 1)}),
        ({"a": stage(device="cuda:1")}, TWO, {DRIVER: ((1,), 1)}),
        ({"a": stage(isolation="inline"), "b": AFTER_A}, TWO, {DRIVER: ((1,), 1), "b": ((0,), 1)}),
    ],
    ids=["whole", "shared", "device: cpu", "gpus: 0", "two", "inline", "pinned", "driver takes the last"],
)
def test_gpus(stages: dict[str, ModelSpec], hardware: Hardware, expected: dict[str, Any]) -> None:
    found = plan(stages, hardware)
    assert on_gpus(found) == expected
    for name in stages:
        process = found.process(found.stage(name).process)
        device = found.stage(name).device.partition(":")
        assert device[0] == ("cuda" if process.gpus else "cpu")
        if device[2]:
            assert process.name == DRIVER
            assert int(device[2]) in process.gpu_ids


def test_driver_names_its_gpu_unless_it_is_the_first() -> None:
    found = plan(CHAIN, machine(80, 80), runner="inline")
    assert {name: found.stage(name).device for name in CHAIN} == {"a": "cuda", "b": "cuda:1"}
    assert found.process(DRIVER).gpus == 2


def test_dtype_changes_the_bytes() -> None:
    graph = resolve(GraphSpec(stages={"a": stage(dtype="bfloat16")}))
    facts = {"a": CheckpointFacts({"model": 10 * GIB}, {"F32": 8 * GIB, "I64": 2 * GIB})}
    assert plan_graph(graph, preset("cpu4"), facts).stage("a").weight_bytes == 6 * GIB


@pytest.mark.parametrize(("device", "size"), [("auto", 4), ("cpu", 8)])
def test_auto_dtype_is_sized_as_it_loads(device: str, size: int) -> None:
    graph = resolve(GraphSpec(stages={"a": stage(device=device)}))
    facts = {"a": CheckpointFacts({"model": 8 * GIB}, {"F32": 8 * GIB})}
    assert plan_graph(graph, TWO, facts).stage("a").weight_bytes == size * GIB


@pytest.mark.parametrize(
    ("spec", "hardware", "message"),
    [
        (stage(), machine(4), "stage 'a': its weights take 10.0 GiB and the largest GPU has 4.0 GiB"),
        (stage(device="cuda"), machine(), "stage 'a': device: cuda, but bench has no GPU: say device: cpu"),
        (stage(device="cpu", gpus=1), TWO, "stage 'a': device: cpu and resources.gpus: 1 contradict each other"),
        (stage(device="cuda", gpus=0), TWO, "stage 'a': device: cuda and resources.gpus: 0 contradict each other"),
        (stage(cpus=9, isolation="actor"), machine(), "process 'a': reserves 9 cores, and a node has at most 8"),
    ],
)
def test_refused(spec: ModelSpec, hardware: Hardware, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan({"a": spec}, hardware)
    assert message in str(caught.value)


def test_hardware_without_nodes() -> None:
    with pytest.raises(PlanError, match="has no nodes"):
        plan({"a": stage()}, Hardware("void", ()))


def test_stage_that_the_drivers_node_cannot_hold_goes_to_another() -> None:
    nodes = (Node("head", 4, GIB), Node("gpus", 8, GIB, (Gpu("h100", 80 * GIB),)))
    found = plan({"a": stage()}, Hardware("cluster", nodes))
    assert (found.runner, found.process("a").node) == ("ray", "gpus")
    assert "the driver's node 'head' cannot hold" in found.reason


# CPUs -----------------------------------------------------------------------------------------------------------


def actors(found: Plan) -> list[ProcessPlan]:
    return [process for process in found.processes if process.kind == "actor"]


def test_models_that_wait_for_each_other_may_use_all_cores() -> None:
    found = plan(CHAIN, "cpu4")
    assert [(process.cpus, process.num_threads) for process in actors(found)] == [(1, 4), (1, 4)]


def test_models_that_work_side_by_side_split_the_cores() -> None:
    found = plan({"a": stage(), "b": stage("a"), "c": stage("a"), "d": stage("b", "c")}, "cpu4")
    assert {process.name: process.num_threads for process in actors(found)} == {"a": 4, "b": 2, "c": 2, "d": 4}
    assert "shares the 4 cores with 'c'" in found.process("b").reason


def test_reservations_are_fractions_when_cores_are_few() -> None:
    found = plan(THREE, "cpu2")
    assert [process.cpus for process in actors(found)] == [0.66, 0.66, 0.66]


def test_asked_cores_are_reserved_and_used() -> None:
    found = plan({"a": stage(cpus=3), "b": stage("a")}, "cpu4")
    assert [(process.cpus, process.num_threads) for process in actors(found)] == [(3, 3), (1, 4)]


def test_process_with_a_gpu_gets_its_part_of_the_cores() -> None:
    found = plan(CHAIN, "h100x8")
    assert [process.num_threads for process in actors(found)] == [24, 24]


def test_many_processes_spread_over_nodes() -> None:
    found = plan({f"s{index}": stage() for index in range(5)}, "cpu2x2", gib=0)
    assert [process.node for process in actors(found)] == ["node0", "node0", "node1", "node1", "node0"]


# Edges, bundles, warnings ---------------------------------------------------------------------------------------


def test_transports() -> None:
    nodes = tuple(Node(name, 8, GIB, (Gpu("h100", 80 * GIB),)) for name in ("left", "right"))
    stages = {"a": stage(), "b": stage("a"), "f": stage("b", has_model=False)}
    found = plan(stages, Hardware("pair", nodes), 30)
    assert [(str(planned.edge), planned.transport, planned.reason) for planned in found.edges] == [
        ("a.text -> b.in0", "object_store", "from node left to right: object store transfer over the network"),
        ("b.text -> f.in0", "local", "same process: handed over as it is"),
    ]
    found = plan(stages, machine(80, 80))
    assert found.edges[0].reason == "same node: written once, read by consumers without a copy"


def test_actors_that_share_a_gpu_share_a_bundle() -> None:
    found = plan({**THREE, "d": stage("c", device="cpu")}, machine(80, 80), {"a": 10, "b": 50, "c": 20, "d": 1})
    assert [[process.name for process in bundle] for bundle in found.bundles()] == [["a", "c"], ["b"], ["d"]]


UNKNOWN = "stage 'a': its checkpoint is not on this machine, its size is unknown"


@pytest.mark.parametrize(
    ("spec", "hardware", "gib", "message"),
    [
        (stage(), machine(80), None, f"{UNKNOWN}, so it gets a whole GPU"),
        (stage(), machine(), None, UNKNOWN),
        (stage(), machine(80), 75, "stage 'a': its weights take 75.0 GiB of 80.0 GiB, which leaves little room"),
        (stage(), machine(), 65, "node 'one': the weights on its CPUs take 65.0 GiB, more than the 64.0 GiB there are"),
        (stage(device="cuda:1", isolation="actor"), TWO, 1, "stage 'a': device: cuda:1 counts only in the driver"),
    ],
)
def test_warnings(spec: ModelSpec, hardware: Hardware, gib: Any, message: str) -> None:
    found = plan({"a": spec}, hardware, gib).warnings
    assert len(found) == 1
    assert found[0].startswith(message)


def test_no_warning_without_cause() -> None:
    assert plan(CHAIN, machine(80, 80)).warnings == ()


# Properties -----------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, ModelSpec]:
    names = [f"s{index}" for index in range(draw(st.integers(1, 7)))]
    stages = {}
    for index, name in enumerate(names):
        reads = draw(st.lists(st.sampled_from(names[:index]), unique=True, max_size=3)) if index else []
        has_model = draw(st.booleans())
        stages[name] = stage(
            *reads,
            gpus=draw(st.sampled_from([None] * 12 + [0, 0.3, 0.5, 1, 2])),
            cpus=draw(st.sampled_from([None] * 9 + [0, 0.5, 1, 2])),
            has_model=has_model,
            device=draw(st.sampled_from(["auto"] * 9 + ["cpu", "cuda", "cuda:1"])) if has_model else "auto",
            isolation=draw(st.sampled_from(["auto"] * 9 + ["inline", "actor"])),
        )
    return stages


nodes = st.tuples(st.sampled_from([0.5, 2, 8, 64]), st.lists(st.sampled_from([0, 8, 24, 80]), max_size=4))
machines = st.lists(nodes, min_size=1, max_size=3).map(
    lambda found: Hardware(
        "random",
        tuple(
            Node(f"n{index}", cpus, 64 * GIB, tuple(Gpu("gpu", size * GIB) for size in sizes))
            for index, (cpus, sizes) in enumerate(found)
        ),
    )
)
sizes = st.lists(st.one_of(st.none(), st.floats(0, 8), st.floats(0, 8), st.floats(0, 90)), min_size=7, max_size=7)


@settings(max_examples=300)
@given(graphs(), machines, sizes, st.sampled_from(["auto", "auto", "auto", "ray", "inline"]))
def test_every_plan_holds(
    stages: dict[str, ModelSpec], hardware: Hardware, gib: list[float | None], runner: Any
) -> None:
    arguments = (stages, hardware, dict(zip(stages, gib, strict=False)), runner)
    try:
        found = plan(*arguments)
    except PlanError:
        return
    assert found == plan(*arguments)
    check_processes(found, stages)
    check_cpus(found)
    check_gpus(found)
    process_of = {stage.stage: stage.process for stage in found.stages}
    assert len(found.edges) == sum(len(spec.inputs) for spec in stages.values())
    for planned in found.edges:
        is_same = process_of[planned.edge.source.stage] == process_of[planned.edge.target_stage]
        assert planned.transport == ("local" if is_same else "object_store")
    assert all(item.reason for item in (found, *found.processes, *found.stages, *found.edges))


def check_processes(found: Plan, stages: dict[str, ModelSpec]) -> None:
    assert sorted(name for process in found.processes for name in process.stages) == sorted(stages)
    assert [stage.stage for stage in found.stages] == list(found.graph.order)
    for process in found.processes:
        assert (process.name == DRIVER) == (process.kind == "driver")
        assert all(found.stage(name).process == process.name for name in process.stages)
        assert all(stages[name].isolation != "inline" for name in process.stages if process.kind == "actor")
        assert all(stages[name].isolation != "actor" for name in process.stages if process.kind == "driver")
    if found.runner == "inline":
        assert [process.name for process in found.processes] == [DRIVER]
    bundled = [process.name for bundle in found.bundles() for process in bundle]
    assert sorted(bundled) == sorted(process.name for process in actors(found))


def check_cpus(found: Plan) -> None:
    for node in found.hardware.nodes:
        here = [process for process in found.processes if process.node == node.name]
        assert sum(process.cpus for process in here) <= node.cpus + 1e-6
        assert all(1 <= process.num_threads <= max(1, node.cpus) for process in here if process.kind == "actor")
    assert all(process.cpus > 0 for process in actors(found))
    assert found.process(DRIVER).cpus == 0


def check_gpus(found: Plan) -> None:
    for node in found.hardware.nodes:
        here = [process for process in found.processes if process.node == node.name]
        for gpu_id, gpu in enumerate(node.gpus):
            holders = [process for process in here if gpu_id in process.gpu_ids]
            fractions = [min(1.0, process.gpus) for process in holders]
            assert sum(fractions) <= 1 + 1e-9
            if len(holders) > 1 and gpu.memory_bytes:
                weights = [weights_of(found, process) for process in holders]
                assert sum(weights) <= gpu.memory_bytes
    for process in found.processes:
        memory = [found_node(found, process).gpus[gpu_id].memory_bytes for gpu_id in process.gpu_ids]
        assert len(memory) == -int(-process.gpus // 1)
        assert 0 in memory or weights_of(found, process) <= sum(memory)


def weights_of(found: Plan, process: ProcessPlan) -> int:
    mine = [found.stage(name) for name in process.stages]
    return sum(stage.weight_bytes or 0 for stage in mine if stage.device != "cpu")


def found_node(found: Plan, process: ProcessPlan) -> Node:
    return next(node for node in found.hardware.nodes if node.name == process.node)


def test_shares_leave_room() -> None:
    found = plan(CHAIN, machine(80), {"a": 10, "b": 50})
    assert found.process("b").gpus >= SHARE_FACTOR * 50 / 80
