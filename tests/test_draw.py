"""The drawing in the terminal: what it looks like, and that no line is lost or invented."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.draw import DOWN, LEFT, LINE_CHARS, RIGHT, UP, draw_terminal, layout
from omni.graph import resolve
from omni.hardware import preset
from omni.plan import Plan, plan_graph
from omni.spec import GraphSpec
from omni.testing import DoubleSpec, doubles


@pytest.fixture(autouse=True, scope="module")
def kinds() -> Iterator[None]:
    with doubles():
        yield


def plan(stages: dict[str, str]) -> Plan:
    """Stage -> the stages it reads, as one word each."""
    specs = {}
    for name, reads in stages.items():
        sources = reads.split()
        specs[name] = DoubleSpec(
            model=False,
            ports={f"in{index}": "any" for index in range(len(sources))},
            inputs={f"in{index}": f"{source}.text" for index, source in enumerate(sources)},
        )
    return plan_graph(resolve(GraphSpec(stages=specs)), preset("cpu2"), {})


CHAIN = """
+----------------+     +----------------+     +----------------+
| a              |---->| b              |---->| c              |
| double @driver |     | double @driver |     | double @driver |
+----------------+     +----------------+     +----------------+
"""

FAN_OUT = """
                         +----------------+
                    +--->| b              |
+----------------+  |    | double @driver |
| a              |--+    +----------------+
| double @driver |  |
+----------------+  |    +----------------+
                    +--->| c              |
                         | double @driver |
                         +----------------+
"""

FAN_IN = """
+----------------+
| a              |--+
| double @driver |  |      +----------------+
+----------------+  +----->| c              |
                      +--->| double @driver |
+----------------+    |    |                |
| b              |----+    +----------------+
| double @driver |
+----------------+
"""

DIAMOND = """
                         +----------------+
                    +--->| b              |--+
+----------------+  |    | double @driver |  |      +----------------+
| a              |--+    +----------------+  +----->| d              |
| double @driver |  |                          +--->| double @driver |
+----------------+  |    +----------------+    |    |                |
                    +--->| c              |----+    +----------------+
                         | double @driver |
                         +----------------+
"""

CROSSED = """
                           +----------------+
+----------------+         | c              |
| a              |--+----->| double @driver |
| double @driver |  | +--->|                |
+----------------+  | |    +----------------+
                    | |
+----------------+  | |    +----------------+
| b              |--|-+    | d              |
| double @driver |  +-|--->| double @driver |
+----------------+    +--->|                |
                           +----------------+
"""


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"a": "", "b": "a", "c": "b"}, CHAIN),
        ({"a": "", "b": "a", "c": "a"}, FAN_OUT),
        ({"a": "", "b": "", "c": "a b"}, FAN_IN),
        ({"a": "", "b": "a", "c": "a", "d": "b c"}, DIAMOND),
        ({"a": "", "b": "", "c": "a b", "d": "a b"}, CROSSED),
    ],
)
def test_golden(stages: dict[str, str], expected: str) -> None:
    assert draw_terminal(plan(stages), ascii_only=True) == expected.strip("\n")


def test_unicode_lines_mirror_the_ascii_ones() -> None:
    found = plan({"a": "", "b": "", "c": "a b", "d": "a b", "e": "c a"})
    drawing = draw_terminal(found)
    plain = drawing.translate({ord(pair[0]): pair[1] for pair in (*LINE_CHARS.values(), "\u25b6>")})
    assert plain == draw_terminal(found, ascii_only=True)
    assert set(drawing) >= set("\u2502\u2500\u250c\u2510\u2514\u2518\u25b6")


def test_long_edge_bends_around_what_lies_between() -> None:
    found = layout(plan({"a": "", "b": "a", "c": "b a"}).graph)
    assert [[item.stage or f"line of {item.source}" for item in layer] for layer in found.layers] == [
        ["a"],
        ["b", "line of a"],
        ["c"],
    ]


def test_order_avoids_crossings() -> None:
    found = layout(plan({"a": "", "b": "", "c": "b", "d": "a"}).graph)
    assert [[item.stage for item in layer] for layer in found.layers] == [["a", "b"], ["d", "c"]]


MASKS = {pair[0]: mask for mask, pair in LINE_CHARS.items()}
MOVES = {UP: (-1, 0), DOWN: (1, 0), RIGHT: (0, 1)}
OPPOSITE = {UP: DOWN, DOWN: UP, RIGHT: LEFT}
UPRIGHT, ARROW = "\u2502", "\u25b6"


@st.composite
def stage_tables(draw: st.DrawFn) -> dict[str, str]:
    names = [f"s{index}" for index in range(draw(st.integers(1, 8)))]
    return {
        name: " ".join(draw(st.lists(st.sampled_from(names[:index]), unique=True, max_size=4))) if index else ""
        for index, name in enumerate(names)
    }


@settings(max_examples=200)
@given(stage_tables())
def test_lines_say_what_the_graph_says(stages: dict[str, str]) -> None:
    """Following the lines from each box leads to its readers and nowhere else."""
    found = plan(stages)
    cells = {
        (row, column): char
        for row, line in enumerate(draw_terminal(found).splitlines())
        for column, char in enumerate(line)
    }
    owner = boxes(cells, stages)
    for name in stages:
        readers = {other for other in stages if name in stages[other].split()}
        assert follow(cells, owner, name) == readers
    assert sum(char == ARROW for char in cells.values()) == sum(len(reads.split()) for reads in stages.values())


def boxes(cells: dict[tuple[int, int], str], stages: dict[str, str]) -> dict[tuple[int, int], str]:
    """Cell of a box's left side -> its stage."""
    owner = {}
    for (row, column), char in cells.items():
        label = "".join(cells.get((row, column + offset), " ") for offset in range(1, 5)).strip()
        if char == UPRIGHT and label in stages:
            while cells[row, column] == UPRIGHT:
                owner[row, column] = label
                row += 1
    return owner


def follow(cells: dict[tuple[int, int], str], owner: dict[tuple[int, int], str], name: str) -> set[str]:
    """The stages that the lines from a box lead to; a line across an upright one goes on behind it."""
    row, left = min(place for place, stage in owner.items() if stage == name)
    column = next(column for column in range(left + 1, left + 99) if cells[row, column] == UPRIGHT)
    todo, seen, found = [(row, column + 1, RIGHT)], set(), set()
    while todo:
        step = todo.pop()
        row, column, direction = step
        char = cells.get((row, column), " ")
        if step in seen or char == " ":
            continue
        seen.add(step)
        if char == ARROW:
            found.add(owner[row, column + 1])
        elif char == UPRIGHT and direction == RIGHT:
            todo.append((row, column + 1, RIGHT))
        elif OPPOSITE[direction] & MASKS[char]:
            todo += [(row + down, column + right, way) for way, (down, right) in MOVES.items() if MASKS[char] & way]
    return found
