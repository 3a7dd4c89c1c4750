"""`omni plan`: what it prints, for people and machines, and what it must not import."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from omni.cli import plan
from omni.errors import GraphError, PlanError, UsageError
from omni.memory import ComponentMemory, MemoryPlan

GRAPH = """\
name: postcard
stages:
  rewrite: {kind: llm, model: some/llm, template: "Describe: {prompt}"}
  draw: {kind: diffusion, model: some/painter, inputs: {prompt: rewrite.text}}
"""


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "postcard.yaml"
    file.write_text(GRAPH)
    return str(file)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return plan.command(parser.parse_args(list(arguments)))


def test_tables_and_drawing(graph: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(graph, "--hardware", "h200x8") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == ("postcard on h200x8: ray runner, since 2 stages have a model or a GPU: 'rewrite', 'draw'")
    assert "\u2502 rewrite      \u2502\u2500\u2500\u2500\u2500\u25b6\u2502 draw            \u2502" in lines
    assert [line.strip() for line in lines if line.strip() in ("Processes", "Stages", "Edges")] == [
        "Processes",
        "Stages",
        "Edges",
    ]
    assert any(line.split()[:4] == ["rewrite.text", "draw.prompt", "object_store", "same"] for line in lines)
    assert "warning: stage 'draw': its checkpoint is not on this machine, its size is unknown" in text


def test_ascii_where_the_terminal_has_nothing_else(graph: str) -> None:
    code = (
        "import argparse; from omni.cli import plan; p = argparse.ArgumentParser(); plan.add_arguments(p);"
        f"plan.command(p.parse_args([{graph!r}, '--hardware', 'h200x8']))"
    )
    done = in_fresh_process(code, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "| rewrite      |---->| draw            |" in done.stdout
    assert done.stdout.isascii()


def test_neither_torch_nor_ray_is_imported(graph: str) -> None:
    code = (
        "import argparse, sys; from omni.cli import plan; p = argparse.ArgumentParser(); plan.add_arguments(p);"
        f"plan.command(p.parse_args([{graph!r}, '--json', '--svg', {graph + '.svg'!r}]));"
        "print(sorted({'torch', 'ray', 'diffusers', 'transformers', 'fastapi', 'huggingface_hub'} & set(sys.modules)),"
        "file=sys.stderr)"
    )
    done = in_fresh_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        check=False,
    )


def test_json(graph: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(graph, "--hardware", "h100x8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["graph", "runner", "reason", "hardware", "processes", "stages", "edges", "warnings"]
    assert [process["name"] for process in found["processes"]] == ["driver", "rewrite", "draw"]
    assert found["processes"][2] == {
        "name": "draw",
        "kind": "actor",
        "stages": ["draw"],
        "node": "node0",
        "cpus": 1.0,
        "gpus": 1.0,
        "gpu_ids": [1],
        "num_threads": 24,
        "reason": "gets the same part of the 192 cores as of the 8 GPUs",
    }
    assert found["stages"][0]["weight_bytes"] is None
    assert found["stages"][0]["memory"]["components"] == []
    assert found["edges"] == [
        {
            "source": "rewrite",
            "source_port": "text",
            "target": "draw",
            "target_port": "prompt",
            "transport": "object_store",
            "reason": "same node: written once, read by consumers without a copy",
        }
    ]


def test_documented_keys_are_those_printed(graph: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(graph, "--hardware", "h100x8", "--json")
    found = json.loads(capsys.readouterr().out)
    text = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    keys = {*found, *found["processes"][0], *found["stages"][0], *found["edges"][0], *found["hardware"]["nodes"][0]}
    keys |= {
        *found["hardware"]["nodes"][0]["gpus"][0],
        *found["stages"][0]["memory"],
        *ComponentMemory.__struct_fields__,
    }
    keys |= {*found["stages"][0]["memory"]["room"], *found["stages"][0]["memory"]["room"]["links"]}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A graph whose model has 12 GiB in a file of almost nothing but a hole."""
    tensors = {f"layers.{index}.{name}": 2**29 for index in range(12) for name in ("a.weight", "b.weight")}
    header, offset = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    (tmp_path / "llm").mkdir()
    with (tmp_path / "llm" / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"hidden_size": 2048, "vocab_size": 1024}))
    (tmp_path / "large.yaml").write_text("stages: {say: {kind: llm, model: ./llm, sampling: {max_new_tokens: 10}}}\n")
    monkeypatch.setenv("COLUMNS", "80")
    return str(tmp_path / "large.yaml")


def test_memory_in_eighty_columns(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(large, "--hardware", "4090x1", "--set", "stages.say.offload.vram=8GiB") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    start = lines.index("Memory")
    assert [line.split() for line in lines[start + 2 : start + 5] if "\u2500" not in line] == [
        ["component", "weights", "on", "GPU", "copied", "a", "request", "slots", "lives"],
        ["model", "12.0", "GiB", "3.0", "GiB", "10", "x", "9.0", "GiB", "3.0", "GiB", "host,", "streamed"],
    ]
    text = " ".join(" ".join(lines[start + 5 :]).split())
    assert text.startswith(
        "say: offload layerwise; peak 6.1 GiB of GPU memory (66.0 MiB of it for activations) and 15.1 GiB of host "
        "memory; load at least 805.3 ms, from a cold disk 6.4 s; a step at least 386.5 ms. Why: 12.0 GiB of weights"
    )


def test_memory_as_json_and_in_the_drawing(large: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(large, "--hardware", "4090x1", "--json", "--svg", str(tmp_path / "plan.svg"))
    memory = json.loads(capsys.readouterr().out)["stages"][0]["memory"]
    assert list(memory) == list(MemoryPlan.__struct_fields__)
    assert memory["policy"] == "none"
    assert memory["components"] == [
        {
            "name": "model",
            "weight_bytes": 12 * 2**30,
            "device_bytes": 12 * 2**30,
            "streamed_bytes": 0,
            "slot_bytes": 0,
            "place": "device",
            "num_copies": 0,
        }
    ]
    assert memory["room"]["links"]["h2d_bytes_per_second"] == 25e9
    assert "12.1 GiB GPU<" in (tmp_path / "plan.svg").read_text()


def test_set_and_runner(graph: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(graph, "--hardware", "cpu2", "--json", "--runner", "inline", "--set", "name=card")
    found = json.loads(capsys.readouterr().out)
    assert (found["graph"], found["runner"]) == ("card", "inline")


def test_svg(graph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.svg"
    run(graph, "--hardware", "cpu2", "--svg", str(file))
    assert ElementTree.fromstring(file.read_text()).tag.endswith("svg")
    assert f"drawn in {file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["--hardware", "h20x8"],
            UsageError,
            "hardware 'h20x8': no such preset and no such file, did you mean 'h200'?",
        ),
        (
            ["--hardware", "h100x1"],
            PlanError,
            "checkpoint not on this machine, so each needs a whole GPU, and 1 is free",
        ),
        (["--set", "stages.draw.modell=x"], GraphError, "did you mean 'model'?"),
        (["--hardware", "cpu2", "--svg", "/nowhere/plan.svg"], UsageError, "cannot be written: No such file"),
    ],
)
def test_mistakes(graph: str, arguments: list[str], error: type[UsageError], message: str) -> None:
    with pytest.raises(error) as caught:
        run(graph, *arguments)
    assert message in str(caught.value)
