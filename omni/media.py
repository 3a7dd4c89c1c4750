"""Values of the media port types, besides PIL images and plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np


class Video(msgspec.Struct, frozen=True):
    """A clip: `frames` is uint8 of shape (num_frames, height, width, 3), `fps` frames per second."""

    frames: np.ndarray
    fps: float


class Audio(msgspec.Struct, frozen=True):
    """Sound: `samples` is float32 in [-1, 1] of shape (channels, num_samples), `rate` in samples per second."""

    samples: np.ndarray
    rate: int
