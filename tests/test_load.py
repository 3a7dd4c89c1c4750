"""Loading graphs: the exact message of every mistake, objects as graphs, and that nothing but GraphError is raised."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import Meta

from omni import registry
from omni.errors import GraphError, Mistake
from omni.load import LoadedGraph, load_graph
from omni.registry import Port, Ports, StageKind
from omni.spec import Device, GraphSpec, Spec, StageSpec
from omni.tree import dump

# Kinds without models ---------------------------------------------------------------------------------------------


class GroupOffload(Spec, frozen=True, kw_only=True, tag_field="policy", tag="group"):
    blocks: int = 1


class ModelOffload(Spec, frozen=True, kw_only=True, tag_field="policy", tag="model"):
    pass


class WriteSpec(StageSpec, frozen=True, kw_only=True, tag="write"):
    model: str


class PaintSpec(StageSpec, frozen=True, kw_only=True, tag="paint"):
    model: str
    call: dict[str, Any] = msgspec.field(default_factory=dict)
    tiles: Annotated[int, Meta(ge=1)] = 1
    turbo: bool = False
    device: Device = "auto"
    mode: Literal["fine", "rough"] = "fine"
    stop: list[str] = msgspec.field(default_factory=list)
    offload: GroupOffload | ModelOffload | None = None

    def __post_init__(self) -> None:
        if self.tiles == 13:
            raise ValueError("13 tiles bring bad luck")


class JoinSpec(StageSpec, frozen=True, kw_only=True, tag="join"):
    pass


class EndSpec(StageSpec, frozen=True, kw_only=True, tag="end"):
    pass


def check_paint(spec: PaintSpec, base_dir: str) -> list[Mistake]:
    return [Mistake(f"call.{key}", f"must be positive, got {value}") for key, value in spec.call.items() if value == -1]


def make_kind(
    name: str, spec_type: type[StageSpec], inputs: dict[str, Port], outputs: dict[str, Port], **more: Any
) -> StageKind:
    return StageKind(name, spec_type, "no:stage", ports=lambda spec, base_dir: Ports(inputs, outputs), **more)


PROMPT = Port("text", required=True)
PAINT_INPUTS = {"prompt": PROMPT, "image": Port("image", many=True), "height": Port("json")}
WRITE = make_kind("write", WriteSpec, {"prompt": PROMPT}, {"text": Port("text")})
PAINT = make_kind("paint", PaintSpec, PAINT_INPUTS, {"images": Port("list[image]")}, check=check_paint)
JOIN = make_kind("join", JoinSpec, {"images": Port("list[image]", required=True)}, {"image": Port("image")})
END = make_kind("end", EndSpec, {"image": Port("any"), "last": Port("any")}, {})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, and only the kinds of this file."""
    kinds = {name: f"{__name__}:{name.upper()}" for name in ("write", "paint", "join", "end")}
    monkeypatch.setattr(registry, "BUILT_IN", kinds)
    monkeypatch.setattr(registry, "import_string", lambda target: globals()[target.partition(":")[2]])
    monkeypatch.setattr(registry, "entry_points", lambda **selection: ())
    monkeypatch.chdir(tmp_path)
    registry.find_kind.cache_clear()
    yield tmp_path
    registry.find_kind.cache_clear()


def load_text(text: str, *overrides: str, name: str = "g.yaml") -> LoadedGraph:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return load_graph(name, overrides)


def lines_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(GraphError) as error:
        load_text(text, *overrides)
    return str(error.value).split("\n")


DRAW = "stages:\n  draw: {kind: paint, model: m, call: {steps: 8, scale: 4.5}}\n"


# Mistakes ---------------------------------------------------------------------------------------------------------


def read_cases() -> dict[str, tuple[str, list[str]]]:
    """Name of a case -> the file, and the lines it gives."""
    text = (Path(__file__).parent / "broken_graphs" / "cases.txt").read_text()
    cases = {}
    for block in text.split("==== ")[1:]:
        name, _, rest = block.partition("\n")
        graph, _, lines = rest.partition("----\n")
        cases[name] = (graph, lines.strip().split("\n"))
    return cases


CASES = read_cases()


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_broken_files_give_exact_messages(name: str) -> None:
    text, expected = CASES[name]
    assert lines_of(text) == expected


@pytest.mark.parametrize("name", CASES)
def test_every_mistake_has_a_place(name: str) -> None:
    with pytest.raises(GraphError) as error:
        load_text(CASES[name][0])
    assert all(m.file == "g.yaml" and m.line >= 1 and m.column >= 1 and m.message for m in error.value.mistakes)


def test_long_values_are_cut() -> None:
    (line,) = lines_of(f"stages:\n  draw: {{kind: paint, model: m, mode: {'x' * 5000}}}\n")
    assert line == f"g.yaml:2:39: stages.draw.mode: expected one of fine, rough, got '{'x' * 55}...'"


# Overlays ---------------------------------------------------------------------------------------------------------


def test_mistakes_in_a_base_name_the_base() -> None:
    Path("base.yaml").write_text("stages:\n  draw:\n    kind: paint\n    modl: m\n")
    assert lines_of("base: base.yaml\nstages:\n  draw:\n    tiles: 0\n") == [
        "base.yaml:2:3: stages.draw: missing key 'model'",
        "base.yaml:4:5: stages.draw.modl: unknown key, did you mean 'model'? (allowed: call, device, inputs, "
        "isolation, kind, mode, model, offload, resources, stop, tiles, timeouts, turbo)",
        "g.yaml:4:12: stages.draw.tiles: expected a whole number >= 1, got 0",
    ]


def test_overlays_and_overrides_reach_the_spec() -> None:
    Path("base.yaml").write_text(DRAW)
    spec = load_text("base: base.yaml\nstages: {draw: {call: {steps: 4}}}\n", "stages.draw.call.scale=1").spec
    assert spec.stages["draw"] == PaintSpec(model="m", call={"steps": 4, "scale": 1})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.draw.mdel=n", "stages.draw.mdel: unknown key, did you mean 'model'? (allowed: "),
        ("stages.draw.tiles=no", "stages.draw.tiles: expected a whole number >= 1, got 'no'"),
        ("stages.drew.tiles=2", "stages.drew: missing key 'kind' (one of: write, paint, join, end)"),
        (
            "stages.draw.inputs.prompt=drew.text",
            "stages.draw.inputs.prompt: unknown stage 'drew', did you",
        ),
    ],
)
def test_mistakes_of_overrides_name_the_override(override: str, message: str) -> None:
    (line,) = lines_of(DRAW, override)
    assert line.startswith(f"--set {override}: {message}")


def test_mistakes_of_overrides_and_of_the_file_come_together() -> None:
    lines = lines_of("stages:\n  draw: {kind: paint, model: 3}\n", "nam=x", "oops")
    assert [line.partition(": ")[0] for line in lines] == ["--set nam=x", "--set oops", "g.yaml:2:30"]


# Objects ------------------------------------------------------------------------------------------------------------


def test_specs_and_documents_are_graphs_too() -> None:
    from_file = load_text(DRAW)
    from_spec = load_graph(from_file.spec)
    from_document = load_graph(from_file.document)
    assert from_file.spec == from_spec.spec == from_document.spec
    assert (from_file.path, from_spec.path) == ("g.yaml", None)
    assert from_file.base_dir == from_spec.base_dir == os.getcwd()
    assert load_graph(Path("g.yaml"), ["stages.draw.tiles=2"], base_dir="sub").base_dir == os.path.abspath("sub")


def test_mistakes_of_objects_have_paths() -> None:
    spec = GraphSpec(stages={"draw": PaintSpec(model="m", tiles=0), "b": 5})  # type: ignore[dict-item, arg-type]
    with pytest.raises(GraphError) as error:
        load_graph(spec)
    assert str(error.value).split("\n") == [
        "stages.draw.tiles: expected a whole number >= 1, got 0",
        "stages.b: expected a mapping with 'kind', got 5",
    ]


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", {2: 3}])
def test_objects_that_no_file_can_hold(value: Any) -> None:
    with pytest.raises(GraphError):
        load_graph({"stages": {"draw": {"kind": "paint", "model": "m", "call": {"x": value}}}})
    if not isinstance(value, (dict, set, bytes)):
        with pytest.raises(GraphError, match="no file can hold"):
            load_graph(GraphSpec(stages={"draw": PaintSpec(model="m", call={"x": value})}))


def test_endless_documents_are_refused() -> None:
    document: dict[str, Any] = {"stages": {}}
    document["stages"]["again"] = document
    with pytest.raises(GraphError, match="nested more than"):
        load_graph(document)


# Properties ---------------------------------------------------------------------------------------------------------

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = [
    "stages",
    "inputs",
    "outputs",
    "name",
    "base",
    "kind",
    "model",
    "call",
    "offload",
    "policy",
    "resources",
    "gpus",
]
WORDS = st.sampled_from(
    [*KEYS, "paint", "join", "draw", "draw.images", "prompt", "group", "type", "default", "list[text]", "stop", "a.b"]
)
TREES = st.recursive(
    LEAVES | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=5)
        | st.dictionaries(WORDS | LEAVES, inner, max_size=3)
    ),
    max_leaves=20,
)
STAGE = st.fixed_dictionaries(
    {"kind": st.sampled_from(["paint", "write", "join", "end"])},
    optional={
        "model": st.just("m") | TREES,
        "inputs": st.dictionaries(
            st.sampled_from(["prompt", "image", "images"]), WORDS | st.lists(WORDS, max_size=3), max_size=3
        ),
        "offload": TREES,
        "tiles": st.integers() | TREES,
    },
)
GRAPHS = st.fixed_dictionaries(
    {"stages": st.dictionaries(st.sampled_from(["draw", "a", "b", "prompt"]), STAGE, max_size=4)},
    optional={"inputs": TREES, "outputs": TREES, "name": TREES},
)
QUICK = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load_or_graph_error(graph: Any, *overrides: str) -> None:
    """Load, and let nothing pass but a GraphError whose mistakes have one line each."""
    lines = ["fine"]
    try:
        load_graph(graph, overrides)
    except GraphError as error:
        lines = [str(mistake) for mistake in error.mistakes]
    assert lines
    assert all(line and "\n" not in line for line in lines)


@QUICK
@given(TREES | GRAPHS)
def test_no_document_raises_anything_else(document: Any) -> None:
    if isinstance(document, dict):
        load_or_graph_error(document)


@QUICK
@given(st.text(alphabet="ab:-[]{}#&*!|>'\"%@`,?\n\t 01.\x01\u00e9\u2028~<=", max_size=40) | st.text(max_size=20))
def test_no_text_raises_anything_else(text: str) -> None:
    Path("g.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    load_or_graph_error("g.yaml")
    Path("g.yaml").write_text(DRAW)
    load_or_graph_error("g.yaml", text, f"stages.draw.call={text}", f"{text}=1")


@QUICK
@given(GRAPHS, st.randoms(use_true_random=False))
def test_no_broken_copy_raises_anything_else(document: dict[str, Any], chance: random.Random) -> None:
    lines = yaml.safe_dump(document, allow_unicode=True).split("\n")
    lines.insert(chance.randrange(len(lines)), lines.pop(chance.randrange(len(lines))))
    Path("g.yaml").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    load_or_graph_error("g.yaml")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=6), inner, max_size=3),
    max_leaves=8,
)
TEXTS = st.text(max_size=10) | st.sampled_from(["no", "1e-4", "0o17", "16:9", "2024-01-01", "null", "~", "1_0", ".5"])
SPECS = st.builds(
    lambda stages, name, description: GraphSpec(stages=stages, name=name, description=description),
    st.dictionaries(
        st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True),
        st.builds(
            PaintSpec,
            model=TEXTS,
            call=st.dictionaries(st.text(min_size=1, max_size=5), PLAIN, max_size=3).map(
                lambda call: {key: value for key, value in call.items() if value != -1}
            ),
            tiles=st.integers(1, 12),
            stop=st.lists(TEXTS, max_size=2),
            offload=st.none() | st.builds(GroupOffload, blocks=st.integers()) | st.builds(ModelOffload),
        ),
        min_size=1,
        max_size=3,
    ),
    name=TEXTS,
    description=TEXTS,
)


@QUICK
@given(SPECS)
def test_a_dumped_spec_loads_as_the_same_spec(spec: GraphSpec) -> None:
    loaded = load_graph(spec)
    assert loaded.spec == spec
    Path("dumped.yaml").write_text(dump(loaded.document), encoding="utf-8")
    again = load_graph("dumped.yaml")
    assert again.spec == spec
    assert again.document == loaded.document
    assert msgspec.structs.replace(again.graph, base_dir="") == msgspec.structs.replace(loaded.graph, base_dir="")
