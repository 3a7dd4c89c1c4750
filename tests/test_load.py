"""Graph files: the exact message of every mistake, inheritance, overrides, limits, and that nothing else is raised."""

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
from omni.spec import Device, GraphSpec, InputSpec, Spec, StageSpec
from omni.tree import MAX_DEPTH, MAX_VALUES, dump

# Kinds without models ---------------------------------------------------------------------------------------------


class GroupOffload(Spec, frozen=True, kw_only=True, tag_field="policy", tag="group"):
    blocks: int = 1


class ModelOffload(Spec, frozen=True, kw_only=True, tag_field="policy", tag="model"):
    pass


class WriteSpec(StageSpec, frozen=True, kw_only=True, tag="write"):
    model: str


class PaintSpec(StageSpec, frozen=True, kw_only=True, tag="paint"):
    model: str
    call: dict[str, Any] = {}
    tiles: Annotated[int, Meta(ge=1)] = 1
    turbo: bool = False
    device: Device = "auto"
    mode: Literal["fine", "rough"] = "fine"
    stop: list[str] = []
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


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"name: a\x01\n", "g.yaml:1:8: not valid YAML: control characters are not allowed"),
        (b"name: \xff\n", "g.yaml:1:7: the file is not UTF-8 text; save it as UTF-8"),
        (b"\n  name: caf\xe9\n", "g.yaml:2:12: the file is not UTF-8 text; save it as UTF-8"),
        (b"a" * (2**20 + 1), "g.yaml: the file is larger than 1 MiB; is it a graph?"),
        (b"[" * 500_000, f"g.yaml:1:{MAX_DEPTH + 2}: values are nested more than {MAX_DEPTH} deep"),
        (
            b"a: [" + b"1," * MAX_VALUES + b"]",
            f"the graph has more than {MAX_VALUES} values, aliases counted each time",
        ),
        (b"a: &a [*a]", "g.yaml:1:8: a[0]: the alias '*a' has no anchor '&a' before it"),
        (b"a: " + b"9" * 2000, "g.yaml:1:4: a: the number is too long"),
    ],
)
def test_hostile_files(data: bytes, line: str) -> None:
    Path("g.yaml").write_bytes(data)
    with pytest.raises(GraphError) as error:
        load_graph("g.yaml")
    assert line in str(error.value)


def test_alias_bombs_are_counted_not_built() -> None:
    levels = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert "aliases counted each time" in lines_of("\n".join(levels))[0]


def test_missing_files_name_the_nearest() -> None:
    Path("portrait.yaml").write_text(DRAW)
    for name, near in (("potrait.yaml", ", did you mean 'portrait.yaml'?"), ("other.yaml", ""), ("no/x.yaml", "")):
        with pytest.raises(GraphError) as error:
            load_graph(name)
        assert str(error.value) == f"{name}: cannot read the file: No such file or directory{near}"


def test_folders_and_odd_names_are_no_graphs() -> None:
    for name in (".", "a\0b", "x" * 5000):
        with pytest.raises(GraphError, match="cannot read the file"):
            load_graph(name)


def test_long_values_are_cut() -> None:
    (line,) = lines_of(f"stages:\n  draw: {{kind: paint, model: m, mode: {'x' * 5000}}}\n")
    assert line == f"g.yaml:2:39: stages.draw.mode: expected one of fine, rough, got '{'x' * 55}...'"


# YAML -------------------------------------------------------------------------------------------------------------


def test_scalars_follow_yaml_1_2() -> None:
    call = """
      {no: no, ratio: 16:9, day: 2024-01-01, small: 1e-4, half: .5, hex: 0x10, oct: 0o17, zeros: 007, minus: -3,
       inf: .inf, quoted: '1', nothing: ~, empty: , yes: true, point: 1.}"""
    loaded = load_text(f"stages:\n  draw:\n    kind: paint\n    model: m\n    call:{call}\n")
    assert loaded.document["stages"]["draw"]["call"] == {
        **{"no": "no", "ratio": "16:9", "day": "2024-01-01", "small": 1e-4, "half": 0.5, "hex": 16, "oct": 15},
        **{"zeros": 7, "minus": -3, "inf": float("inf"), "quoted": "1", "nothing": None, "empty": None},
        **{"yes": True, "point": 1.0},
    }


def test_aliases_share_values() -> None:
    text = "stages:\n  a: {kind: paint, model: m, call: &call {steps: 8}}\n  b: {kind: paint, model: m, call: *call}\n"
    spec = load_text(text).spec
    assert spec.stages["a"] == spec.stages["b"] == PaintSpec(model="m", call={"steps": 8})


def test_a_byte_order_mark_is_skipped() -> None:
    Path("g.yaml").write_bytes(b"\xef\xbb\xbf" + DRAW.encode())
    assert load_graph("g.yaml").graph.order == ("draw",)


# Base -------------------------------------------------------------------------------------------------------------


def test_overlays_merge_replace_and_remove() -> None:
    Path("base.yaml").write_text(
        "name: base\ninputs: {prompt: text, style: text}\nstages:\n"
        "  draw: {kind: paint, model: m, tiles: 4, stop: [a, b], call: {steps: 8, scale: 4.5}}\n"
        "  other: {kind: paint, model: n}\n"
    )
    loaded = load_text(
        "base: base.yaml\ninputs: {style: {default: oil}}\nstages:\n"
        "  draw: {stop: [c], tiles: null, call: {steps: 4, extra: null}}\n  other: null\n"
    )
    assert loaded.document == {
        "name": "base",
        "inputs": {"prompt": {"type": "text"}, "style": {"type": "text", "default": "oil"}},
        "stages": {
            "draw": {"kind": "paint", "model": "m", "stop": ["c"], "call": {"steps": 4, "scale": 4.5, "extra": None}}
        },
    }
    assert loaded.spec.stages["draw"] == PaintSpec(
        model="m", stop=["c"], call={"steps": 4, "scale": 4.5, "extra": None}
    )


def test_bases_have_bases_and_are_found_beside_their_file() -> None:
    Path("deep").mkdir()
    Path("deep/first.yaml").write_text(DRAW)
    Path("deep/second.yaml").write_text("base: first.yaml\nname: second\n")
    loaded = load_text("base: ../deep/second.yaml\nstages: {draw: {call: {steps: 2}}}\n", name="top/g.yaml")
    assert loaded.spec.name == "second"
    assert loaded.spec.stages["draw"].call == {"steps": 2, "scale": 4.5}


def test_mistakes_in_a_base_name_the_base() -> None:
    Path("base.yaml").write_text("stages:\n  draw:\n    kind: paint\n    modl: m\n")
    assert lines_of("base: base.yaml\nstages:\n  draw:\n    tiles: 0\n") == [
        "base.yaml:2:3: stages.draw: missing key 'model'",
        "base.yaml:4:5: stages.draw.modl: unknown key, did you mean 'model'? (allowed: call, device, inputs, "
        "isolation, kind, mode, model, offload, resources, stop, tiles, timeouts, turbo)",
        "g.yaml:4:12: stages.draw.tiles: expected a whole number >= 1, got 0",
    ]


def test_cycles_of_bases_are_printed() -> None:
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("name: b\nbase: g.yaml\n")
    assert lines_of("base: a.yaml\n") == [
        "b.yaml:2:7: base: the bases form a cycle: g.yaml -> a.yaml -> b.yaml -> g.yaml"
    ]


def test_a_graph_is_not_its_own_base() -> None:
    assert lines_of("base: ./g.yaml\n") == ["g.yaml:1:7: base: the bases form a cycle: g.yaml -> g.yaml"]


def test_model_folders_of_a_base_stay_beside_the_base() -> None:
    Path("lib/models/small").mkdir(parents=True)
    Path("lib/base.yaml").write_text(
        "stages:\n  a: {kind: paint, model: models/small}\n  b: {kind: paint, model: owner/name}\n"
        "  c: {kind: paint, model: models/small}\n"
    )
    spec = load_text("base: ../lib/base.yaml\nstages: {c: {model: mine}}\n", name="top/g.yaml").spec
    models = {name: stage.model for name, stage in spec.stages.items()}
    assert models == {"a": os.path.join("..", "lib", "models", "small"), "b": "owner/name", "c": "mine"}


# Overrides ----------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_come_last() -> None:
    loaded = load_text(
        DRAW,
        "stages.draw.call.steps=2",
        "stages.draw.call.steps=3",
        "stages.draw.call.sigmas=[1, 0.5]",
        "stages.draw.call.scale=null",
        "stages.draw.mode=rough",
        "stages.draw.call.note=a = b",
        "inputs.style=text",
        "name='7'",
    )
    assert loaded.spec.name == "7"
    assert loaded.spec.inputs == {"style": InputSpec(type="text")}
    assert loaded.spec.stages["draw"] == PaintSpec(
        model="m", mode="rough", call={"steps": 3, "sigmas": [1, 0.5], "note": "a = b"}
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "stages.draw.mdel=n",
            "--set stages.draw.mdel=n: stages.draw.mdel: unknown key, did you mean 'model'? (allowed: call, device, "
            "inputs, isolation, kind, mode, model, offload, resources, stop, tiles, timeouts, turbo)",
        ),
        (
            "stages.draw.tiles=no",
            "--set stages.draw.tiles=no: stages.draw.tiles: expected a whole number >= 1, got 'no'",
        ),
        (
            "stages.drew.tiles=2",
            "--set stages.drew.tiles=2: stages.drew: missing key 'kind' (one of: write, paint, join, end)",
        ),
        (
            "stages.draw.model",
            "--set stages.draw.model: expected path=value, for example stages.draw.call.num_inference_steps=8",
        ),
        (
            "stages..model=m",
            "--set stages..model=m: expected path=value, for example stages.draw.call.num_inference_steps=8",
        ),
        ("base=b.yaml", "--set base=b.yaml: base: can only be set in a file"),
        (
            "name={a} and {b}",
            "--set name={a} and {b}: name: not valid YAML: did not find expected <document start>; "
            "put text with special characters in quotes",
        ),
        (
            "name=\udcff",
            "--set name=\\udcff...: name: the text is not valid Unicode; put text with special characters in quotes",
        ),
        ("name={a: 1, a: 2}", "--set name={a: 1, a: 2}: a: the key stands twice"),
    ],
)
def test_wrong_overrides(override: str, line: str) -> None:
    assert line in lines_of(DRAW, override)


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
WORDS = st.sampled_from(
    ["stages", "inputs", "outputs", "name", "base", "kind", "paint", "join", "model", "draw", "draw.images", "prompt"]
    + ["call", "offload", "policy", "group", "type", "default", "list[text]", "resources", "gpus", "stop", "a.b"]
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
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load_or_graph_error(graph: Any, *overrides: str) -> LoadedGraph | None:
    try:
        return load_graph(graph, overrides)
    except GraphError as error:
        assert error.mistakes
        assert all(mistake.message and "\n" not in str(mistake) for mistake in error.mistakes)
        return None


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
