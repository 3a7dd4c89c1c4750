"""Presets, inventory files, this machine, and what Ray tells of a cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni import hardware
from omni.errors import GraphError, UsageError
from omni.hardware import (
    DISK,
    PAGE_CACHE,
    PCIE3,
    PCIE4,
    PCIE5,
    Gpu,
    Hardware,
    Node,
    detect,
    from_ray_nodes,
    load_hardware,
    preset,
)
from omni.memory import Links
from omni.sizes import GIB

MIB = 1024**2


@pytest.mark.parametrize(
    ("text", "num_nodes", "cpus", "gpus"),
    [
        ("h200x8", 1, 192, ["h200"] * 8),
        ("h100x8", 1, 192, ["h100"] * 8),
        ("h100x1", 1, 24, ["h100"]),
        ("a100x8", 1, 128, ["a100"] * 8),
        ("l40sx4", 1, 64, ["l40s"] * 4),
        ("4090x1", 1, 16, ["4090"]),
        ("h200x8x2", 2, 192, ["h200"] * 8),
        ("cpu2", 1, 2, []),
        ("cpu8x3", 3, 8, []),
    ],
)
def test_presets(text: str, num_nodes: int, cpus: float, gpus: list[str]) -> None:
    found = preset(text)
    assert found.name == text
    assert len(found.nodes) == len({node.name for node in found.nodes}) == num_nodes
    assert {node.cpus for node in found.nodes} == {cpus}
    assert [gpu.name for gpu in found.nodes[0].gpus] == gpus
    assert found.nodes[0].memory_bytes > sum(gpu.memory_bytes for gpu in found.nodes[0].gpus)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("h20x8", ", did you mean 'h200'?"), ("h200", ", did you mean 'h200'?"), ("h200x0", ""), ("cpu0", ""), ("", "")],
)
def test_unknown_preset(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        preset(text)
    assert str(caught.value).startswith(f"hardware '{text}': no such preset and no such file{hint}")
    assert "the GPU types are b200, h200" in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_preset_or_one_error(text: str) -> None:
    try:
        assert preset(text).name == text
    except UsageError as error:
        message = str(error)
        assert text in message


# Inventory files ------------------------------------------------------------------------------------------------

INVENTORY = """\
name: studio
nodes:
  - {name: big, cpus: 64, memory: 512GiB, gpus: {type: h100, count: 2}}
  - cpus: 16
    memory: 64GiB
    gpus: {type: my-gpu, memory: 48GiB}
    count: 2
    name: small
"""


def test_inventory(tmp_path: Path) -> None:
    file = tmp_path / "studio.yaml"
    file.write_text(INVENTORY)
    found = load_hardware(str(file))
    mine = (Gpu("my-gpu", 48 * GIB),)
    assert found == Hardware(
        "studio",
        (
            Node("big", 64, 512 * GIB, (Gpu("h100", 81559 * MIB, PCIE5),) * 2),
            Node("small-0", 16, 64 * GIB, mine),
            Node("small-1", 16, 64 * GIB, mine),
        ),
    )


def test_rates_of_an_inventory(tmp_path: Path) -> None:
    file = tmp_path / "farm.yaml"
    file.write_text(
        "nodes: [{cpus: 32, memory: 1GiB, disk: 6GB, page_cache: 20GB, gpus: {type: h100, h2d: 40GB}}, "
        "{cpus: 4, memory: 1GiB, gpus: {type: my-gpu, memory: 8GiB}}]"
    )
    first, second = load_hardware(str(file)).nodes
    assert first.links(0) == Links(
        h2d_bytes_per_second=40e9, page_cache_bytes_per_second=20e9, disk_bytes_per_second=6e9
    )
    assert second.links(0) == Links(
        h2d_bytes_per_second=PCIE4, page_cache_bytes_per_second=16e9, disk_bytes_per_second=DISK
    )


@pytest.mark.parametrize(("gpu", "rate"), [("h200", PCIE5), ("4090", PCIE4), ("t4", PCIE3)])
def test_rates_of_a_preset(gpu: str, rate: float) -> None:
    (node,) = preset(f"{gpu}x2").nodes
    assert node.links(1).h2d_bytes_per_second == rate
    assert node.links().page_cache_bytes_per_second <= PAGE_CACHE


def test_inventory_without_names(tmp_path: Path) -> None:
    file = tmp_path / "farm.yml"
    file.write_text("nodes: [{cpus: 1, memory: 1GiB}, {cpus: 2, memory: 1GiB}]")
    found = load_hardware(str(file))
    assert (found.name, [node.name for node in found.nodes]) == ("farm", ["node0", "node1"])


BROKEN = [
    ("nodes: []", "1:1: nodes: `nodes` must be a list of at least one node"),
    ("name: x", "1:1: `nodes` must be a list of at least one node"),
    ("- 1", "1:1: an inventory is a mapping with `nodes` (and `name`)"),
    ("", "1:1: an inventory is a mapping with `nodes` (and `name`)"),
    ("nods: []\nnodes: [{cpus: 1, memory: 1}]", "1:1: nods: unknown key, allowed are name, nodes, did you mean"),
    ("nodes:\n  - {cpu: 1, memory: 1GiB}", "2:6: nodes[0].cpu: unknown key, allowed are cpus, memory, name, gpus, "
     "count, disk, page_cache, did you mean 'cpus'?"),
    ("nodes:\n  - {cpus: 1, memory: 1GiB, disk: 0}", "2:29: nodes[0].disk: 0: bytes a second, such as 25GB, must be"),
    ("nodes:\n  - {cpus: 1}", "2:5: nodes[0]: Object missing required field `memory`"),
    ("nodes:\n  - cpus: many\n    memory: 1GiB", "2:5: nodes[0].cpus: Expected `float`, got `str`"),
    ("nodes:\n  - cpus: 1\n    memory: lots", "3:5: nodes[0].memory: 'lots' is not a size; write a number and a unit"),
    ("nodes:\n  - {cpus: 1, memory: 1GiB, gpus: {type: h10}}", "2:36: nodes[0].gpus.type: unknown GPU type 'h10', did "
     "you mean 'h100'?; for another type give `memory`"),
    ("nodes:\n  - {cpus: 1, memory: 1GiB, gpus: {type: h100, cont: 2}}", "2:48: nodes[0].gpus.cont: unknown key, "
     "allowed are type, count, memory, h2d, did you mean 'count'?"),
    ("nodes:\n  - {cpus: 1, memory: 1, gpus: [h100]}", "2:26: nodes[0].gpus: must be a mapping of type, count, memory"),
    ("nodes:\n  - 1", "2:5: nodes[0]: must be a mapping of cpus, memory, name, gpus, count"),
    ("nodes: [{cpus: 1, memory: 1, name: a}, {cpus: 1, memory: 1, name: a}]", "1:1: nodes: two nodes are called 'a'"),
    ("nodes: [", "1:9: not YAML: "),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_inventory(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "farm.yaml"
    file.write_text(text)
    with pytest.raises(GraphError) as caught:
        load_hardware(str(file))
    assert str(caught.value).startswith(f"{file}:{message}")


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    file = tmp_path / "farm.yaml"
    file.write_text("nodes:\n  - {cpu: 1, memory: 1GiB}\n  - {cpus: 1, memory: x}\n")
    with pytest.raises(GraphError) as caught:
        load_hardware(str(file))
    assert len(caught.value.mistakes) == 2


def test_inventory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"farm\.yaml: cannot be read: No such file"):
        load_hardware(str(tmp_path / "farm.yaml"))


# This machine, and Ray's ----------------------------------------------------------------------------------------

SMI = """\
0, GPU-aaa1, NVIDIA H200, 143771
1, GPU-bbb2, NVIDIA H200, 143771
2, GPU-ccc3, NVIDIA GB10, [N/A]
"""


def test_detect_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **options: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    (node,) = detect().nodes
    assert node.cpus > 0
    assert node.memory_bytes > 0
    assert node.gpus == ()
    assert load_hardware() == detect()


@pytest.mark.parametrize(
    ("visible", "gpus", "missing"),
    [
        (None, [143771, 143771, 0], ""),
        ("1", [143771], ""),
        ("2, 0", [0, 143771], ""),
        ("GPU-bbb", [143771], ""),
        ("", [], ""),
        ("-1", [], ""),
        ("0,9,1", [143771], "9"),
        ("MIG-aaa", [], "MIG-aaa"),
    ],
)
def test_detect_gpus(monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: list[int], missing: str) -> None:
    def smi(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["timeout"] > 0
        return subprocess.CompletedProcess(command, 0, SMI, "")

    monkeypatch.setattr(subprocess, "run", smi)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    found = detect()
    assert [gpu.memory_bytes for gpu in found.nodes[0].gpus] == [size * MIB for size in gpus]
    assert [note.split(",")[0] for note in found.notes] == (
        [f"CUDA_VISIBLE_DEVICES names '{missing}'"] if missing else []
    )
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_detect_survives_a_driver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **options: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert detect().nodes[0].gpus == ()


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_control_group_limits_the_cores(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: float) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(
        hardware, "_read_words", lambda file: files.get(file.removeprefix("/sys/fs/cgroup/"), "").split()
    )
    assert hardware.count_cpus() == cpus


@pytest.mark.parametrize(("limit", "is_limited"), [("1048576", True), ("max", False), ("9223372036854771712", False)])
def test_control_group_limits_the_memory(monkeypatch: pytest.MonkeyPatch, limit: str, is_limited: bool) -> None:
    free = hardware.count_memory_bytes()
    monkeypatch.setattr(hardware, "_read_words", lambda file: [limit])
    assert (hardware.count_memory_bytes() == 1048576) == is_limited
    assert hardware.count_memory_bytes() <= max(free, hardware.count_memory_bytes())


def ray_node(node_id: str, **resources: float) -> dict[str, Any]:
    return {"NodeID": node_id, "NodeName": f"host-{node_id}", "Alive": True, "Resources": resources}


def test_ray_nodes() -> None:
    worker = ray_node("a", CPU=16, GPU=2, memory=64 * GIB, **{"accelerator_type:H100": 1})
    head = ray_node("b", CPU=4, memory=8 * GIB, **{"node:__internal_head__": 1})
    dead = {**ray_node("c", CPU=99), "Alive": False}
    assert from_ray_nodes([dead, worker, head]) == Hardware(
        "ray cluster",
        (
            Node("host-b", 4, 8 * GIB),
            Node("host-a", 16, 64 * GIB, (Gpu("H100", 81559 * MIB, PCIE5),) * 2),
        ),
    )


@pytest.mark.parametrize(
    ("label", "size"),
    [
        ("H200", 143771 * MIB),
        ("A100-40G", 40 * GIB),
        ("A100", 81920 * MIB),
        ("NVIDIA-L40S", 46068 * MIB),
        ("MI300X", 0),
    ],
)
def test_memory_of_rays_gpu_types(label: str, size: int) -> None:
    (node,) = from_ray_nodes([ray_node("a", CPU=1, GPU=1, **{f"accelerator_type:{label}": 1})]).nodes
    assert [(gpu.name, gpu.memory_bytes) for gpu in node.gpus] == [(label, size)]


def test_ray_node_of_no_known_gpu_type() -> None:
    (node,) = from_ray_nodes([ray_node("a", CPU=1, GPU=1)]).nodes
    assert node.gpus == (Gpu("gpu", 0),)
