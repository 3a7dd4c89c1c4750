"""Functions for the stages of graphs that make every kind of output at once, without a model and without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from omni.media import Audio, Video


def draw(prompt: str, width: int = 16, height: int = 16, num_inference_steps: int = 1) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", (min(int(width), 64), min(int(height), 64)), (len(prompt) % 256, 90, 30))


def edit(prompt: str, image: list[Image.Image], mask_image: Image.Image | None = None) -> Image.Image:
    """The first picture, small."""
    return image[0].resize((8, 8))


def film(prompt: str, num_frames: int = 2, image: Image.Image | None = None) -> Video:
    """A grey clip."""
    return Video(np.full((min(int(num_frames), 4), 16, 16, 3), 90, np.uint8), 8.0)


def sing(prompt: str, seconds: float = 0.1) -> Audio:
    """Silence."""
    return Audio(np.zeros((1, 800), np.float32), 8000)


def say(prompt: str) -> str:
    """The prompt."""
    return prompt


def look(image: Image.Image, clip: Video | None = None, sound: Audio | None = None, details: Any = None) -> dict:
    """What came in."""
    return {"size": list(image.size), "frames": 0 if clip is None else len(clip.frames), "details": details}


def graph(function: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """A graph of one of these functions."""
    return {"inputs": inputs, "stages": {"work": {"kind": "function", "call": f"makers:{function}"}}}


NUMBER = {"type": "json"}
GRAPHS = {
    "painter": graph("draw", {"prompt": "text", "width": "json", "height": "json", "num_inference_steps": "json"}),
    "retoucher": graph("edit", {"prompt": "text", "image": "list[image]", "mask_image": "image"}),
    "film": graph("film", {"prompt": "text", "num_frames": "json", "image": "image"}),
    "singer": graph("sing", {"prompt": "text", "seconds": "json"}),
    "echo": graph("say", {"prompt": "text"}),
    "looker": graph("look", {"image": "image", "clip": "video", "sound": "audio", "details": "json"}),
}
"""A graph for each route, by name."""
