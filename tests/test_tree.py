"""YAML text and plain data as trees: YAML 1.2 scalars, places, limits, and dumping again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.errors import GraphError
from omni.tree import MAX_DEPTH, MAX_VALUES, Notes, Place, Value, dump, read_data, read_yaml, show

START = Place("g.yaml", 1, 1)


def read(text: str) -> Value:
    notes = Notes()
    tree = read_yaml(text, START, notes)
    assert not notes.mistakes, notes.mistakes
    return tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("16:9", "16:9"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("007", 7),
        ("0x10", 16),
        ("0o17", 15),
        ("-.inf", float("-inf")),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
        ("{a: [1, {b: null}]}", {"a": [1, {"b": None}]}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = read(f"key: {text}\n").plain()["key"]
    assert found == value
    assert type(found) is type(value)


def test_aliases_share_values() -> None:
    tree = read("a: &call {steps: [8]}\nb: *call\nc: [*call]\n")
    assert tree.plain() == {"a": {"steps": [8]}, "b": {"steps": [8]}, "c": [{"steps": [8]}]}
    assert tree.find("b.steps[0]") == tree.find("a.steps[0]") == Place("g.yaml", 1, 19)


TREE = """\
stages:
  draw:
    inputs: {images: [a.x, b.x]}
  "a.b": {kind: c}
"""


@pytest.mark.parametrize(
    ("path", "line", "column"),
    [
        ("", 1, 1),
        ("stages", 1, 1),
        ("stages.draw", 2, 3),
        ("stages.draw.inputs.images", 3, 22),
        ("stages.draw.inputs.images[1]", 3, 28),
        ("stages.draw.inputs.images[7]", 3, 14),
        ("stages.draw.inputs.mask", 3, 5),
        ("stages.draw.call.steps", 2, 3),
        ("stages.a.b.kind", 4, 17),
        ("outputs", 1, 1),
    ],
)
def test_paths_have_places(path: str, line: int, column: int) -> None:
    assert read(TREE).find(path) == Place("g.yaml", line, column)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 500_000, f"g.yaml:1:{MAX_DEPTH + 2}: values are nested more than {MAX_DEPTH} deep"),
        ("a: [" + "1," * MAX_VALUES + "]", f"the graph has more than {MAX_VALUES} values, aliases counted each time"),
        ("a: &a [*a]", "g.yaml:1:8: a[0]: the alias '*a' has no anchor '&a' before it"),
        ("a: \x01", "g.yaml:1:4: not valid YAML: control characters are not allowed"),
        ("a: 1\nb: \udcff", "g.yaml:1:1: the text is not valid Unicode"),
        ("a: {b: 1}}", "g.yaml:1:10: not valid YAML: while parsing a block mapping did not find expected key"),
    ],
)
def test_hostile_texts(text: str, line: str) -> None:
    with pytest.raises(GraphError) as error:
        read(text)
    assert line in str(error.value)


def test_alias_bombs_are_counted_not_built() -> None:
    levels = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(GraphError, match="aliases counted each time"):
        read("\n".join(levels))


def test_numbers_without_end_are_noted() -> None:
    notes = Notes()
    read_yaml("a: " + "9" * 5000, START, notes)
    assert [str(mistake) for mistake in notes.mistakes] == ["g.yaml:1:4: a: the number is too long"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ({}, "a mapping"),
        ([1], "a list"),
        ("a\nb", r"'a\nb'"),
        (1.5, "1.5"),
        (10**50, "a huge number"),
        ("x" * 99, f"'{'x' * 55}...'"),
    ],
)
def test_values_in_messages_are_short(value: Any, text: str) -> None:
    assert show(value) == text


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
TRICKY = st.sampled_from(["1e-4", "0o17", ".inf", "yes", "1_0", "16:9", "<<", "", " a ", "\x85", "\u2028", "- a", "#"])


@given(st.dictionaries(st.text(), PLAIN | TRICKY, max_size=4).filter(lambda document: "<<" not in document))
def test_dumped_documents_read_back(document: dict[str, Any]) -> None:
    text = dump(document)
    assert text.isascii()
    assert read(text).plain() == read_data(document, Notes()).plain() == document
