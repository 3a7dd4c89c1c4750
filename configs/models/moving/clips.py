"""The world of the clips: what can move, how a prompt says it, how a clip looks, and a judge of drawn clips.

A clip is one shape of one colour that crosses a background of another colour: "a red circle moving left on white".
Colours and outlines are those of the painter of still pictures, in the folder `shapes` beside this one.
"""

import random
import sys
import zlib
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "shapes"))

from render import EMPTY_KIND, paint
from scenes import COLOURS, KINDS, MAX_SHAPES

SIZE, NUM_FRAMES, FPS = 64, 8, 8
SHAPES = ("circle", "square", "triangle")
SHAPE_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
BACKGROUNDS = ("white", "black", "gray", "cyan")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Column and row of the way that the shape goes."""
HALF_SIZE, HALF_WAY, JITTER = 12.0, 17.0, 2.0
"""Pixels: half of the shape's height, half of its way, and how far it may be off its nominal place each way."""
_HELD_OUT_ONE_IN = 10
_LEAST_WAY = 15.0
"""Pixels by which the shape of a right clip moves at least."""


@dataclass(frozen=True)
class Clip:
    """What one clip shows."""

    colour: str
    shape: str
    direction: str
    background: str


ALL_CLIPS = tuple(
    Clip(colour, shape, direction, background)
    for colour in SHAPE_COLOURS
    for shape in SHAPES
    for direction in DIRECTIONS
    for background in BACKGROUNDS
)


def is_held_out(clip: Clip) -> bool:
    """Whether training never sees this combination; a hash decides."""
    return zlib.crc32(" ".join(astuple(clip)).encode()) % _HELD_OUT_ONE_IN == 0


def write(clip: Clip, rng: random.Random | None = None) -> str:
    """A prompt for the clip: the canonical one, or one of several wordings."""
    article = "an" if clip.colour == "orange" else "a"
    moving = where = ""
    if rng is not None:
        moving = rng.choice(("", "that moves", "which moves", "going", "is moving"))
        where = rng.choice(("", " background"))
    direction = clip.direction
    if rng is not None and rng.random() < 0.3:
        direction = f"to the {direction}" if direction in ("left", "right") else f"{direction}wards"
    ground = f"a {clip.background} background" if where else clip.background
    return f"{article} {clip.colour} {clip.shape} {moving or 'moving'} {direction} on {ground}"


def draw(clips: list[Clip], generator: torch.Generator | None = None) -> Tensor:
    """The clips' frames, a little off their nominal places with a generator: (clips, frames, 3, 64, 64), -1 to 1."""
    count = len(clips)
    scale = 128 / SIZE  # the renderer's pictures are larger
    steps = torch.linspace(-HALF_WAY, HALF_WAY, NUM_FRAMES)
    ways = torch.tensor([DIRECTIONS[clip.direction] for clip in clips], dtype=torch.float32)
    places = SIZE / 2 + steps[None, :, None] * ways[:, None]
    if generator is not None:
        places = places + JITTER * (torch.rand(count, 1, 2, generator=generator) * 2 - 1)
    shapes = torch.zeros(count, NUM_FRAMES, MAX_SHAPES, 4)
    shapes[..., 0] = EMPTY_KIND
    shapes[:, :, 0, 0] = torch.tensor([float(KINDS.index(clip.shape)) for clip in clips])[:, None]
    shapes[:, :, 0, 1] = HALF_SIZE * scale
    shapes[:, :, 0, 2:] = places * scale
    colours = torch.zeros(count, NUM_FRAMES, MAX_SHAPES + 1, 3)
    colours[:, :, 0] = torch.tensor([COLOURS[clip.background] for clip in clips], dtype=torch.float32)[:, None]
    colours[:, :, 1] = torch.tensor([COLOURS[clip.colour] for clip in clips], dtype=torch.float32)[:, None]
    pictures = paint(shapes.flatten(0, 1), colours.flatten(0, 1))
    return F.avg_pool2d(pictures, int(scale)).view(count, NUM_FRAMES, 3, SIZE, SIZE)


@dataclass(frozen=True)
class Verdict:
    """What is right in a drawn clip."""

    colour: bool
    shape: bool
    direction: bool
    background: bool

    @property
    def right(self) -> bool:
        """All at once."""
        return self.colour and self.shape and self.direction and self.background


def judge(frames: Tensor, clip: Clip) -> Verdict:
    """What drawn frames, (frames, 64, 64, 3) uint8, get right of a clip."""
    names = list(COLOURS)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    labels = torch.cdist(frames.reshape(-1, 3).float(), palette).argmin(1).view(frames.shape[:3])
    background = int(labels.flatten().bincount().argmax())
    others = labels[labels != background]
    if others.numel() == 0:
        return Verdict(False, False, False, names[background] == clip.background)
    colour = int(others.bincount().argmax())
    seen = labels == colour
    centres = [mask.nonzero().float().mean(0).flip(0) for mask in (seen[0], seen[-1])]
    way = centres[1] - centres[0]
    wanted = torch.tensor(DIRECTIONS[clip.direction], dtype=torch.float32)
    along = float(way @ wanted)
    across = float((way - along * wanted).norm())
    return Verdict(
        colour=names[colour] == clip.colour,
        shape=_shape_of(seen) == clip.shape,
        direction=bool(way.isfinite().all()) and along >= _LEAST_WAY and across < along / 2,
        background=names[background] == clip.background,
    )


def _shape_of(seen: Tensor) -> str:
    """The shape whose outline overlaps most with what is seen, (frames, 64, 64) bool, at the places where it is."""
    overlaps = dict.fromkeys(SHAPES, 0.0)
    for mask in seen[seen.flatten(1).any(1)]:
        rows, columns = mask.nonzero().unbind(1)
        middle = ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2)
        for shape in SHAPES:
            outline = _outline(shape)
            moved = torch.roll(outline, tuple(round(float(at) - (SIZE - 1) / 2) for at in middle), (0, 1))
            overlaps[shape] += int((mask & moved).sum()) / int((mask | moved).sum())
    return max(overlaps, key=overlaps.__getitem__)


@cache
def _outline(shape: str) -> Tensor:
    """A shape in the middle of a picture: (64, 64) bool."""
    frames = draw([Clip("black", shape, "left", "white")])[0]
    return torch.roll((frames[0, 0] < 0), round(-HALF_WAY), 1)
