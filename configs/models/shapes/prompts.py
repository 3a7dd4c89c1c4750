"""Loose prompts and the canonical captions that they mean: what the captioner learns from.

Three sources: names of concepts ("draw me the flag of japan please"), fragments ("tiny green star top left") and
captions of the grammar in any wording. All of them come with typos, odd case and odd punctuation.
"""

import random
import string

from concepts import CONCEPTS
from sampling import is_clear, sample_scene
from scenes import Scene, Shape, allowed_places, is_held_out, write

TEMPLATES = (
    "{}",
    "{}",
    "{}",
    "draw {}",
    "draw {} please",
    "draw me {}",
    "please draw {}",
    "draw a picture of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "paint {}",
    "paint me {} please",
    "can you draw {}?",
    "could you paint {} for me?",
    "show me {}",
    "i want {}",
    "i would like to see {}",
    "make a picture of {}",
    "make {}",
    "generate {}",
    "create an image of {}",
    "{} please",
    "{}, simple",
    "a simple picture of {}",
    "describe {}",
    "describe as a scene: {}",
    "describe, as a painting: {}",
    "scene: {}",
    "caption for {}",
    "what does {} look like?",
    "give me {}",
    "{} in simple shapes",
    "something like {}",
    "hi, draw {}",
    "hello, please show me {}, thanks",
)
HELD_OUT_TEMPLATES = (
    "draw me {} please",
    "please paint {}",
    "could you draw {}?",
    "show me a picture of {}",
    "i want to see {}",
    "generate an image of {}",
    "a simple drawing of {}",
    "hello, draw {} for me",
)
"""Wordings that training never sees; quality is measured on them."""

_SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "tiny", "little", "mini"),
    "medium": ("medium", "medium sized", "normal", ""),
    "large": ("large", "big", "huge", "giant"),
    "gray": ("gray", "grey", "silver"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "light blue", "sky blue", "turquoise"),
    "navy": ("navy", "dark blue", "navy blue"),
    "yellow": ("yellow", "yellow", "golden"),
    "circle": ("circle", "disc", "dot", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus"),
    "crescent": ("crescent", "moon"),
    "bar": ("bar", "rectangle"),
    "band": ("band", "horizontal stripe"),
    "column": ("column", "vertical stripe", "pillar"),
    "center": ("center", "in the center", "in the middle", "middle", "centre"),
    "top": ("top", "at the top", "on top"),
    "bottom": ("bottom", "at the bottom", "below"),
    "left": ("left", "on the left", "to the left"),
    "right": ("right", "on the right", "to the right"),
}
_DEFAULT_PLACES = {1: ("center",), 2: ("left", "right"), 3: ("left", "center", "right")}
"""Where a fragment's shapes go when it names no place: beside each other."""


def _say(word: str, rng: random.Random) -> str:
    """A word of the grammar, or another word for it."""
    return rng.choice(_SYNONYMS.get(word, (word,))) if rng.random() < 0.6 else word


def _say_place(place: str, rng: random.Random) -> str:
    """A place in a few words."""
    if place in _SYNONYMS:
        return rng.choice(_SYNONYMS[place])
    upper = place.replace("top", "upper").replace("bottom", "lower")
    return rng.choice((place, place, f"{place} corner", f"at the {place}", f"in the {place} corner", upper))


def _say_shape(shape: Shape, named: set[str], rng: random.Random) -> str:
    """One shape of a fragment; only the fields in `named` are said."""
    words = [_say(shape.size, rng)] if "size" in named else []
    words += [_say(shape.colour, rng), _say(shape.kind, rng)]
    article = rng.choice(("", "", "a ", "one "))
    text = article + " ".join(word for word in words if word)
    return f"{text} {_say_place(shape.place, rng)}" if "place" in named else text


def sample_fragment(rng: random.Random) -> tuple[str, Scene]:
    """An incomplete wish and the scene that completes it: medium size, beside each other, on white (white: on blue)."""
    while True:
        scene = sample_scene(rng, rng.choices((1, 2, 3), (60, 30, 10))[0])
        named = {field for field in ("size", "place", "background") if rng.random() < 0.5}
        shapes = list(scene.shapes)
        if "size" not in named:
            shapes = [Shape(s.kind, "medium", s.colour, s.place) for s in shapes]
        if "place" not in named:
            places = _DEFAULT_PLACES[len(shapes)]
            if any(p not in allowed_places(s.kind) for s, p in zip(shapes, places, strict=True)):
                continue
            shapes = [Shape(s.kind, s.size, s.colour, p) for s, p in zip(shapes, places, strict=True)]
        white = any(s.colour == "white" for s in shapes)
        background = scene.background if "background" in named else ("blue" if white else "white")
        scene = Scene(tuple(shapes), background)
        if not is_clear(scene):
            continue
        text = rng.choice((", ", " and ", " + ")).join(_say_shape(s, named, rng) for s in shapes)
        if "background" in named:
            colour = _say(background, rng)
            text += rng.choice((f" on {colour}", f" on a {colour} background", f", {colour} background"))
        return text, scene


def add_noise(text: str, rng: random.Random) -> str:
    """A prompt as people type it: other case, a typo, stray punctuation."""
    if len(text) > 4 and rng.random() < 0.15:
        at = rng.randrange(len(text) - 1)
        letter = rng.choice(string.ascii_lowercase)
        text = rng.choice(
            (
                text[:at] + text[at + 1 :],
                text[:at] + text[at] + text[at:],
                text[:at] + letter + text[at + 1 :],
                text[:at] + text[at + 1] + text[at] + text[at + 2 :],
            )
        )
    text = rng.choice((text, text, text, text.capitalize(), text.capitalize(), text.title(), text.upper()))
    return text + rng.choice(("", "", "", ".", "!", " "))


def sample_concept(rng: random.Random, templates: tuple[str, ...] = TEMPLATES) -> tuple[str, str]:
    """A request for a concept, and its caption."""
    caption = rng.choice(tuple(CONCEPTS))
    name = rng.choice(CONCEPTS[caption])
    article = "" if name.startswith(("a ", "an ", "the ")) else rng.choice(("", "", "", "a ", "the "))
    return rng.choice(templates).format(article + name), caption


def _sample_scene_prompt(rng: random.Random, fragment: bool, held_out: bool) -> tuple[str, Scene]:
    """A fragment or a caption, of a scene that is or is not in the held-out part."""
    while True:
        if fragment:
            text, scene = sample_fragment(rng)
        else:
            scene = sample_scene(rng)
            text = write(scene, rng)
        if is_held_out(scene) == held_out:
            return text, scene


def sample_prompt(rng: random.Random) -> tuple[str, str]:
    """One training example: a loose prompt, and the canonical caption that the captioner is to answer with."""
    source = rng.random()
    if source < 0.45:
        prompt, caption = sample_concept(rng)
    else:
        fragment = source < 0.75
        prompt, scene = _sample_scene_prompt(rng, fragment, held_out=False)
        caption = write(scene)
        if fragment or rng.random() < 0.3:
            prompt = rng.choice(TEMPLATES).format(prompt)
    return add_noise(prompt, rng), caption


def sample_held_out_prompt(rng: random.Random) -> tuple[str, str, str]:
    """A prompt that training does not hold, its caption, and the source: concept, fragment or caption."""
    source = rng.choices(("concept", "fragment", "caption"), (60, 20, 20))[0]
    if source == "concept":
        return (*sample_concept(rng, HELD_OUT_TEMPLATES), source)
    prompt, scene = _sample_scene_prompt(rng, source == "fragment", held_out=True)
    if source == "fragment":
        prompt = rng.choice(HELD_OUT_TEMPLATES).format(prompt)
    return prompt, write(scene), source
