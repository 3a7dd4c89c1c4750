"""The language of port types: which value fits which port. Pure words, no values."""

from __future__ import annotations

from typing import Any, Literal

from omni.registry import Port
from omni.spec import PORT_TYPES

ALL_TYPES = (*PORT_TYPES, *(f"list[{name}]" for name in PORT_TYPES))


def base_type(port_type: str) -> str:
    """`list[image]` -> `image`; other types stay."""
    return port_type[5:-1] if port_type.startswith("list[") else port_type


def list_of(port_type: str) -> str:
    """`image` -> `list[image]`; lists stay."""
    return port_type if port_type.startswith("list[") else f"list[{port_type}]"


def fit(given: str, port: Port) -> Literal["same", "wrap", "lift"] | None:
    """How a value of type `given` goes into `port`: as it is, as a list of one, or one item per run. None: not."""
    if "any" in (given, port.type):
        return "same"
    if base_type(given) != base_type(port.type) and "any" not in (base_type(given), base_type(port.type)):
        return None
    if given.startswith("list["):
        return "same" if port.type.startswith("list[") or port.many else "lift" if port.each else None
    return "wrap" if port.type.startswith("list[") else "same"


def default_fits(default: Any, port_type: str) -> bool:
    """Whether a default written in a file can stand for a field of this type."""
    if port_type.startswith("list["):
        return isinstance(default, list) and all(default_fits(item, base_type(port_type)) for item in default)
    return port_type in ("json", "any") or (port_type == "text" and isinstance(default, str))


def default_fault(port_type: str) -> str:
    """The message for a default that does not fit."""
    match base_type(port_type):
        case "text" | "json" | "any":
            wanted = f"a list of {base_type(port_type)}" if port_type.startswith("list[") else port_type
            return f"does not fit the input's type: expected {wanted}"
        case kind:
            return f"a file cannot hold a default of type {kind}; remove it (a field without one may be left out)"


def taken(port: Port) -> str:
    """The types that a port takes, in words."""
    takes_lists = (port.many or port.each) and not port.type.startswith("list[")
    return f"{port.type} or {list_of(port.type)}" if takes_lists else port.type
