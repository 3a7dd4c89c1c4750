"""The stage kind `function`: the user's own Python function. Light, unless the user's module is not."""

from __future__ import annotations

from omni.errors import Mistake
from omni.registry import Port, Ports, StageKind
from omni.spec import FunctionSpec
from stages.function.signature import FunctionFault, find_function


def ports(spec: FunctionSpec, base_dir: str) -> Ports:
    """Ports from the function's signature; any inputs, and what the graph declares, when it is broken (`check` tells).

    Imports the user's module.
    """
    try:
        return find_function(spec, base_dir).ports
    except FunctionFault:
        return Ports({}, {name: Port(kind) for name, kind in spec.outputs.items()}, open_inputs=True)


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
