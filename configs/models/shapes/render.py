"""Draws scenes: signed distances to each shape's edge, turned into antialiased coverage, composed back to front.

Everything works on batches and on any device, so that pictures for training can be drawn where the training runs.
"""

import math
from collections.abc import Sequence

import torch
from scenes import COLOURS, KINDS, MAX_SHAPES, PLACES, SIZES, STRIPE_SIZES, STRIPES, Scene, Shape
from torch import Tensor

RESOLUTION = 128
"""Pixels on a side."""
_MARGIN = 4.0
_OFFSET = 36.0
_BAR_HALF = (1.35, 0.42)
"""Half width and half height of a bar, in units of its size."""
POSITION_JITTER = 2.0
"""Pixels by which a training picture's shape may be off its nominal place, each way."""
_SCALE_JITTER = 0.05
_COLOUR_JITTER = 4.0

EMPTY_KIND = len(KINDS)
NUM_FIELDS = 4
"""Numbers that describe a shape in an encoded scene: kind, half-size in pixels, x and y of the centre in pixels."""


def _half_extent(shape: Shape) -> tuple[float, float]:
    """Half width and half height in pixels of the box around a shape."""
    size = SIZES[shape.size]
    return (size * _BAR_HALF[0], size * _BAR_HALF[1]) if shape.kind == "bar" else (size, size)


def centre(shape: Shape) -> tuple[float, float]:
    """Where a shape's centre is, in pixels; the whole shape stays inside the picture."""
    column, row = PLACES[shape.place]
    middle = RESOLUTION / 2
    if shape.kind in STRIPES:
        reach = middle - STRIPE_SIZES[shape.size]
        return middle + column * reach, middle + row * reach
    half_width, half_height = _half_extent(shape)
    reach_x = min(_OFFSET, middle - _MARGIN - half_width)
    reach_y = min(_OFFSET, middle - _MARGIN - half_height)
    return middle + column * reach_x, middle + row * reach_y


def encode(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Numbers for the renderer: shapes (batch, 3, 4) float32 and sRGB (batch, 4, 3) float32, the background first."""
    shapes = []
    colours = []
    for scene in scenes:
        empty = MAX_SHAPES - len(scene.shapes)
        halves = [(STRIPE_SIZES if s.kind in STRIPES else SIZES)[s.size] for s in scene.shapes]
        rows = [(KINDS.index(s.kind), half, *centre(s)) for s, half in zip(scene.shapes, halves, strict=True)]
        shapes.append(rows + [(EMPTY_KIND, 0.0, 0.0, 0.0)] * empty)
        colours.append([COLOURS[name] for name in (scene.background, *(s.colour for s in scene.shapes))])
        colours[-1] += [(0, 0, 0)] * empty
    return torch.tensor(shapes, dtype=torch.float32), torch.tensor(colours, dtype=torch.float32)


def jitter(shapes: Tensor, colours: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Moves, scales and tints encoded scenes a little, so that one caption has many pictures."""

    def noise(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=shapes.device) * 2 - 1

    batch = shapes.shape[0]
    moved = shapes.clone()
    moved[:, :, 1] *= 1 + _SCALE_JITTER * noise(batch, MAX_SHAPES)
    # Stripes keep their place: shifting one would open a gap between it and the edge it belongs to.
    free = (shapes[:, :, 0] != KINDS.index("band")) & (shapes[:, :, 0] != KINDS.index("column"))
    moved[:, :, 2:] += POSITION_JITTER * noise(batch, MAX_SHAPES, 2) * free[:, :, None]
    tinted = (colours + _COLOUR_JITTER * noise(*colours.shape)).clamp(0, 255)
    return moved, tinted


def _box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    """Distance to a rectangle's edge; near the edge it is exact."""
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """An equilateral triangle that points up, its box 2 r high."""
    top = y + r
    return torch.maximum(y - r, x.abs() * math.sin(math.radians(63.43)) - top * math.cos(math.radians(63.43)))


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A five-pointed star, one point up: the plane is folded into one half of one point."""
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    length = (x * x + y * y).sqrt()
    px, py = length * folded.sin(), length * folded.cos()
    outer, inner = r * 1.1, r * 0.5
    ax, ay = inner * math.sin(sector / 2), inner * math.cos(sector / 2) - outer
    return (px * -ay + (py - outer) * ax) / (ax * ax + ay * ay).sqrt()


def _heart(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Two discs on the upper sides of a square that stands on its corner."""
    side = r * 0.62
    radius = side / math.sqrt(2)
    down = y - r * 0.15
    tilted = ((x.abs() + down.abs()) - side * math.sqrt(2)) / math.sqrt(2)
    lobe = ((x.abs() - radius) ** 2 + (down + radius) ** 2).sqrt() - side
    return torch.minimum(tilted, lobe)


def _distance(kind: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to the edge of a shape: x, y (n, height, width), r (n, 1, 1); negative inside."""
    length = (x * x + y * y).sqrt()
    if kind == "circle":
        return length - r
    if kind == "square":
        return _box(x, y, r * 0.9, r * 0.9)
    if kind == "triangle":
        return _triangle(x, y, r)
    if kind == "star":
        return _star(x, y, r)
    if kind == "ring":
        return (length - r * 0.75).abs() - r * 0.25
    if kind == "cross":
        return torch.minimum(_box(x, y, r, r * 0.33), _box(x, y, r * 0.33, r))
    if kind == "heart":
        return _heart(x, y, r)
    if kind == "diamond":
        return (x.abs() / 0.72 + y.abs() - r) * 0.72 / math.hypot(1, 0.72)
    if kind == "hexagon":
        slanted = x.abs() * math.cos(math.pi / 6) + y.abs() * math.sin(math.pi / 6)
        return torch.maximum(slanted, y.abs()) - r * 0.9
    if kind == "crescent":
        bite = ((x - r * 0.5) ** 2 + (y + r * 0.15) ** 2).sqrt() - r * 0.8
        return torch.maximum(length - r, -bite)
    if kind == "bar":
        return _box(x, y, r * _BAR_HALF[0], r * _BAR_HALF[1])
    return (y if kind == "band" else x).abs() - r


def coverage(shapes: Tensor) -> Tensor:
    """How much of each pixel each shape covers: (batch, 3, 4) -> (batch, 3, 128, 128) float32 from 0 to 1."""
    flat = shapes.reshape(-1, NUM_FIELDS)
    axis = torch.arange(RESOLUTION, device=shapes.device, dtype=torch.float32) + 0.5
    covered = torch.zeros(flat.shape[0], RESOLUTION, RESOLUTION, device=shapes.device)
    for index, kind in enumerate(KINDS):
        rows = (flat[:, 0] == index).nonzero()[:, 0]
        if rows.numel() == 0:
            continue
        half, x, y = (column[:, None, None] for column in flat[rows, 1:].unbind(1))
        distance = _distance(kind, axis[None, None, :] - x, axis[None, :, None] - y, half)
        covered[rows] = (0.5 - distance).clamp(0, 1)
    return covered.view(*shapes.shape[:2], RESOLUTION, RESOLUTION)


def paint(shapes: Tensor, colours: Tensor) -> Tensor:
    """Pictures of encoded scenes: (batch, 3, 128, 128) float32, sRGB from -1 to 1."""
    covered = coverage(shapes)
    picture = colours[:, 0, :, None, None].expand(-1, -1, RESOLUTION, RESOLUTION)
    for slot in range(MAX_SHAPES):
        picture = torch.lerp(picture, colours[:, slot + 1, :, None, None], covered[:, slot, None])
    return picture / 127.5 - 1


def visible(scene: Scene) -> Tensor:
    """Which pixels show each shape: (shapes, 128, 128) bool; what later shapes hide is left out."""
    covered = coverage(encode([scene])[0])[0, : len(scene.shapes)] > 0.5
    later = torch.zeros(RESOLUTION, RESOLUTION, dtype=torch.bool)
    masks = []
    for mask in reversed(covered.unbind(0)):
        masks.append(mask & ~later)
        later |= mask
    return torch.stack(masks[::-1])


def draw(scene: Scene) -> Tensor:
    """The nominal picture of one scene: (128, 128, 3) uint8."""
    picture = paint(*encode([scene]))[0]
    return ((picture + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
