"""The kinds of stage: built-in ones by import string, others through the entry-point group `omni.stages`.

A kind is light: importing it must not import torch. Its `stage` string is imported where the stage will run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import msgspec

from omni.errors import Mistake, UsageError
from omni.memory import ComponentUse
from omni.spec import StageSpec

ENTRY_POINT_GROUP = "omni.stages"
BUILT_IN = {"llm": "stages.llm:KIND", "diffusion": "stages.diffusion:KIND", "function": "stages.function:KIND"}


class Port(msgspec.Struct, frozen=True):
    """One typed input or output of a stage."""

    type: str
    """One of spec.PORT_TYPES or `list[TYPE]`; `any` matches every type."""
    required: bool = False
    """Inputs only: a stage cannot run without it."""
    many: bool = False
    """Inputs only: a list of `type` is welcome too."""
    each: bool = False
    """Inputs only: given a list, the stage runs once per item and its outputs become lists."""


class Ports(msgspec.Struct, frozen=True):
    """The inputs and outputs of a stage; the first output is its main one."""

    inputs: dict[str, Port]
    outputs: dict[str, Port]
    open_inputs: bool = False
    """True when the input names are not known before the model is there: any name is accepted, typed `any`."""


class CheckpointRef(msgspec.Struct, frozen=True):
    """Which checkpoint a stage loads, so that the planner can read its sizes."""

    model: str
    revision: str | None = None
    variant: str | None = None


class StageKind(msgspec.Struct, frozen=True):
    """All that the orchestrator knows about a kind of stage."""

    name: str
    spec_type: type[StageSpec]
    stage: str
    """`module:name` of the omni.stage.Stage that runs it, or of a factory; called with its StageContext."""
    ports: Callable[[Any, str], Ports]
    """(spec, base_dir) -> ports. Pure, light; base_dir is the graph file's folder."""
    check: Callable[[Any, str], list[Mistake]] = lambda spec, base_dir: []
    """(spec, base_dir) -> faults, with paths relative to the stage (`call.guidance`)."""
    checkpoint: Callable[[Any], CheckpointRef | None] = lambda spec: None
    """The checkpoint whose weights the stage holds, or None for a stage without a model of its own."""
    uses: Callable[[Any, Any], dict[str, ComponentUse]] = lambda spec, facts: {}
    """(spec, CheckpointFacts) -> how the checkpoint's components work in a request; of those left out nothing is known.
    Pure, light."""


def import_string(target: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def kind_names() -> tuple[str, ...]:
    """Names of all kinds, built-in first."""
    return (*BUILT_IN, *sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP)))


@cache
def find_kind(name: str) -> StageKind:
    """The kind called `name`; KeyError when there is none, UsageError when a plug-in is broken."""
    if name in BUILT_IN:
        return _as_kind(name, import_string(BUILT_IN[name]))
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            return _as_kind(name, point.load())
        except (ImportError, AttributeError) as error:
            raise UsageError(f"stage kind '{name}': entry point {point.value} cannot be loaded: {error}") from error
    raise KeyError(name)


def find_kind_of(spec: StageSpec) -> StageKind:
    """The kind that a parsed stage spec belongs to."""
    return find_kind(str(spec.__struct_config__.tag))


def _as_kind(name: str, value: object) -> StageKind:
    if not isinstance(value, StageKind):
        raise UsageError(f"stage kind '{name}': the entry point must name an omni.registry.StageKind, got {value!r}")
    spec_type = value.spec_type
    if (tag := spec_type.__struct_config__.tag) != name:
        raise UsageError(
            f"stage kind '{name}': its spec {spec_type.__module__}.{spec_type.__qualname__} has the tag '{tag}'; "
            f"give the spec tag=\"{name}\", or call the entry point '{tag}'"
        )
    return value
