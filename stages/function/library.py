"""Functions for graphs, ready to use: `call: stages.function.library:add_border`. Plain PIL, 8-bit colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def add_border(image: Image.Image, pixels: int = 16, colour: str = "white") -> Image.Image:
    """`image` with a frame of `pixels` on each side, in any colour that PIL knows ("navy", "#204060")."""
    from PIL import ImageOps

    if pixels < 0:
        raise ValueError(f"pixels must be 0 or more, not {pixels}")
    return ImageOps.expand(image.convert("RGB"), border=pixels, fill=colour)


def upscale(image: Image.Image, factor: float = 2.0) -> Image.Image:
    """`image` with its sides `factor` times as long, by Lanczos resampling (no model)."""
    from PIL import Image

    if factor <= 0:
        raise ValueError(f"factor must be above 0, not {factor}")
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def grid(images: list[Image.Image], columns: int = 0, gap: int = 4, colour: str = "white") -> Image.Image:
    """All `images` on one sheet, row by row, in cells of the largest one; 0 columns makes the sheet about square."""
    from PIL import Image

    if not images:
        raise ValueError("grid needs at least one image")
    if columns < 0 or gap < 0:
        raise ValueError(f"columns and gap must be 0 or more, not {columns} and {gap}")
    columns = min(len(images), columns or round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), colour)
    for index, image in enumerate(images):
        left = index % columns * (width + gap) + (width - image.width) // 2
        top = index // columns * (height + gap) + (height - image.height) // 2
        sheet.paste(image.convert("RGB"), (left, top))
    return sheet


def side_by_side(images: list[Image.Image], gap: int = 4, colour: str = "white") -> Image.Image:
    """All `images` in one row, in order."""
    return grid(images, columns=len(images), gap=gap, colour=colour)
