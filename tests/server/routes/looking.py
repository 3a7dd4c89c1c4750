"""A function for graphs that tells exactly what it was given."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from PIL import Image

from omni.media import Audio, Video

if TYPE_CHECKING:
    import torch


def look(pictures: list[Image.Image], sound: Audio, clip: Video, numbers: torch.Tensor, text: str) -> dict[str, Any]:
    """Shapes and digests of all."""
    arrays = {"sound": sound.samples, "clip": clip.frames, "numbers": numbers.numpy()}
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    told = [[picture.size, hashlib.sha256(picture.tobytes()).hexdigest()] for picture in pictures]
    return {"digests": digests, "pictures": told, "rate": sound.rate, "fps": clip.fps, "text": text}
