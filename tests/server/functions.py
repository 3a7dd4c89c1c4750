"""Functions for the stages of graphs that tests serve; none of them computes anything worth waiting for."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

from PIL import Image

from omni.media import Audio, Video

WAIT_SECONDS = 60
started: list[str] = []
"""Prompts, in the order in which `note` was called in this process."""


def echo(prompt: str) -> str:
    """At once."""
    return prompt


def note(prompt: str) -> str:
    """At once, and noted in `started`."""
    started.append(prompt)
    return prompt


async def hold(prompt: str) -> str:
    """A prompt that begins with "hold" is held until it is aborted; others pass."""
    started.append(prompt)
    if prompt.startswith("hold"):
        await asyncio.sleep(WAIT_SECONDS)
    return prompt


async def hold_picture(prompt: str, image: Image.Image) -> str:
    """As `hold`."""
    return await hold(prompt)


def watch(clip: Video) -> int:
    """The number of frames."""
    return len(clip.frames)


def note_and_fail(prompt: str) -> str:
    """Noted in `started`, then raises."""
    started.append(prompt)
    raise ValueError(f"no luck with {prompt}")


def pass_gate(prompt: str) -> str:
    """`slow FILE`: wait until the file is there. `kill FILE`: kill this process, unless it is there."""
    word, _, gate = prompt.partition(" ")
    if word == "kill" and not Path(gate).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    while word == "slow" and not Path(gate).exists():
        threading.Event().wait(0.01)
    return prompt


def mix(image: Image.Image, clip: Video, sound: Audio, details: dict, count: int = 1) -> dict:
    """A description of what came in, to the last bit."""
    return {
        "image": [image.mode, list(image.size), image.tobytes().hex()],
        "clip": [clip.fps, list(clip.frames.shape), clip.frames.tobytes().hex()],
        "sound": [sound.rate, list(sound.samples.shape), sound.samples.tobytes().hex()],
        "details": details,
        "count": count,
    }


def fail(prompt: str) -> str:
    """Raises."""
    raise ValueError(f"no luck with {prompt}")


def merge(text: str, more: dict) -> str:
    """How much came in."""
    return f"{len(text)} {len(str(more))}"
