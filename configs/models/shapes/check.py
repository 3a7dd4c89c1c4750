"""Judges a drawn picture against its scene by colour segmentation: shape colours, background colour, places, kinds."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from render import RESOLUTION, visible
from scenes import COLOURS, KINDS, STRIPES, Scene, Shape, allowed_places
from torch import Tensor

_REACH = 5
"""Pixels by which a shape may stick out of its nominal outline."""
_MOST_SHIFT = 8.0
"""Pixels that a shape's centre of mass may be off; neighbouring places are 30 or more apart."""
_AREA_RANGE = (0.6, 1.6)
_MOST_STRAY = 0.02
"""Part of the picture that may show a shape's colour where no shape of that colour is."""


@dataclass(frozen=True)
class Verdict:
    """What is right in a picture; each field but `kinds` must be true for the picture to be right."""

    background: bool
    colours: bool
    places: bool
    kinds: bool
    """Every shape that nothing hides looks more like its own kind than like any other."""

    @property
    def right(self) -> bool:
        """Shape colours, background colour and places are right, all at once."""
        return self.background and self.colours and self.places


def label_colours(picture: Tensor) -> Tensor:
    """The nearest named colour of each pixel: (128, 128, 3) uint8 -> (128, 128) int64, an index into COLOURS."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    return torch.cdist(picture.reshape(-1, 3).float(), palette).argmin(1).view(picture.shape[:2])


def _grow(mask: Tensor, pixels: int) -> Tensor:
    """A mask widened by some pixels on every side: (height, width) bool."""
    return F.max_pool2d(mask[None, None].float(), 2 * pixels + 1, 1, pixels)[0, 0] > 0


def _mass_centre(mask: Tensor) -> Tensor:
    """Mean row and column of a mask: (2,) float32."""
    return mask.nonzero().float().mean(0)


def _most_common(labels: Tensor) -> int:
    """The index of the colour that most pixels have, or -1 if there are none."""
    return int(labels.bincount().argmax()) if labels.numel() else -1


def _is_in_place(observed: Tensor, mask: Tensor, others: Tensor) -> bool:
    """Whether the pixels of a shape's colour around its outline have its area and its centre of mass."""
    found = observed & _grow(mask, _REACH) & ~others
    expected = mask & ~others
    area = int(found.sum()) / max(int(expected.sum()), 1)
    if not _AREA_RANGE[0] <= area <= _AREA_RANGE[1]:
        return False
    return bool((_mass_centre(found) - _mass_centre(expected)).norm() <= _MOST_SHIFT)


def _shift(mask: Tensor, rows: int, columns: int) -> Tensor:
    """A mask moved by whole pixels; what leaves on one side comes back on the other."""
    return torch.roll(mask, (rows, columns), (0, 1))


def _is_kind(observed: Tensor, shape: Shape, mask: Tensor) -> bool:
    """Whether a fully visible shape overlaps its own kind's outline more than any other kind's at that place."""
    found = observed & _grow(mask, _REACH)
    if not found.any():
        return False
    scores = {}
    for kind in KINDS:
        if shape.place not in allowed_places(kind):
            continue
        outline = visible(Scene((Shape(kind, shape.size, shape.colour, shape.place),), "white"))[0]
        offset = (_mass_centre(found) - _mass_centre(outline)).round().int().tolist()
        if kind not in STRIPES:
            outline = _shift(outline, *offset)
        scores[kind] = int((found & outline).sum()) / int((found | outline).sum())
    return max(scores, key=scores.__getitem__) == shape.kind


def judge(picture: Tensor, scene: Scene) -> Verdict:
    """What a picture, (128, 128, 3) uint8, gets right of a scene."""
    if tuple(picture.shape) != (RESOLUTION, RESOLUTION, 3):
        raise ValueError(f"expected a ({RESOLUTION}, {RESOLUTION}, 3) picture, got {tuple(picture.shape)}")
    names = list(COLOURS)
    labels = label_colours(picture)
    masks = visible(scene)
    background = _most_common(labels[~_grow(masks.any(0), _REACH)]) == names.index(scene.background)
    colours = places = kinds = True
    for shape, mask in zip(scene.shapes, masks, strict=True):
        observed = labels == names.index(shape.colour)
        of_colour = torch.stack([m for s, m in zip(scene.shapes, masks, strict=True) if s.colour == shape.colour])
        alike = of_colour.sum(0) > mask.int()
        stray = observed & ~_grow(of_colour.any(0), _REACH)
        colours &= _most_common(labels[mask]) == names.index(shape.colour)
        places &= _is_in_place(observed, mask, alike) and float(stray.float().mean()) <= _MOST_STRAY
        whole = torch.equal(mask, visible(Scene((shape,), scene.background))[0])
        if whole and not (alike & _grow(mask, _REACH)).any():
            kinds &= _is_kind(observed, shape, mask)
    return Verdict(background, colours, places, kinds)
