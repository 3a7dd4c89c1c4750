"""Names, edges, port types, cycles and outputs of graphs, without files and without models."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni import registry
from omni.errors import GraphError, UsageError
from omni.graph import USUAL_INPUTS, Edge, FromRequest, FromStage, Gather, Graph, check_graph, nearest, resolve
from omni.port_types import ALL_TYPES, base_type, default_fits, fit, list_of
from omni.registry import Port, Ports, StageKind
from omni.spec import GraphSpec, InputSpec, Source, StageSpec


class AnySpec(StageSpec, frozen=True, kw_only=True, tag="any"):
    """A stage whose ports the test chooses: `name`, `name!` is required, `name*` takes many, `name/` each."""

    takes: dict[str, str] = msgspec.field(default_factory=dict)
    gives: dict[str, str] = msgspec.field(default_factory=dict)
    is_open: bool = False


def read_ports(spec: AnySpec, base_dir: str) -> Ports:
    inputs = {
        name.rstrip("!*/"): Port(kind, required="!" in name, many="*" in name, each="/" in name)
        for name, kind in spec.takes.items()
    }
    return Ports(inputs, {name: Port(kind) for name, kind in spec.gives.items()}, spec.is_open)


ANY = StageKind("any", AnySpec, "no:stage", ports=read_ports)


@pytest.fixture(autouse=True)
def only_this_kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "BUILT_IN", {"any": f"{__name__}:ANY"})
    monkeypatch.setattr(registry, "import_string", lambda target: ANY)
    monkeypatch.setattr(registry, "entry_points", lambda **selection: ())
    registry.find_kind.cache_clear()
    yield
    registry.find_kind.cache_clear()


def stage(takes: dict[str, str] | None = None, gives: dict[str, str] | None = None, **more: Any) -> AnySpec:
    return AnySpec(takes=takes or {}, gives={"text": "text"} if gives is None else gives, **more)


def graph_of(
    inputs: dict[str, InputSpec] | None = None, outputs: dict[str, str] | None = None, **stages: AnySpec
) -> Graph:
    return resolve(GraphSpec(inputs=inputs or {}, outputs=outputs or {}, stages=dict(stages)), "here")


def faults_of(*args: Any, **stages: Any) -> list[str]:
    with pytest.raises(GraphError) as error:
        graph_of(*args, **stages)
    return [str(mistake) for mistake in error.value.mistakes]


TEXT, IMAGE = {"text": "text"}, {"image": "image"}


# Bindings ---------------------------------------------------------------------------------------------------------


def test_a_chain() -> None:
    graph = graph_of(
        draw=stage({"prompt!": "text"}, IMAGE, inputs={"prompt": "rewrite.text"}),
        rewrite=stage({"prompt!": "text", "style": "text"}),
    )
    assert graph.order == ("rewrite", "draw")
    assert graph.bindings == {
        "draw": {"prompt": FromStage("rewrite", "text")},
        "rewrite": {"prompt": FromRequest("prompt")},
    }
    assert graph.edges() == (Edge(FromStage("rewrite", "text"), "draw", "prompt"),)
    assert (graph.upstream("draw"), graph.readers("rewrite")) == (("rewrite",), ("draw",))
    assert graph.outputs == {"image": FromStage("draw", "image")}
    assert graph.output_stages() == ("draw",)
    assert graph.base_dir == "here"


def test_unnamed_ports_take_declared_fields_then_usual_ones() -> None:
    declared = {"prompt": InputSpec(type="text", default="a"), "unread": InputSpec()}
    graph = graph_of(declared, draw=stage({"prompt": "text", "height": "json", "other": "text"}))
    assert graph.bindings["draw"] == {"prompt": FromRequest("prompt"), "height": FromRequest("height")}
    assert graph.inputs == {**declared, "height": USUAL_INPUTS["height"]}


def test_usual_fields_of_another_type_are_left_alone() -> None:
    assert graph_of(draw=stage({"image": "audio"})).bindings == {"draw": {}}
    (fault,) = faults_of(draw=stage({"image!": "audio"}))
    assert fault.startswith("stages.draw.inputs.image: no source for this audio; declare 'image' under")


def test_usual_fields_can_be_sources() -> None:
    graph = graph_of(draw=stage({"first": "image"}, inputs={"first": "image"}))
    assert graph.bindings["draw"] == {"first": FromRequest("image")}
    assert list(graph.inputs) == ["image"]


def test_open_stages_take_any_port() -> None:
    graph = graph_of(
        write=stage(),
        draw=stage({"prompt": "text"}, is_open=True, inputs={"anything": "write.text"}),
    )
    assert graph.bindings["draw"] == {"anything": FromStage("write", "text"), "prompt": FromRequest("prompt")}


def test_stages_of_unknown_ports_take_the_usual_fields() -> None:
    graph = graph_of({"style": InputSpec()}, draw=stage(is_open=True))
    assert graph.bindings["draw"] == {name: FromRequest(name) for name in USUAL_INPUTS}


def test_a_stage_may_have_the_name_of_a_usual_field() -> None:
    (fault,) = faults_of(image=stage({}, IMAGE), show=stage({"image": "image"}, inputs={"image": "image"}))
    assert fault == "stages.show.inputs.image: 'image' is a stage; name its output port, as in 'image.image'"


# Types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "takes", "how"),
    [
        ("image", {"x": "image"}, "same"),
        ("image", {"x": "any"}, "same"),
        ("list[image]", {"x": "any"}, "same"),
        ("any", {"x": "list[image]"}, "same"),
        ("list[any]", {"x": "list[image]"}, "same"),
        ("list[image]", {"x": "list[any]"}, "same"),
        ("list[image]", {"x*": "image"}, "same"),
        ("image", {"x*": "image"}, "same"),
        ("image", {"x": "list[image]"}, "wrap"),
        ("list[image]", {"x/": "image"}, "lift"),
        ("image", {"x/": "image"}, "same"),
        ("list[image]", {"x": "image"}, None),
        ("text", {"x": "image"}, None),
        ("text", {"x": "list[image]"}, None),
        ("list[text]", {"x*": "image"}, None),
        ("text", {"x": "json"}, None),
    ],
)
def test_types_of_edges(given: str, takes: dict[str, str], how: str | None) -> None:
    stages = {"a": stage(gives={"out": given}), "b": stage(takes, inputs={"x": "a.out"})}
    source = FromStage("a", "out")
    if how is None:
        (fault,) = faults_of(**stages)
        assert fault.startswith(f"stages.b.inputs.x: 'a.out' is {given}, but this port takes ")
        return
    graph = graph_of(**stages)
    assert graph.bindings["b"]["x"] == (Gather((source,)) if how == "wrap" else source)
    assert graph.ports["b"].outputs["text"].type == ("list[text]" if how == "lift" else "text")


def test_lists_are_lifted_through_a_chain() -> None:
    graph = graph_of(
        draw=stage(gives={"images": "list[image]"}),
        frame=stage({"image/": "image"}, IMAGE, inputs={"image": "draw.images"}),
        upscale=stage({"image/": "image"}, IMAGE, inputs={"image": "frame.image"}),
        sheet=stage({"images": "list[image]"}, IMAGE, inputs={"images": "upscale.image"}),
    )
    assert [graph.ports[name].outputs["image"].type for name in ("frame", "upscale", "sheet")] == [
        "list[image]",
        "list[image]",
        "image",
    ]


@pytest.mark.parametrize(
    ("sources", "joined"),
    [
        (["one.image", "two.image"], ()),
        (["many.images", "many.images"], (True, True)),
        (["one.image", "many.images", "image"], (False, True, False)),
        (["one.image", "whatever.x"], ()),
    ],
)
def test_fan_in(sources: list[str], joined: tuple[bool, ...]) -> None:
    stages = {
        "one": stage(gives=IMAGE),
        "two": stage(gives=IMAGE),
        "many": stage(gives={"images": "list[image]"}),
        "whatever": stage(gives={"x": "any"}),
    }
    graph = graph_of(**stages, sheet=stage({"images!": "list[image]"}, inputs={"images": sources}))
    binding = graph.bindings["sheet"]["images"]
    assert isinstance(binding, Gather)
    assert binding.joined == joined
    assert len(binding.sources) == len(sources)


def test_fan_in_is_checked() -> None:
    stages = {"say": stage(), "draw": stage(gives=IMAGE)}
    assert faults_of(**stages, sheet=stage({"x": "list[image]"}, inputs={"x": ["say.text", "draw.image"]})) == [
        "stages.sheet.inputs.x: the items of a list must be of one type, but 'say.text' is text, 'draw.image' is image"
    ]
    assert faults_of(**stages, sheet=stage({"x": "list[image]"}, inputs={"x": ["say.text"]})) == [
        "stages.sheet.inputs.x: the list is list[text], but this port takes list[image]"
    ]
    assert faults_of(**stages, sheet=stage({"x": "image"}, inputs={"x": ["draw.image"]})) == [
        "stages.sheet.inputs.x: the list is list[image], but this port takes image"
    ]


@pytest.mark.parametrize(
    ("kind", "default", "fits"),
    [
        ("text", "a", True),
        ("text", 1, False),
        ("text", None, False),
        ("json", {"a": [1]}, True),
        ("json", None, True),
        ("list[text]", ["a"], True),
        ("list[text]", "a", False),
        ("list[text]", ["a", 1], False),
        ("image", "a.png", False),
    ],
)
def test_defaults_fit_their_types(kind: str, default: Any, fits: bool) -> None:
    inputs = {"field": InputSpec(type=kind, default=default)}
    if fits:
        assert graph_of(inputs, a=stage()).inputs == inputs
    else:
        assert faults_of(inputs, a=stage())[0].startswith("inputs.field.default: ")


@given(st.sampled_from(ALL_TYPES), st.sampled_from(ALL_TYPES))
def test_fitting_follows_its_rules(given_type: str, port_type: str) -> None:
    how = fit(given_type, Port(port_type))
    assert fit(given_type, Port(given_type)) == "same"
    assert list_of(base_type(list_of(given_type))) == list_of(given_type)
    if how == "wrap":
        assert fit(list_of(given_type), Port(port_type)) == "same"
    if how is None:
        assert "any" not in (given_type, port_type)
    if base_type(given_type) not in ("text", "json", "any"):
        assert not default_fits("a", given_type)


# Cycles and order -------------------------------------------------------------------------------------------------


def wired(edges: set[tuple[int, int]], num_stages: int) -> dict[str, AnySpec]:
    return {
        f"s{target}": stage(
            {f"p{source}": "text" for source, end in edges if end == target},
            inputs={f"p{source}": f"s{source}.text" for source, end in edges if end == target},
        )
        for target in range(num_stages)
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=14))
def test_cycles_are_printed_and_orders_are_topological(edges: set[tuple[int, int]]) -> None:
    stages = wired(edges, 6)
    upstream = {f"s{i}": {f"s{source}" for source, target in edges if target == i} for i in range(6)}
    try:
        TopologicalSorter(upstream).prepare()
    except CycleError:
        for fault in faults_of(**stages):
            cycle = fault.partition("the stages form a cycle: ")[2].split(" -> ")
            assert cycle[0] == cycle[-1] == min(cycle)
            assert all(source in upstream[target] for source, target in pairwise(cycle))
        return
    graph = graph_of(**stages)
    place = {name: number for number, name in enumerate(graph.order)}
    assert sorted(place) == sorted(stages)
    assert all(place[f"s{source}"] < place[f"s{target}"] for source, target in edges)
    assert {str(edge) for edge in graph.edges()} == {f"s{s}.text -> s{t}.p{s}" for s, t in edges}
    assert set(graph.output_stages()) == set(stages) - {f"s{source}" for source, _ in edges}


def test_the_cycle_is_told_at_its_first_stage() -> None:
    edges = {(1, 2), (2, 3), (3, 1), (0, 1)}
    assert faults_of(**wired(edges, 4)) == ["stages.s1.inputs.p3: the stages form a cycle: s1 -> s2 -> s3 -> s1"]


def test_all_is_checked_in_spite_of_a_cycle() -> None:
    faults = faults_of(
        a=stage({"x": "text"}, inputs={"x": "b.text"}),
        b=stage({"x": "image"}, inputs={"x": "a.text"}),
        c=stage({"x": "image"}, inputs={"x": "a.text"}),
    )
    assert [fault.partition(":")[0] for fault in faults] == [f"stages.{name}.inputs.x" for name in "abc"]


# Outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_have_the_name_of_their_type_when_it_is_unique() -> None:
    graph = graph_of(draw=stage(gives={"images": "list[image]", "mask": "image"}), say=stage())
    assert graph.outputs == {"image": FromStage("draw", "images"), "text": FromStage("say", "text")}


def test_outputs_of_one_type_have_the_names_of_their_stages() -> None:
    graph = graph_of(left=stage(gives=IMAGE), right=stage(gives=IMAGE), say=stage())
    assert list(graph.outputs) == ["left", "right", "text"]


def test_no_two_outputs_get_one_name() -> None:
    graph = graph_of(image=stage(), say=stage(), draw=stage(gives=IMAGE))
    assert graph.outputs == {
        "image": FromStage("image", "text"),
        "say": FromStage("say", "text"),
        "draw": FromStage("draw", "image"),
    }


def test_named_outputs() -> None:
    draw = stage(gives={"images": "list[image]", "mask": "image"})
    graph = graph_of(None, {"picture": "draw", "where": "draw.mask"}, draw=draw, unread=stage())
    assert graph.outputs == {"picture": FromStage("draw", "images"), "where": FromStage("draw", "mask")}


# Kinds ------------------------------------------------------------------------------------------------------------


def test_unknown_kinds_are_mistakes() -> None:
    class OtherSpec(StageSpec, frozen=True, kw_only=True, tag="ani"):
        pass

    spec = GraphSpec(stages={"a": OtherSpec()})
    with pytest.raises(GraphError) as error:
        resolve(spec)
    assert str(error.value) == "stages.a.kind: unknown kind 'ani', did you mean 'any'? (allowed: any)"


def test_broken_plug_ins_are_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: str) -> object:
        raise UsageError("stage kind 'any': cannot be loaded")

    monkeypatch.setattr(registry, "import_string", fail)
    assert faults_of(a=stage()) == ["stages.a.kind: stage kind 'any': cannot be loaded"]


def test_unclear_stages_are_checked_as_far_as_possible() -> None:
    inputs: dict[str, Source] = {"x": "draw.image", "y": "drew.image"}
    spec = GraphSpec(
        stages={"bad": StageSpec(inputs=inputs), "draw": stage({"x!": "text"}, IMAGE, inputs={"x": "bad.what"})}
    )
    graph, mistakes = check_graph(spec, unclear=frozenset({"bad"}))
    assert graph is None
    assert [str(mistake) for mistake in mistakes] == [
        "stages.bad.inputs.y: unknown stage 'drew', did you mean 'draw'? (stages: bad, draw)",
        "stages.bad.inputs.x: the stages form a cycle: bad -> draw -> bad",
    ]


def test_nearest() -> None:
    assert nearest("promt", ["prompt", "image"]) == ", did you mean 'prompt'?"
    assert nearest("zzz", ["prompt", "image"]) == ""
