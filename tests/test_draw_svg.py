"""The SVG: well-formed, self-contained, every stage once, every hop with its ports and transport."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.draw_svg import draw_svg
from omni.graph import resolve
from omni.hardware import preset
from omni.plan import Plan, plan_graph
from omni.spec import GraphSpec
from omni.testing import DoubleSpec, doubles

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True, scope="module")
def kinds() -> Iterator[None]:
    with doubles():
        yield


def plan(stages: dict[str, str], name: str = "graph") -> Plan:
    """Stage -> the stages it reads; names in capitals have a model."""
    specs = {}
    for stage, reads in stages.items():
        sources = reads.split()
        ports = {f"in{index}": "any" for index in range(len(sources))}
        inputs = {f"in{index}": f"{source}.text" for index, source in enumerate(sources)}
        specs[stage] = DoubleSpec(model=stage.isupper(), ports=ports, inputs=inputs)
    return plan_graph(resolve(GraphSpec(name=name, stages=specs)), preset("cpu4"), {})


def test_stages_and_hops() -> None:
    root = ElementTree.fromstring(draw_svg(plan({"A": "", "B": "A", "frame": "B A"})))
    assert [group.get("data-stage") for group in root.iter(f"{SVG}g")] == ["A", "B", "frame"]
    labels = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "label"]
    assert labels == ["text", "object store", "text", "object store", "text", "local"]
    dashed = [path.get("class") for path in root.iter(f"{SVG}path") if "edge" in (path.get("class") or "")]
    assert sorted(dashed, key=str) == ["edge", "edge hop", "edge hop"]


def test_stages_of_one_process_have_one_colour() -> None:
    root = ElementTree.fromstring(draw_svg(plan({"A": "", "B": "A", "frame": "B"})))
    colours = {group.get("data-stage"): group.find(f"{SVG}rect").get("fill") for group in root.iter(f"{SVG}g")}  # type: ignore[union-attr]
    assert colours["B"] == colours["frame"] != colours["A"]


def test_nothing_is_fetched() -> None:
    text = draw_svg(plan({"A": ""}))
    assert "href" not in text
    assert "@import" not in text
    assert text.count("http") == 1  # the namespace
    assert "prefers-color-scheme: dark" in text


def test_names_are_escaped() -> None:
    """Text from the graph file and from plug-ins stays text."""
    found = plan({"A": ""}, name='<script>&"\x00\x1b')
    evil = "a<b>&\"'\x07"
    stages = (msgspec.structs.replace(found.stages[0], reason=evil),)
    root = ElementTree.fromstring(draw_svg(msgspec.structs.replace(found, stages=stages)))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles == ['<script>&"??', "a<b>&\"'?"]


def test_everything_is_inside_the_picture() -> None:
    root = ElementTree.fromstring(draw_svg(plan({"A": "", "B": "A", "C": "A", "D": "B C A"})))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for rect in list(root.iter(f"{SVG}rect"))[1:]:
        assert float(rect.get("x", -1)) + float(rect.get("width", 0)) <= width
        assert float(rect.get("y", -1)) + float(rect.get("height", 0)) <= height


@settings(max_examples=50)
@given(st.data())
def test_every_graph_gives_well_formed_xml(data: st.DataObject) -> None:
    names = ["A", "b", "C", "d", "E", "f"][: data.draw(st.integers(1, 6))]
    stages = {
        name: " ".join(data.draw(st.lists(st.sampled_from(names[:index]), unique=True)) if index else [])
        for index, name in enumerate(names)
    }
    root = ElementTree.fromstring(draw_svg(plan(stages)))
    assert sorted(str(group.get("data-stage")) for group in root.iter(f"{SVG}g")) == sorted(names)
    paths = [path for path in root.iter(f"{SVG}path") if "edge" in (path.get("class") or "")]
    assert len(paths) == sum(len(reads.split()) for reads in stages.values())
