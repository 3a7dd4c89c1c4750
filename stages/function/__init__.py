"""The stage kind `function`: the user's own Python function. Light, unless the user's module is not."""

from __future__ import annotations

from omni.errors import Mistake
from omni.registry import Ports, StageKind
from omni.spec import FunctionSpec
from stages.function.signature import FunctionFault, find_function


def ports(spec: FunctionSpec, base_dir: str) -> Ports:
    """Ports from the signature of a function without faults (`check`). Imports the user's module."""
    return find_function(spec, base_dir).ports


def check(spec: FunctionSpec, base_dir: str) -> list[Mistake]:
    """Faults of the import, the signature, and of what the graph says about it."""
    try:
        find_function(spec, base_dir)
    except FunctionFault as error:
        return error.mistakes
    return []


KIND = StageKind(
    name="function", spec_type=FunctionSpec, stage="stages.function.stage:FunctionStage", ports=ports, check=check
)
