"""A plug-in with the stage kind `shout`: all that a distribution needs to add a kind of its own."""

from __future__ import annotations

from omni.errors import Mistake
from omni.registry import Port, Ports, StageKind
from omni.spec import StageSpec


class ShoutSpec(StageSpec, frozen=True, kw_only=True, tag="shout"):
    """What the YAML may say about a stage of this kind."""

    marks: int = 1
    """Exclamation marks."""


def ports(spec: ShoutSpec, base_dir: str) -> Ports:
    """Text in, text out."""
    return Ports(inputs={"prompt": Port("text", required=True)}, outputs={"text": Port("text")})


def check(spec: ShoutSpec, base_dir: str) -> list[Mistake]:
    """More than nine marks are impolite."""
    return [Mistake("marks", f"{spec.marks} is too loud, at most 9")] if spec.marks > 9 else []


KIND = StageKind(name="shout", spec_type=ShoutSpec, stage="shouting.stage:ShoutStage", ports=ports, check=check)
