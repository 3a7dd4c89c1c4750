"""The nouns that move: requests, what stages yield, and the events a caller hears.

All are msgspec structs in an importable module, so that they cross processes (see docs/decisions.md).
Seconds are wall-clock `time.time()` for instants and plain durations otherwise; bytes are counted, not estimated.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from omni.errors import StageError

Payload = dict[str, Any]
"""What a stage hands on: output port -> value (str, list of PIL images, Video, Audio, tensor, JSON)."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that moves."""


class Request(Message, frozen=True, kw_only=True):
    """One client request: its input fields and the seed that makes it repeatable."""

    id: str
    inputs: dict[str, Any] = {}
    seed: int = 0
    preview_every: int = 0
    """Denoise steps from one preview to the next; 0: no previews."""


# What a stage yields while it runs ------------------------------------------------------------------------------


class Started(Message, frozen=True, kw_only=True):
    """Optional first item: the stage begins now, after waiting for its turn."""


class Progress(Message, frozen=True, kw_only=True):
    """`step` of `num_steps` done; `unit` is what a step is ("denoise step", "token")."""

    step: int
    num_steps: int
    unit: str = "step"


class TextDelta(Message, frozen=True, kw_only=True):
    """A piece of generated text."""

    text: str


class Preview(Message, frozen=True, kw_only=True):
    """How the result looks after `step` of `num_steps`: a small PIL image, of a video its middle frame."""

    step: int
    num_steps: int
    image: Any
    """RGB, at most 256 pixels on its longer side."""


class Output(Message, frozen=True, kw_only=True):
    """The one payload of a stage's run, always its last item."""

    payload: Payload


StageItem = Started | Progress | TextDelta | Preview | Output


# What the caller of a request hears -----------------------------------------------------------------------------


class Event(Message, frozen=True, kw_only=True):
    """Base of a request's events, in order of time; exactly one of them is final."""

    request_id: str


class Queued(Event, frozen=True, kw_only=True):
    """The runner has accepted the request."""


class StageStarted(Event, frozen=True, kw_only=True):
    """The stage has begun to work on this request."""

    stage: str


class StageProgress(Event, frozen=True, kw_only=True):
    """A step of a stage is done."""

    stage: str
    step: int
    num_steps: int
    unit: str = "step"


class StageText(Event, frozen=True, kw_only=True):
    """A stage has generated a piece of text."""

    stage: str
    text: str


class StagePreview(Event, frozen=True, kw_only=True):
    """How the stage's result looks after a step; comes a little after the step's own StageProgress."""

    stage: str
    step: int
    num_steps: int
    image: Any
    """A small PIL image, as in Preview."""


class HopFinished(Event, frozen=True, kw_only=True):
    """A payload has crossed an edge: from the producer's last step until the consumer held it."""

    source: str
    target: str
    transport: str
    seconds: float
    bytes: int


class StageFinished(Event, frozen=True, kw_only=True):
    """The stage has finished; `seconds` counts from StageStarted, `bytes` is the size of its payload."""

    stage: str
    seconds: float
    bytes: int
    peak_device_bytes: int = 0
    """The most that torch has allocated on the stage's GPU, in its process so far; 0 without one."""
    peak_host_bytes: int = 0
    """The most memory that its process has had so far, mapped files included; 0 when unknown."""


class Done(Event, frozen=True, kw_only=True):
    """Final: `outputs` holds the graph's outputs by name."""

    outputs: dict[str, Any]
    seconds: float = 0.0


class Failed(Event, frozen=True, kw_only=True):
    """Final: a stage failed; `error` names it, the cause and the remedy."""

    error: StageError


class Aborted(Event, frozen=True, kw_only=True):
    """Final: the request was aborted."""

    reason: str = "aborted by the caller"


Final = Done | Failed | Aborted


class LoadProgress(Message, frozen=True, kw_only=True):
    """How far a stage has come with loading; not part of any request."""

    stage: str
    component: str
    done_bytes: int
    total_bytes: int
    state: Literal["loading", "ready"] = "loading"
    load_seconds: float = 0.0
    """When ready: since the stage's setup began."""
    peak_device_bytes: int = 0
    """When ready: as in StageFinished."""
    peak_host_bytes: int = 0
