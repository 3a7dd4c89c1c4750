"""The picture of a plan in the terminal: layers from left to right, one box per stage, lines for the edges.

`layout` decides layers and order and serves the SVG (omni/draw_svg.py) too. A line forks on its way to several readers;
lines of different stages never join, and where they cross, the upright one is drawn whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from omni.graph import Graph
from omni.plan import Plan

UP, DOWN, LEFT, RIGHT = 1, 2, 4, 8
LINE_CHARS = {
    UP | DOWN: "\u2502|",
    LEFT | RIGHT: "\u2500-",
    DOWN | RIGHT: "\u250c+",
    DOWN | LEFT: "\u2510+",
    UP | RIGHT: "\u2514+",
    UP | LEFT: "\u2518+",
    UP | DOWN | RIGHT: "\u251c+",
    UP | DOWN | LEFT: "\u2524+",
    DOWN | LEFT | RIGHT: "\u252c+",
    UP | LEFT | RIGHT: "\u2534+",
    UP | DOWN | LEFT | RIGHT: "\u253c+",
}
"""Directions that a line takes from a cell -> its character, and the one for ASCII."""
GAP_ROWS = 1


class Item(msgspec.Struct, frozen=True):
    """One place in a layer: the box of `stage`, or a bend of the line of `source` that passes through."""

    stage: str
    """Empty for a bend."""
    source: str
    """The stage whose line it is: the stage itself, or the one whose edge bends here."""
    layer: int


class Link(msgspec.Struct, frozen=True):
    """A piece of line between items of neighbouring layers."""

    left: Item
    right: Item


class Layout(msgspec.Struct, frozen=True):
    """Items by layer, top to bottom, and the links between them."""

    layers: tuple[tuple[Item, ...], ...]
    links: tuple[Link, ...]


def layout(graph: Graph) -> Layout:
    """Layers by longest path, ordered so that few lines cross. Deterministic."""
    layer_of: dict[str, int] = {}
    for name in graph.order:
        layer_of[name] = max((layer_of[source] + 1 for source in graph.upstream(name)), default=0)
    layers: list[list[Item]] = [[] for _ in range(max(layer_of.values(), default=0) + 1)]
    boxes = {name: Item(name, name, layer_of[name]) for name in graph.order}
    for item in boxes.values():
        layers[item.layer].append(item)
    links: dict[Link, None] = {}
    for target in graph.order:
        for source in graph.upstream(target):
            left = boxes[source]
            for layer in range(layer_of[source] + 1, layer_of[target]):
                bend = Item("", source, layer)
                if bend not in layers[layer]:
                    layers[layer].append(bend)
                links[Link(left, bend)] = None
                left = bend
            links[Link(left, boxes[target])] = None
    _untangle(layers, tuple(links))
    return Layout(tuple(tuple(layer) for layer in layers), tuple(links))


def _untangle(layers: list[list[Item]], links: Sequence[Link], num_sweeps: int = 4) -> None:
    """Order each layer by the mean place of its neighbours, forwards and backwards in turn; keeps the best."""
    before: dict[Item, list[Item]] = {}
    after: dict[Item, list[Item]] = {}
    for link in links:
        after.setdefault(link.left, []).append(link.right)
        before.setdefault(link.right, []).append(link.left)
    best, best_crossings = [list(layer) for layer in layers], _count_crossings(layers, links)
    for sweep in range(num_sweeps):
        neighbours, order = (before, layers) if sweep % 2 == 0 else (after, layers[::-1])
        for layer in order:
            place = {item: _relative(items, item) for items in layers for item in items}
            mean = {
                item: sum(place[other] for other in neighbours[item]) / len(neighbours[item])
                if item in neighbours
                else place[item]
                for item in layer
            }
            layer.sort(key=mean.__getitem__)
        crossings = _count_crossings(layers, links)
        if crossings < best_crossings:
            best, best_crossings = [list(layer) for layer in layers], crossings
    layers[:] = best


def _relative(items: list[Item], item: Item) -> float:
    return (items.index(item) + 0.5) / len(items)


def _count_crossings(layers: list[list[Item]], links: Sequence[Link]) -> int:
    place = {item: index for layer in layers for index, item in enumerate(layer)}
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for link in links:
        by_layer.setdefault(link.left.layer, []).append((place[link.left], place[link.right]))
    return sum(
        (a[0] - b[0]) * (a[1] - b[1]) < 0
        for pieces in by_layer.values()
        for index, a in enumerate(pieces)
        for b in pieces[index + 1 :]
    )


def stage_labels(plan: Plan) -> dict[str, tuple[str, str]]:
    """Stage -> its name, and its kind and process."""
    return {
        stage.stage: (
            stage.stage,
            f"{plan.graph.spec.stages[stage.stage].__struct_config__.tag} @{stage.process}",
        )
        for stage in plan.stages
    }


def draw_terminal(plan: Plan, ascii_only: bool = False) -> str:
    """The graph as text, without a line break at the end; each box says `name` and `kind @process`."""
    canvas = _Canvas(layout(plan.graph), stage_labels(plan))
    return canvas.draw(ascii_only)


class _Canvas:
    """Cells of the drawing: `text` holds characters (and their ASCII form), `lines` the directions of each source."""

    def __init__(self, plan: Layout, labels: dict[str, tuple[str, str]]) -> None:
        self.layout = plan
        self.labels = labels
        self.text: dict[tuple[int, int], str] = {}
        self.lines: dict[tuple[int, int], dict[str, int]] = {}
        self.rows = self.place_rows()

    def draw(self, ascii_only: bool) -> str:
        column = 0
        for index, layer in enumerate(self.layout.layers):
            width = max((len(text) for item in layer if item.stage for text in self.labels[item.stage]), default=0) + 4
            links = [link for link in self.layout.links if link.right.layer == index]
            arrivals = self.choose_arrivals(links)
            column = self.draw_channel(links, arrivals, column)
            for item in layer:
                if item.stage:
                    self.draw_box(item, column, width)
            for link in links:
                if not link.right.stage:
                    self.draw_bend(link.right, arrivals[link], column, width)
            column += width
        return self.render(ascii_only)

    def num_rows(self, item: Item) -> int:
        """Rows inside a box: of any three, at most one is unfit for a line that arrives (see choose_arrivals)."""
        num_links = sum(link.right == item for link in self.layout.links)
        return max(2, math.ceil(1.5 * num_links))

    def place_rows(self) -> dict[Item, int]:
        """Row on which each item's line leaves it, at least three apart; layers are centred on each other."""
        heights = {
            item: self.num_rows(item) + (2 if item.stage else 0) for layer in self.layout.layers for item in layer
        }
        totals = [sum(heights[item] + GAP_ROWS for item in layer) - GAP_ROWS for layer in self.layout.layers]
        rows = {}
        for layer, total in zip(self.layout.layers, totals, strict=True):
            top = (max(totals) - total) // 2
            for item in layer:
                rows[item] = top + (1 if item.stage else 0)
                top += heights[item] + GAP_ROWS
        return rows

    def choose_arrivals(self, links: list[Link]) -> dict[Link, int]:
        """A row of its own for every line that ends: straight where it can, never where another line leaves."""
        leaving = {self.rows[link.left] for link in links}
        arrivals: dict[Link, int] = {}
        for right in dict.fromkeys(link.right for link in links):
            mine = sorted((link for link in links if link.right == right), key=lambda link: self.rows[link.left])
            inside = range(self.rows[right], self.rows[right] + self.num_rows(right))
            arrivals |= self.in_order(mine, inside, leaving) or self.straight_first(mine, inside, leaving)
        return arrivals

    def in_order(self, links: list[Link], inside: range, leaving: set[int]) -> dict[Link, int] | None:
        """Rows from top to bottom as the lines come, so that they need not cross; None when the rows run out."""
        found: dict[Link, int] = {}
        last = inside.start - 1
        for link in links:
            straight = self.rows[link.left]
            rest = (row for row in inside if row > last and row not in leaving)
            row = straight if straight in inside and straight > last else next(rest, None)
            if row is None:
                return None
            found[link] = last = row
        return found

    def straight_first(self, links: list[Link], inside: range, leaving: set[int]) -> dict[Link, int]:
        """Straight lines where they can be; the rest in the rows that are left, of which there are enough."""
        found = {link: self.rows[link.left] for link in links if self.rows[link.left] in inside}
        free = iter(row for row in inside if row not in leaving)
        return found | {link: next(free) for link in links if link not in found}

    def draw_channel(self, links: list[Link], arrivals: dict[Link, int], column: int) -> int:
        """The lines between two layers; returns the next free column."""
        spans: dict[Item, tuple[int, int]] = {}
        for left in dict.fromkeys(link.left for link in links):
            rows = [self.rows[left], *(arrivals[link] for link in links if link.left == left)]
            if min(rows) != max(rows):
                spans[left] = (min(rows), max(rows))
        tracks: list[list[tuple[int, int]]] = []
        columns = {}
        for left, span in sorted(spans.items(), key=lambda item: item[1]):
            place = next((index for index, track in enumerate(tracks) if track[-1][1] + 1 < span[0]), len(tracks))
            tracks[place : place + 1] = [[*(tracks[place] if place < len(tracks) else []), span]]
            columns[left] = column + 2 + 2 * place
        end = column + (2 * len(tracks) + 5 if links else 0)
        for link in links:
            self.draw_link(link, arrivals[link], column, columns.get(link.left, column), end)
        return end

    def draw_link(self, link: Link, arrival: int, start: int, track: int, end: int) -> None:
        source, row = link.left.source, self.rows[link.left]
        self.horizontal(source, row, start - 1, track if arrival != row else end)
        if arrival != row:
            self.vertical(source, track, row, arrival)
            self.horizontal(source, arrival, track, end)
        if link.right.stage:
            self.text[arrival, end - 1] = "\u25b6>"

    def draw_bend(self, item: Item, arrival: int, column: int, width: int) -> None:
        row = self.rows[item]
        self.horizontal(item.source, arrival, column - 1, column)
        if arrival != row:
            self.vertical(item.source, column, arrival, row)
        self.horizontal(item.source, row, column, column + width)

    def draw_box(self, item: Item, column: int, width: int) -> None:
        top, right = self.rows[item] - 1, column + width - 1
        bottom = top + self.num_rows(item) + 1
        name, what = self.labels[item.stage]
        for row, text in enumerate([name, what, *[""] * (bottom - top - 3)], start=top + 1):
            for offset, char in enumerate(f" {text} ".ljust(width - 2), start=column + 1):
                self.text[row, offset] = char + char
            self.text[row, column] = self.text[row, right] = "\u2502|"
        for row, corners in ((top, (DOWN | RIGHT, DOWN | LEFT)), (bottom, (UP | RIGHT, UP | LEFT))):
            for offset in range(column + 1, right):
                self.mark("", row, offset, LEFT | RIGHT)
            self.mark("", row, column, corners[0])
            self.mark("", row, right, corners[1])

    def horizontal(self, source: str, row: int, start: int, end: int) -> None:
        """From the middle of the cell `start` to the middle of the cell `end`."""
        for column in range(start, end):
            self.mark(source, row, column, RIGHT)
            self.mark(source, row, column + 1, LEFT)

    def vertical(self, source: str, column: int, start: int, end: int) -> None:
        for row in range(min(start, end), max(start, end)):
            self.mark(source, row, column, DOWN)
            self.mark(source, row + 1, column, UP)

    def mark(self, source: str, row: int, column: int, mask: int) -> None:
        cell = self.lines.setdefault((row, column), {})
        cell[source] = cell.get(source, 0) | mask

    def render(self, ascii_only: bool) -> str:
        style = 1 if ascii_only else 0
        cells = {place: _line_char(masks)[style] for place, masks in self.lines.items() if place not in self.text}
        cells |= {place: pair[style] for place, pair in self.text.items()}
        height = max(row for row, _ in cells) + 1
        width = max(column for _, column in cells) + 1
        lines = ("".join(cells.get((row, column), " ") for column in range(width)).rstrip() for row in range(height))
        return "\n".join(lines)


def _line_char(masks: dict[str, int]) -> str:
    """Two lines in one cell cross, and the upright one is drawn whole."""
    assert len(masks) == 1 or sorted(masks.values()) == [UP | DOWN, LEFT | RIGHT]
    return LINE_CHARS[min(masks.values())]
