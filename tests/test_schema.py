"""The JSON Schema agrees with the loader, and the reference of keys with the spec types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from omni import registry
from omni.load import load_graph
from omni.schema import field_docs, graph_schema, key_tables
from omni.spec import DiffusionSpec, GraphSpec

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/**/*.yaml"))
EXAMPLES = [path for path in SHIPPED if "examples" in path]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return graph_schema()


def faults_of(schema: dict[str, Any], document: Any) -> list[str]:
    return [fault.json_path for fault in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def test_the_schema_is_a_schema(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema


def test_the_shipped_graphs_are_there() -> None:
    assert {"configs/demo.yaml", "configs/draw.yaml"} <= set(SHIPPED)
    assert len(EXAMPLES) >= 14


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_graphs_fit_the_schema(schema: dict[str, Any], path: str) -> None:
    assert faults_of(schema, yaml.safe_load((ROOT / path).read_text())) == []


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_graphs_load(path: str) -> None:
    loaded = load_graph(ROOT / path)
    assert loaded.graph.outputs
    assert loaded.spec.name == Path(path).stem


@pytest.mark.parametrize("path", SHIPPED)
def test_merged_documents_fit_the_schema_and_load_again(schema: dict[str, Any], path: str) -> None:
    loaded = load_graph(ROOT / path)
    assert faults_of(schema, loaded.document) == []
    assert load_graph(loaded.document, base_dir=loaded.base_dir).graph == loaded.graph


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_name_pipelines_that_diffusers_has(path: str) -> None:
    stages = [stage for stage in load_graph(ROOT / path).spec.stages.values() if isinstance(stage, DiffusionSpec)]
    assert stages
    assert all(stage.pipeline and stage.call for stage in stages)


DRAW = {"kind": "diffusion", "model": "m"}


@pytest.mark.parametrize(
    "document",
    [
        {"stages": {"draw": DRAW}},
        {"stages": {"draw": DRAW}, "inputs": {"prompt": "text", "style": {"type": "text", "default": "oil"}}},
        {"stages": {"draw": {**DRAW, "inputs": {"prompt": "a.text", "image": ["b.image", "image"]}}}},
        {"stages": {"say": {"kind": "llm", "model": "m", "sampling": {"max_new_tokens": 8}}}},
        {"base": "other.yaml"},
        {"base": "other.yaml", "stages": {"draw": {"call": {"num_inference_steps": 4}}}},
        {"base": "other.yaml", "stages": {"draw": None, "say": {"sampling": {"stop": None}, "system": None}}},
        {"base": "other.yaml", "stages": {"frame": {"kind": "function", "call": "a:b"}}, "inputs": None},
    ],
)
def test_right_documents_fit(schema: dict[str, Any], document: Any) -> None:
    assert faults_of(schema, document) == []


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ([], "$"),
        ({}, "$"),
        ({"stages": {"draw": DRAW}, "stage": {}}, "$"),
        ({"stages": {"draw": {"model": "m"}}}, "$.stages.draw"),
        ({"stages": {"draw": {**DRAW, "kind": "diffusio"}}}, "$.stages.draw.kind"),
        ({"stages": {"draw": {**DRAW, "ofload": {}}}}, "$.stages.draw"),
        ({"stages": {"draw": {**DRAW, "fps": 0}}}, "$.stages.draw.fps"),
        ({"stages": {"draw": {**DRAW, "call": "a:b"}}}, "$.stages.draw.call"),
        ({"stages": {"frame": {"kind": "function", "call": "a.b"}}}, "$.stages.frame.call"),
        ({"stages": {"my-draw": DRAW}}, "$.stages"),
        ({"stages": {"draw": DRAW}, "inputs": {"prompt": "txt"}}, "$.inputs.prompt"),
        ({"stages": {"draw": DRAW}, "outputs": {"image": ["draw"]}}, "$.outputs.image"),
        ({"base": 1}, "$.base"),
        ({"base": "other.yaml", "stages": {"draw": {"ofload": {}}}}, "$.stages.draw"),
        ({"base": "other.yaml", "stages": {"draw": {"resources": {"gpu": 1}}}}, "$.stages.draw"),
    ],
)
def test_wrong_documents_do_not_fit(schema: dict[str, Any], document: Any, place: str) -> None:
    assert place in faults_of(schema, document)


def test_keys_have_descriptions(schema: dict[str, Any]) -> None:
    assert "A folder" in schema["$defs"]["DiffusionSpec"]["properties"]["model"]["description"]
    assert field_docs(DiffusionSpec)["isolation"].startswith("`inline` keeps")
    assert field_docs(GraphSpec)["outputs"].startswith("Output name")


def test_the_reference_is_the_generated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda **selection: ())
    text = (ROOT / "docs" / "graph-files.md").read_text()
    written = text.partition("<!-- keys: omni schema --markdown -->\n")[2].partition("<!-- end of keys -->")[0]
    assert written.strip() == key_tables().strip(), "paste the output of `omni schema --markdown` between the marks"


def test_the_examples_of_the_docs_are_right(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "graph-files.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    assert len(blocks) >= 3
    for block in blocks:
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block)
    for block in blocks:
        assert load_graph(tmp_path / block.splitlines()[0].removeprefix("# ")).graph.outputs
