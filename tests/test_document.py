"""Files, the files they are based on, and overrides, merged into one document."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from omni.document import MAX_BYTES, read_document, read_file
from omni.errors import GraphError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


def merged(text: str, *overrides: str, name: str = "g.yaml") -> Any:
    write(name, text)
    document = read_file(name, overrides)
    assert not document.mistakes, document.mistakes
    return document.root.plain()


def fault_of(path: str) -> str:
    with pytest.raises(GraphError) as error:
        read_file(path)
    return str(error.value)


# Files ------------------------------------------------------------------------------------------------------------


def test_missing_files_name_the_nearest() -> None:
    write("portrait.yaml", "stages: {}\n")
    reason = "cannot read the file: No such file or directory"
    assert fault_of("potrait.yaml") == f"potrait.yaml: {reason}, did you mean 'portrait.yaml'?"
    assert fault_of("other.yaml") == f"other.yaml: {reason}"
    assert fault_of("no/x.yaml") == f"no/x.yaml: {reason}"


@pytest.mark.parametrize("name", [".", "a\0b", "x" * 5000])
def test_folders_and_odd_names_are_no_graphs(name: str) -> None:
    assert "cannot read the file" in fault_of(name)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"name: \xff\n", "g.yaml:1:7: the file is not UTF-8 text; save it as UTF-8"),
        (b"\n  name: caf\xe9\n", "g.yaml:2:12: the file is not UTF-8 text; save it as UTF-8"),
        (b"a" * (MAX_BYTES + 1), "g.yaml: the file is larger than 1 MiB; is it a graph?"),
    ],
)
def test_files_that_are_no_text(data: bytes, fault: str) -> None:
    Path("g.yaml").write_bytes(data)
    assert fault_of("g.yaml") == fault


def test_a_byte_order_mark_is_skipped() -> None:
    Path("g.yaml").write_bytes(b"\xef\xbb\xbfname: a\n")
    assert read_file("g.yaml").root.plain() == {"name": "a"}


# Bases ------------------------------------------------------------------------------------------------------------


def test_mappings_merge_and_the_rest_is_replaced() -> None:
    write("base.yaml", "name: base\nstages: {a: {call: {x: 1, y: 2}, stop: [p, q]}, b: {call: {z: 3}}}\n")
    document = merged("base: base.yaml\nstages: {a: {call: {y: {deep: 1}}, stop: [r]}, b: {call: none}}\n")
    assert document == {
        "name": "base",
        "stages": {"a": {"call": {"x": 1, "y": {"deep": 1}}, "stop": ["r"]}, "b": {"call": "none"}},
    }


def test_null_removes_what_the_base_has_and_else_stays() -> None:
    write("base.yaml", "name: base\nstages: {a: {x: 1, y: 2}, b: {x: 1}}\n")
    document = merged("base: base.yaml\nname: null\nstages: {a: {x: null, z: null}, b: null}\n")
    assert document == {"stages": {"a": {"y": 2, "z": None}}}


def test_short_inputs_merge_like_long_ones() -> None:
    write("base.yaml", "inputs: {prompt: text, style: {type: text, default: oil}}\n")
    document = merged("base: base.yaml\ninputs: {prompt: {default: a cat}, style: json}\n")
    assert document == {
        "inputs": {"prompt": {"type": "text", "default": "a cat"}, "style": {"type": "json", "default": "oil"}}
    }


def test_bases_have_bases_and_are_found_beside_their_file() -> None:
    write("deep/first.yaml", "name: first\ndescription: kept\n")
    write("deep/second.yaml", "base: first.yaml\nname: second\n")
    document = merged("base: ../deep/second.yaml\nstages: {}\n", name="top/g.yaml")
    assert document == {"name": "second", "description": "kept", "stages": {}}
    assert read_document({"base": "deep/first.yaml"}, ".").root.plain() == {"name": "first", "description": "kept"}


def test_cycles_of_bases_are_printed() -> None:
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "name: b\nbase: sub/../g.yaml\n")
    write("sub/x", "")
    write("g.yaml", "base: a.yaml\n")
    assert fault_of("g.yaml") == ("b.yaml:2:7: base: the bases form a cycle: g.yaml -> a.yaml -> b.yaml -> g.yaml")
    write("own.yaml", "base: ./own.yaml\n")
    assert fault_of("own.yaml") == "own.yaml:1:7: base: the bases form a cycle: own.yaml -> own.yaml"


def test_model_folders_of_a_base_stay_beside_the_base() -> None:
    Path("lib/models/small").mkdir(parents=True)
    write(
        "lib/base.yaml", "stages: {a: {model: models/small}, b: {model: owner/name}, c: {model: models/small}, d: 1}\n"
    )
    stages = merged("base: ../lib/base.yaml\nstages: {c: {model: mine}}\n", name="top/g.yaml")["stages"]
    moved = os.path.join("..", "lib", "models", "small")
    assert stages == {"a": {"model": moved}, "b": {"model": "owner/name"}, "c": {"model": "mine"}, "d": 1}


# Overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "document"),
    [
        ("name=b", {"name": "b", "call": {"x": 1}}),
        ("name='7'", {"name": "7", "call": {"x": 1}}),
        ("call.y=[1, 0.5]", {"name": "a", "call": {"x": 1, "y": [1, 0.5]}}),
        ("call.x=a = b", {"name": "a", "call": {"x": "a = b"}}),
        ("call={z: 2}", {"name": "a", "call": {"x": 1, "z": 2}}),
        ("call.x=null", {"name": "a", "call": {}}),
        ("call=", {"name": "a"}),
        ("inputs.style=image", {"name": "a", "call": {"x": 1}, "inputs": {"style": {"type": "image"}}}),
    ],
)
def test_overrides_are_yaml(override: str, document: Any) -> None:
    assert merged("name: a\ncall: {x: 1}\n", override) == document


def test_the_last_override_wins() -> None:
    assert merged("name: a\n", "name=b", "name=c") == {"name": "c"}


USAGE = "expected path=value, for example stages.draw.call.num_inference_steps=8"
QUOTE = "put text with special characters in quotes"


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("name", f"--set name: {USAGE}"),
        ("=b", f"--set =b: {USAGE}"),
        ("a..b=c", f"--set a..b=c: {USAGE}"),
        ("base=b.yaml", "--set base=b.yaml: base: can only be set in a file"),
        (
            "name={a} and {b}",
            f"--set name={{a}} and {{b}}: name: not valid YAML: did not find expected <document start>; {QUOTE}",
        ),
        ("name=\udcff", rf"--set name=\udcff...: name: the text is not valid Unicode; {QUOTE}"),
        ("name={a: 1, a: 2}", "--set name={a: 1, a: 2}: name.a: the key stands twice"),
    ],
)
def test_wrong_overrides(override: str, fault: str) -> None:
    write("g.yaml", "name: a\n")
    document = read_file("g.yaml", (override,))
    assert [str(mistake) for mistake in document.mistakes] == [fault]
