"""Port types from type hints, told by the names of the classes, so that torch and PIL need not be imported."""

from __future__ import annotations

import builtins
import collections.abc
import dataclasses
import inspect
import sys
import types
import typing
from typing import Any

import msgspec

CLASS_TYPES = {
    "builtins.str": "text",
    "PIL.Image.Image": "image",
    "omni.media.Video": "video",
    "omni.media.Audio": "audio",
    "torch.Tensor": "tensor",
    "numpy.ndarray": "tensor",
    "builtins.bool": "json",
    "builtins.int": "json",
    "builtins.float": "json",
    "builtins.dict": "json",
    "builtins.list": "json",
    "builtins.tuple": "json",
}
"""Full name of a class -> the port type that it and its subclasses stand for."""
SHORT_NAMES = {name.rpartition(".")[2]: port_type for name, port_type in CLASS_TYPES.items()}
LIST_CLASSES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
MEDIA = ("text", "image", "video", "audio", "tensor")
"""Types of which a list is a `list[TYPE]`; a list of JSON is JSON itself."""


class HintType(msgspec.Struct, frozen=True):
    """What a hint says about a value."""

    type: str
    """A port type, or `list[TYPE]`."""
    many: bool = False
    """`X | list[X]`: one or several."""
    optional: bool = False
    """None is welcome."""


class _Missing(type):
    """Class of stand-ins for names that exist only while type checking; `Image.Image` stays a class named Image."""

    def __getattr__(cls, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(name, (), {})

    def __getitem__(cls, item: object) -> _Missing:
        return cls


class _Names(dict[str, Any]):
    """The names a hint may use: those of the function's module, Python's own, and stand-ins for all others."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name) if hasattr(builtins, name) else _Missing(name, (), {})


def hints_of(value: Any) -> dict[str, Any]:
    """The evaluated type hints of a function or class, without `Annotated`; `return` is the result's."""
    names = getattr(inspect.unwrap(value), "__globals__", None) or vars(sys.modules[value.__module__])
    return typing.get_type_hints(value, localns=_Names(names))


def hint_type(hint: Any) -> HintType:
    """What a type hint means for a port; what is not known is `any`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union_type(args)
    if origin is typing.Literal:
        return HintType("text" if all(isinstance(arg, str) for arg in args) else "json")
    if origin in LIST_CLASSES:
        items = {hint_type(arg).type for arg in args if arg is not ...}
        return HintType(_list_of(items.pop()) if len(items) == 1 else "any")
    return HintType(class_type(origin or hint) or "any")


def class_type(kind: Any) -> str | None:
    """The port type of a class, None when it stands for none."""
    if isinstance(kind, _Missing):
        return SHORT_NAMES.get(kind.__name__)
    for base in getattr(kind, "__mro__", ()):
        port_type = CLASS_TYPES.get(f"{base.__module__}.{base.__qualname__}")
        if port_type:
            return port_type
    return None


def _list_of(item: str) -> str:
    return f"list[{item}]" if item in MEDIA else "json" if item == "json" else "any"


def _union_type(args: tuple[Any, ...]) -> HintType:
    members = [hint_type(arg) for arg in args if arg is not type(None)]
    optional = len(members) < len(args)
    kinds = {member.type for member in members}
    single = [kind for kind in kinds if not kind.startswith("list[")]
    if len(kinds) == 1:
        return HintType(kinds.pop(), many=members[0].many, optional=optional)
    if len(kinds) == 2 and len(single) == 1 and f"list[{single[0]}]" in kinds:
        return HintType(single[0], many=True, optional=optional)
    return HintType("any", optional=optional)


def fields_of(hint: Any) -> dict[str, Any] | None:
    """Field -> hint of a TypedDict, dataclass or NamedTuple; None for other hints."""
    if not isinstance(hint, type):
        return None
    named_tuple = issubclass(hint, tuple) and hasattr(hint, "_fields")
    if typing.is_typeddict(hint) or named_tuple or dataclasses.is_dataclass(hint):
        return hints_of(hint)
    return None
