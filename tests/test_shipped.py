"""The graphs that are shipped: all of them can be planned, and the demos give the same on both runners."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from omni import Omni
from omni.checkpoint import gather_facts
from omni.hardware import GPU_TYPES, load_hardware
from omni.load import load_graph
from omni.plan import plan_graph

if TYPE_CHECKING:
    from omni.runner.ray_environment import Cluster

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GRAPHS = [*sorted(CONFIGS.glob("*.yaml")), *sorted(CONFIGS.glob("examples/*.yaml"))]
QUICK = ("stages.draw.call.num_inference_steps=2",)
PROMPT = "a small blue circle on a white background"


@pytest.mark.parametrize("hardware", ["h200x8", "4090x4", "cpu16"])
@pytest.mark.parametrize("path", GRAPHS, ids=[path.stem for path in GRAPHS])
def test_every_graph_can_be_planned(path: Path, hardware: str) -> None:
    graph = load_graph(path).graph
    plan = plan_graph(graph, load_hardware(hardware), {})
    assert sorted(stage.stage for stage in plan.stages) == sorted(graph.spec.stages)
    homes = {stage: process.name for process in plan.processes for stage in process.stages}
    assert {stage.stage: stage.process for stage in plan.stages} == homes


@pytest.mark.parametrize("name", ["draw", "demo", "video"])
def test_the_demos_fit_on_every_gpu(name: str) -> None:
    graph = load_graph(CONFIGS / f"{name}.yaml").graph
    for gpu in GPU_TYPES:
        plan = plan_graph(graph, load_hardware(f"{gpu}x1"), gather_facts(graph))
        assert {stage.memory.policy for stage in plan.stages if stage.memory is not None} == {"none"}


def test_the_demos_run_and_agree_on_both_runners(ray_cluster: Cluster) -> None:
    with Omni(CONFIGS / "draw.yaml", overrides=QUICK, runner="inline") as omni:
        (inline,) = omni.generate(prompt=PROMPT, seed=7).image
    with Omni(CONFIGS / "draw.yaml", overrides=QUICK, runner="ray") as omni:
        assert omni.plan.runner == "ray"
        (on_ray,) = omni.generate(prompt=PROMPT, seed=7).image
    assert inline.size == (128, 128)
    assert inline.getextrema() != ((0, 0),) * 3
    assert on_ray.tobytes() == inline.tobytes()
    with Omni(CONFIGS / "demo.yaml", overrides=QUICK, runner="ray") as omni:
        result = omni.generate(prompt="winter", seed=7)
    assert result.caption.strip()
    assert result.image[0].size == (128, 128)
