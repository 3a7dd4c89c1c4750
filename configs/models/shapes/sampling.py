"""Random scenes that can be judged: every shape is seen, and stands out from what is behind it."""

import itertools
import random
from functools import cache

import torch.nn.functional as F
from render import coverage, encode
from scenes import COLOURS, KINDS, MAX_SHAPES, SIZES, STRIPES, Scene, Shape, allowed_places

_GRID = 32
"""Cells on a side of the coarse masks that overlaps are counted on."""
_LEAST_VISIBLE = 0.45
_MOST_SHARED = 0.35
"""Of two overlapping shapes of one colour, how much of the smaller one may be hidden in the other."""
_HOLLOW_OR_THIN = ("ring", "cross", "star", "crescent", "bar", "triangle")


@cache
def _coarse_masks() -> dict[tuple[str, str, str], int]:
    """The cells that each kind, size and place covers, as the bits of one integer: counting them is then one call."""
    keys = [(k, s, p) for k, s in itertools.product(KINDS, SIZES) for p in allowed_places(k)]
    scenes = [Scene((Shape(k, s, "red", p),), "white") for k, s, p in keys]
    covered = coverage(encode(scenes)[0])[:, :1]
    cells = F.adaptive_avg_pool2d(covered, _GRID).flatten(1) > 0.5
    return {
        key: sum(1 << position for position in row.nonzero()[:, 0].tolist())
        for key, row in zip(keys, cells, strict=True)
    }


def is_clear(scene: Scene) -> bool:
    """Whether each shape of a scene shows enough of itself and differs from what it lies on."""
    masks = [_coarse_masks()[shape.kind, shape.size, shape.place] for shape in scene.shapes]
    later = 0
    for shape, mask in zip(reversed(scene.shapes), reversed(masks), strict=True):
        if shape.colour == scene.background:
            return False
        if (mask & ~later).bit_count() < _LEAST_VISIBLE * mask.bit_count():
            return False
        later |= mask
    for first, second in itertools.combinations(range(len(masks)), 2):
        if scene.shapes[first].colour != scene.shapes[second].colour:
            continue
        # What lies between the two keeps them apart to the eye: the red and white rings of a target.
        between = sum(masks[first + 1 : second])
        shared = (masks[first] & masks[second] & ~between).bit_count()
        if shared > _MOST_SHARED * min(masks[first].bit_count(), masks[second].bit_count()):
            return False
    return later.bit_count() < 0.8 * _GRID * _GRID


def _overlaps(scene: Scene) -> bool:
    """Whether two shapes other than stripes cover a common cell."""
    masks = [_coarse_masks()[s.kind, s.size, s.place] for s in scene.shapes if s.kind not in STRIPES]
    return any(a & b for a, b in itertools.combinations(masks, 2))


def _random_shape(rng: random.Random, kinds: tuple[str, ...] = KINDS) -> Shape:
    """Any shape of the given kinds; the center is drawn more often, because captions that name no place mean it."""
    kind = rng.choice(kinds)
    places = allowed_places(kind)
    place = "center" if rng.random() < 0.1 else rng.choice(places)
    return Shape(kind, rng.choice(tuple(SIZES)), rng.choice(tuple(COLOURS)), place)


def _nested_shapes(rng: random.Random, count: int) -> tuple[Shape, ...]:
    """Two or three shapes in one place, each smaller than the one behind it."""
    solid = tuple(kind for kind in KINDS if kind not in (*STRIPES, *_HOLLOW_OR_THIN))
    inner = tuple(kind for kind in KINDS if kind not in STRIPES)
    place = rng.choice(("center", "center", *allowed_places("circle")))
    sizes = sorted(rng.sample(tuple(SIZES), count), key=SIZES.__getitem__, reverse=True)
    repeated = rng.choice(solid) if rng.random() < 0.3 else None
    return tuple(
        Shape(repeated or rng.choice(inner if i == count - 1 else solid), size, rng.choice(tuple(COLOURS)), place)
        for i, size in enumerate(sizes)
    )


def _alike_shapes(rng: random.Random, count: int) -> tuple[Shape, ...]:
    """Shapes of one kind, often of one colour or size, in places of their own: lights, snowmen, stripes of a flag."""
    first = _random_shape(rng)
    places = rng.sample(allowed_places(first.kind), count)
    one_colour, one_size = rng.random() < 0.4, rng.random() < 0.7
    return tuple(
        Shape(
            first.kind,
            first.size if one_size else rng.choice(tuple(SIZES)),
            first.colour if one_colour else rng.choice(tuple(COLOURS)),
            place,
        )
        for place in places
    )


def _propose(rng: random.Random, count: int) -> Scene:
    """A scene of `count` shapes that may still turn out to be unclear."""
    background = rng.choice(tuple(COLOURS))
    style = rng.random()
    if count > 1 and style < 0.2:
        return Scene(_nested_shapes(rng, count), background)
    if count > 1 and style < 0.4:
        return Scene(_alike_shapes(rng, count), background)
    if count > 1 and style < 0.6:
        stripes = [_random_shape(rng, STRIPES) for _ in range(rng.randint(1, count - 1))]
        shapes = stripes + [_random_shape(rng) for _ in range(count - len(stripes))]
        rng.shuffle(shapes)
        return Scene(tuple(shapes), background)
    scene = Scene(tuple(_random_shape(rng) for _ in range(count)), background)
    # A chance overlap says little; most are drawn again so that scattered scenes are mostly apart.
    return _propose(rng, count) if _overlaps(scene) and rng.random() < 0.8 else scene


def sample_scene(rng: random.Random, count: int | None = None) -> Scene:
    """A clear random scene of one to three shapes."""
    while True:
        scene = _propose(rng, count or rng.choices(range(1, MAX_SHAPES + 1), (40, 32, 28))[0])
        if is_clear(scene):
            return scene
