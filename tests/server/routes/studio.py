"""Stages of graphs that the running server of these tests has, beside the demo models."""

from __future__ import annotations

import numpy as np

from omni.media import Audio, Video

FPS = 8.0
RATE = 24_000


def film(prompt: str, num_frames: int = 8, width: int = 32, height: int = 32) -> Video:
    """A bar that moves from left to right."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for number in range(num_frames):
        frames[number, :, number * width // num_frames] = 255
    return Video(frames, FPS)


def speak(prompt: str, speed: float = 1.0) -> Audio:
    """A tone, a tenth of a second for each word."""
    num_samples = int(RATE * 0.1 * len(prompt.split()) / speed)
    samples = np.sin(np.arange(num_samples) * 440 * 2 * np.pi / RATE).astype(np.float32)
    return Audio(samples[None] * 0.5, RATE)
