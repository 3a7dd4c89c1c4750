"""The grammar of scenes: what can be drawn, how a caption says it, and how a caption is read back.

A scene is one to three coloured shapes, listed back to front, on a background of one colour. A caption names each
shape's size, colour, kind and place: "a small blue circle in the top left corner on a white background".
"""

import random
import re
import zlib
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 45),
    "orange": (245, 135, 25),
    "yellow": (250, 220, 45),
    "green": (45, 165, 75),
    "blue": (40, 90, 225),
    "purple": (130, 55, 175),
    "pink": (250, 160, 200),
    "brown": (125, 75, 40),
    "white": (252, 252, 252),
    "gray": (140, 140, 145),
    "black": (18, 18, 20),
    "cyan": (95, 205, 240),
    "navy": (20, 30, 100),
}
"""sRGB, 0 to 255. Any two are at least 80 apart, so that the nearest one is a safe judgement."""

SIZES: dict[str, float] = {"small": 11.0, "medium": 17.5, "large": 28.0}
"""Half of a shape's height, in pixels of a 128 x 128 picture."""

STRIPE_SIZES: dict[str, float] = {"small": 9.0, "medium": 21.5, "large": 32.0}
"""Half of a band's height or a column's width, in pixels: a seventh, a third and a half of the picture are covered."""

KINDS = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "heart",
    "diamond",
    "hexagon",
    "crescent",
    "bar",
    "band",
    "column",
)
STRIPES = ("band", "column")
"""A band spans the whole width, a column the whole height; both lie flush with the edge that their place names."""

PLACES: dict[str, tuple[int, int]] = {
    "center": (0, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
"""Column and row of the place: -1 is left or top, 1 is right or bottom."""

MAX_SHAPES = 3
_HELD_OUT_ONE_IN = 30

_SIDES = ("top", "bottom", "left", "right")
_PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "center": ("in the center", "in the middle", "at the center"),
    "top": ("at the top", "near the top", "at the top center"),
    "bottom": ("at the bottom", "near the bottom", "at the bottom center"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
} | {
    name: (f"in the {name} corner", f"at the {name}", f"in the {name}", f"in the {name.replace('top', 'upper')} corner")
    for name in PLACES
    if " " in name
}
"""The first phrase of each place is the canonical one."""

_PHRASE_TO_PLACE = {phrase: place for place, phrases in _PLACE_PHRASES.items() for phrase in phrases}
_COLOUR_WORDS = "|".join((*COLOURS, "grey"))
_BACKGROUND = re.compile(rf"^(?P<rest>.*?) (?:on|against) an? (?P<colour>{_COLOUR_WORDS}) background$")
_ITEM = re.compile(
    rf"^an? (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{_COLOUR_WORDS}) (?P<kind>{'|'.join(KINDS)})"
    rf"(?: (?P<place>{'|'.join(sorted(_PHRASE_TO_PLACE, key=len, reverse=True))}))?$"
)


class CaptionError(ValueError):
    """A caption that the grammar does not hold."""


@dataclass(frozen=True)
class Shape:
    """One shape; every field is a word of the tables above."""

    kind: str
    size: str
    colour: str
    place: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.size not in SIZES or self.colour not in COLOURS:
            raise ValueError(f"not a shape: {self}")
        if self.place not in allowed_places(self.kind):
            raise ValueError(f"a {self.kind} cannot be at {self.place!r}")


@dataclass(frozen=True)
class Scene:
    """Shapes from back to front, on a background."""

    shapes: tuple[Shape, ...]
    background: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.shapes) <= MAX_SHAPES or self.background not in COLOURS:
            raise ValueError(f"not a scene: {self}")


def allowed_places(kind: str) -> tuple[str, ...]:
    """The places where a kind can be: a band has no left or right, a column no top or bottom."""
    if kind == "band":
        return ("center", "top", "bottom")
    if kind == "column":
        return ("center", "left", "right")
    return tuple(PLACES)


def is_held_out(scene: Scene) -> bool:
    """Whether a scene holds a combination of size, colour, kind, place and background that training never sees.

    The split is by hash, so it is the same for every seed and every machine.
    """
    return any(
        zlib.crc32(f"{s.size} {s.colour} {s.kind}|{s.place}|{scene.background}".encode()) % _HELD_OUT_ONE_IN == 0
        for s in scene.shapes
    )


def _article(word: str) -> str:
    """The indefinite article of a word of the grammar."""
    return "an" if word[0] in "aeiou" else "a"


def _write_shape(shape: Shape, only: bool, rng: random.Random | None) -> str:
    """One shape's part of the caption; `only` says that the scene has no other shape."""
    words = [shape.size, shape.colour, shape.kind]
    if rng and shape.size == "medium" and rng.random() < 0.5:
        del words[0]
    phrases = _PLACE_PHRASES[shape.place]
    phrase = phrases[0]
    if rng and rng.random() < 0.4:
        phrase = rng.choice(phrases)
    leave_out = only and shape.place == "center"
    if rng and shape.place == "center":
        leave_out = rng.random() < (0.7 if only else 0.3)
    text = " ".join([_article(words[0]), *words])
    return text if leave_out else f"{text} {phrase}"


def write(scene: Scene, rng: random.Random | None = None) -> str:
    """The caption of a scene: the canonical one, or with `rng` one of its paraphrases."""
    items = [_write_shape(shape, len(scene.shapes) == 1, rng) for shape in scene.shapes]
    text = items[0]
    for position, item in enumerate(items[1:], start=2):
        last = position == len(items)
        text += (" and " if last or (rng and rng.random() < 0.2) else ", ") + item
    background = f"{_article(scene.background)} {scene.background} background"
    if rng is None:
        return f"{text} on {background}"
    if scene.background != "white" or rng.random() < 0.9:
        text += f" {'against' if rng.random() < 0.15 else 'on'} {background}"
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.25 else "")


def _read_shape(item: str) -> Shape:
    """The shape that one part of a caption names."""
    match = _ITEM.match(item)
    if match is None:
        raise CaptionError(f"not a shape of the grammar: {item!r}")
    colour = match["colour"].replace("grey", "gray")
    place = _PHRASE_TO_PLACE[match["place"]] if match["place"] else "center"
    try:
        return Shape(match["kind"], match["size"] or "medium", colour, place)
    except ValueError as error:
        raise CaptionError(str(error)) from error


def parse(caption: str) -> Scene:
    """The scene that a caption names; raises CaptionError for a caption outside the grammar.

    What is left out has a default: medium size, center, white background.
    """
    text = " ".join(caption.lower().replace("-", " ").split()).removesuffix(".")
    match = _BACKGROUND.match(text)
    background = match["colour"].replace("grey", "gray") if match else "white"
    items = re.split(r", and |, | and ", match["rest"] if match else text)
    if len(items) > MAX_SHAPES:
        raise CaptionError(f"{len(items)} shapes, at most {MAX_SHAPES} can be drawn: {caption!r}")
    return Scene(tuple(_read_shape(item) for item in items), background)
