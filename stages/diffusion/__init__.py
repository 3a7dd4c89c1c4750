"""The stage kind `diffusion`: any stock diffusers pipeline. Light: importing this imports no torch."""

from __future__ import annotations

from omni.registry import StageKind
from omni.spec import DiffusionSpec
from stages.diffusion.check import check, checkpoint, ports
from stages.diffusion.memory import uses

KIND = StageKind(
    name="diffusion",
    spec_type=DiffusionSpec,
    stage="stages.diffusion.stage:DiffusionStage",
    ports=ports,
    check=check,
    checkpoint=checkpoint,
    uses=uses,
)
