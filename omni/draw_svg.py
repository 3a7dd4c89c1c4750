"""The picture of a plan as one self-contained SVG: a box per stage, coloured by process, edges with their ports."""

from __future__ import annotations

from xml.sax.saxutils import escape

from omni.draw import Item, layout, stage_labels
from omni.graph import Edge
from omni.memory_reasons import memory_note
from omni.plan import Plan

BOX_HEIGHT, GAP, MARGIN, TOP = 80, 46, 24, 62
CHAR_WIDTH = 7.6
"""Of the labels' font, roughly: boxes and gaps are sized by it."""
COLOURS = ("#4c78d8", "#d9822b", "#2f9e6e", "#b455b6", "#c94f4f", "#5f8a2c", "#1f97a8", "#8a6d3b")
STYLE = """
  .ground { fill: #ffffff } .name { font: 600 14px sans-serif; fill: #1c1e21 }
  .small { font: 12px sans-serif; fill: #555b63 }
  .edge { fill: none; stroke: #8b929c; stroke-width: 1.6 } .hop { stroke-dasharray: 6 4 } .tip { fill: #8b929c }
  .label { font: 11px sans-serif; fill: #555b63; text-anchor: middle }
  .label { stroke: #ffffff; stroke-width: 4; paint-order: stroke }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #16181c } .name { fill: #eceef1 } .small { fill: #a9b0ba } .label { fill: #a9b0ba; stroke: #16181c }
  }
"""


def draw_svg(plan: Plan) -> str:
    """The graph as SVG text. Solid lines stay in a process, dashed ones go through the object store."""
    return _Picture(plan).draw()


class _Picture:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.layout = layout(plan.graph)
        self.labels = {
            stage: (*labels, memory_note(plan.stage(stage).memory)) for stage, labels in stage_labels(plan).items()
        }
        used = [process.name for process in plan.processes if process.stages]
        self.colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(used)}
        self.hops = self.hop_labels()
        self.boxes: dict[Item, tuple[float, float, float]] = {}
        self.width, self.height = self.place()

    def hop_labels(self) -> dict[tuple[str, str], tuple[str, str]]:
        """(producer, consumer) -> the ports that cross, and the transport."""
        edges: dict[tuple[str, str], tuple[list[Edge], str]] = {}
        for planned in self.plan.edges:
            key = (planned.edge.source.stage, planned.edge.target_stage)
            edges.setdefault(key, ([], planned.transport))[0].append(planned.edge)
        return {
            key: (", ".join(dict.fromkeys(edge.source.port for edge in found)), transport.replace("_", " "))
            for key, (found, transport) in edges.items()
        }

    def place(self) -> tuple[float, float]:
        """Give every item its x, centre y and width; returns the size of the picture."""
        pitch = BOX_HEIGHT + GAP
        height = max(len(layer) for layer in self.layout.layers) * pitch - GAP
        x = float(MARGIN)
        channel = 36 + 6.4 * max((len(text) for pair in self.hops.values() for text in pair), default=6)
        for layer in self.layout.layers:
            lengths = [len(text) for item in layer if item.stage for text in self.labels[item.stage]]
            width = 28 + CHAR_WIDTH * max(lengths, default=0)
            top = TOP + (height - (len(layer) * pitch - GAP)) / 2
            for index, item in enumerate(layer):
                self.boxes[item] = (x, top + index * pitch + BOX_HEIGHT / 2, width)
            x += width + channel
        legend = MARGIN * 2 + sum(34 + CHAR_WIDTH * len(self.legend_text(name)) for name in self.colours)
        return max(x - channel + MARGIN, legend), TOP + height + MARGIN

    def draw(self) -> str:
        size = f"{self.width:.0f} {self.height:.0f}"
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{self.width:.0f}" '
            f'height="{self.height:.0f}" role="img">',
            f"<title>{_text(self.plan.graph.spec.name)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
            '<rect class="ground" width="100%" height="100%"/>',
            *self.legend(),
            *(self.edge(*hop) for hop in self.hops),
            *(self.box(item) for layer in self.layout.layers for item in layer if item.stage),
            *(self.label(*hop) for hop in self.hops),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def legend(self) -> list[str]:
        parts, x = [], float(MARGIN)
        for name, colour in self.colours.items():
            text = self.legend_text(name)
            parts.append(f'<circle cx="{x + 6:.1f}" cy="28" r="6" fill="{colour}"/>')
            parts.append(f'<text class="small" x="{x + 18:.1f}" y="32">{_text(text)}</text>')
            x += 34 + CHAR_WIDTH * len(text)
        return parts

    def legend_text(self, process: str) -> str:
        kind = self.plan.process(process).kind
        return process if kind == "driver" else f"{process} ({kind})"

    def box(self, item: Item) -> str:
        x, y, width = self.boxes[item]
        name, what, memory = self.labels[item.stage]
        colour = self.colours[self.plan.stage(item.stage).process]
        top = y - BOX_HEIGHT / 2
        return (
            f'<g data-stage="{_attribute(name)}"><title>{_text(self.plan.stage(name).reason)}</title>'
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{BOX_HEIGHT}" rx="8" fill="{colour}" '
            f'fill-opacity="0.14" stroke="{colour}" stroke-width="1.8"/>'
            f'<text class="name" x="{x + 14:.1f}" y="{y - 14:.1f}">{_text(name)}</text>'
            f'<text class="small" x="{x + 14:.1f}" y="{y + 6:.1f}">{_text(what)}</text>'
            f'<text class="small" x="{x + 14:.1f}" y="{y + 25:.1f}">{_text(memory)}</text></g>'
        )

    def route(self, source: str, target: str) -> list[Item]:
        """The box of the producer, the bends of its line, the box of the consumer."""
        items = [item for layer in self.layout.layers for item in layer]
        boxes = {item.stage: item for item in items if item.stage}
        bends = {item.layer: item for item in items if not item.stage and item.source == source}
        first, last = boxes[source], boxes[target]
        return [first, *(bends[layer] for layer in range(first.layer + 1, last.layer)), last]

    def edge(self, source: str, target: str) -> str:
        stops = self.route(source, target)
        x, y, width = self.boxes[stops[0]]
        path = [f"M{x + width:.1f} {y:.1f}"]
        from_x, from_y = x + width, y
        for stop in stops[1:]:
            x, y, width = self.boxes[stop]
            middle = (from_x + x) / 2
            path.append(f"C{middle:.1f} {from_y:.1f} {middle:.1f} {y:.1f} {x:.1f} {y:.1f}")
            if not stop.stage:
                path.append(f"L{x + width:.1f} {y:.1f}")
            from_x, from_y = x + width, y
        css = "edge" if self.hops[source, target][1] == "local" else "edge hop"
        return f'<path class="{css}" marker-end="url(#tip)" d="{" ".join(path)}"/>'

    def label(self, source: str, target: str) -> str:
        ports, transport = self.hops[source, target]
        before, last = self.route(source, target)[-2:]
        x = (self.boxes[before][0] + self.boxes[before][2] + self.boxes[last][0]) / 2
        y = (self.boxes[before][1] + self.boxes[last][1]) / 2
        return (
            f'<text class="label" x="{x:.1f}" y="{y - 7:.1f}">{_text(ports)}</text>'
            f'<text class="label" x="{x:.1f}" y="{y + 15:.1f}">{_text(transport)}</text>'
        )


def _text(text: str) -> str:
    return escape("".join(char if char.isprintable() else "?" for char in text))


def _attribute(text: str) -> str:
    return _text(text).replace('"', "&quot;")
