"""Rules 1 and 2: which runner, and which stages share a process. The tables go through plan_graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from omni.errors import PlanError
from omni.graph import resolve
from omni.hardware import preset
from omni.plan import DRIVER, CheckpointFacts, Plan, plan_graph
from omni.spec import GraphSpec, ResourcesSpec
from omni.testing import DoubleSpec, doubles


@pytest.fixture(autouse=True)
def kinds() -> Iterator[None]:
    with doubles():
        yield


def stage(*reads: str, gives: str = "text", **fields: Any) -> DoubleSpec:
    """A double that reads the payloads of `reads`, given as `stage.port`."""
    ports = {f"in{index}": "any" for index in range(len(reads))}
    inputs = {f"in{index}": source for index, source in enumerate(reads)}
    return DoubleSpec(ports=ports, inputs=inputs, gives=gives, **fields)


def cheap(*reads: str, gives: str = "text", **fields: Any) -> DoubleSpec:
    return stage(*reads, gives=gives, model=False, **fields)


def plan(stages: dict[str, DoubleSpec], hardware: str = "cpu4", runner: Any = "auto") -> Plan:
    graph = resolve(GraphSpec(stages=stages))
    facts = {name: CheckpointFacts({"model": 1 << 30}) for name, spec in stages.items() if spec.model}
    return plan_graph(graph, preset(hardware), facts, runner)


GPU = ResourcesSpec(gpus=1)

RUNNERS = [
    ("one model", {"draw": stage()}, "auto", "inline", "'draw' is the only stage with a model or a GPU"),
    ("one model and functions", {"draw": stage(), "frame": cheap("draw.text")}, "auto", "inline", "'draw' is the only"),
    ("no model", {"frame": cheap()}, "auto", "inline", "no stage holds a model or a GPU"),
    ("two models", {"a": stage(), "b": stage("a.text")}, "auto", "ray", "2 stages have a model or a GPU: 'a', 'b'"),
    ("actor", {"draw": stage(isolation="actor")}, "auto", "ray", "isolation: actor on 'draw'"),
    ("actor function", {"d": stage(), "f": cheap("d.text", isolation="actor")}, "auto", "ray", "actor on 'f'"),
    ("all inline", {"a": stage(isolation="inline"), "b": stage(isolation="inline")}, "auto", "inline", "every stage"),
    ("some inline", {"a": stage(isolation="inline"), "b": stage()}, "auto", "ray", "2 stages"),
    ("asked for ray", {"draw": stage()}, "ray", "ray", "was asked for"),
    ("asked for inline", {"a": stage(), "b": stage()}, "inline", "inline", "was asked for"),
]


@pytest.mark.parametrize(("stages", "asked", "runner", "reason"), [r[1:] for r in RUNNERS], ids=[r[0] for r in RUNNERS])
def test_runner(stages: dict[str, DoubleSpec], asked: str, runner: str, reason: str) -> None:
    found = plan(stages, runner=asked)
    assert found.runner == runner
    assert reason in found.reason
    if runner == "inline":
        assert [process.name for process in found.processes] == [DRIVER]


def test_function_with_a_gpu_of_its_own_counts_as_heavy() -> None:
    found = plan({"draw": stage(), "upscale": cheap("draw.text", resources=GPU)}, "h100x8")
    assert found.runner == "ray"
    assert found.stage("upscale").process == "upscale"
    assert "has a GPU" in found.stage("upscale").reason


def test_inline_runner_refuses_an_actor() -> None:
    with pytest.raises(PlanError, match="stage 'draw': isolation: actor needs a process of its own"):
        plan({"draw": stage(isolation="actor")}, runner="inline")


HOMES = [
    ("with its producer", {"f": cheap("a.text")}, "a"),
    ("in a chain", {"e": cheap("b.text"), "f": cheap("e.text")}, "b"),
    ("with the larger payload", {"f": cheap("a.text", "paint.image")}, "paint"),
    ("first of equals", {"f": cheap("b.text", "a.text")}, "a"),
    ("with its first reader", {"f": cheap(), "c": stage("a.text", "f.text")}, "c"),
    ("alone", {"f": cheap()}, DRIVER),
    ("inline", {"f": cheap("a.text", isolation="inline")}, DRIVER),
    ("actor", {"f": cheap("a.text", isolation="actor")}, "f"),
    ("after an inline model", {"m": stage(isolation="inline"), "f": cheap("m.text")}, DRIVER),
]


@pytest.mark.parametrize(("stages", "process"), [row[1:] for row in HOMES], ids=[row[0] for row in HOMES])
def test_cheap_stage_rides(stages: dict[str, DoubleSpec], process: str) -> None:
    found = plan({"a": stage(), "b": stage("a.text"), "paint": stage("b.text", gives="image"), **stages})
    assert found.stage("f").process == process
    assert found.process(process).kind == ("driver" if process == DRIVER else "actor")
    assert found.stage("f").reason


def test_sources_of_a_shared_reader_go_where_it_goes() -> None:
    """A cheap chain without a producer: each link rides with the next, up to the model that reads the last."""
    found = plan({"x": cheap(), "y": cheap("x.text"), "a": stage("y.text"), "b": stage("a.text")})
    assert [found.stage(name).process for name in ("x", "y", "a")] == ["a", "a", "a"]


def test_stage_called_driver_gets_another_process() -> None:
    found = plan({"driver": stage(), "b": stage("driver.text")})
    assert found.stage("driver").process != DRIVER
    assert found.process(DRIVER).stages == ()


def test_contradictions_are_refused() -> None:
    with pytest.raises(PlanError, match=r"stage 'draw': resources\.gpus: 1, but cpu4 has no GPU"):
        plan({"draw": stage(resources=GPU)})
