"""Finds the user's function and reads from its signature which ports it has."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from typing import Any, Literal

import msgspec

from omni.errors import Mistake
from omni.graph import nearest
from omni.port_types import ALL_TYPES, base_type
from omni.registry import Port, Ports
from omni.spec import PORT_TYPES, FunctionSpec
from stages.function.hints import MEDIA, fields_of, hint_type, hints_of

IMPORT_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    SystemExit,
    TypeError,
    ValueError,
)
"""What running the user's module for the first time may raise."""
SEED = "seed"
"""A parameter of this name gets the request's seed, unless the graph gives it."""

_import_lock = threading.Lock()


class Function(msgspec.Struct, frozen=True):
    """A user's function with its ports."""

    function: Callable[..., Any]
    ports: Ports
    returns: Literal["value", "fields", "nothing"]
    """What its result is: the value of the one output, an object with a field for each output, or not used."""
    is_async: bool
    wants_seed: bool
    needs_none: frozenset[str] = frozenset()
    """Parameters without a default that take None when there is nothing for them."""
    positional: tuple[str, ...] = ()
    """Parameters that can only be given by position, in order."""


class FunctionFault(ValueError):
    """The graph's `function` stage does not fit its function; carries the mistakes."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__(mistakes)
        self.mistakes = mistakes


def find_function(spec: FunctionSpec, base_dir: str) -> Function:
    """Import the function that `spec.call` names and read its ports. Raises FunctionFault."""
    function = _import_callable(spec.call, base_dir)
    try:
        signature, hints = inspect.signature(function), hints_of(_annotated(function))
    except (ArithmeticError, AttributeError, LookupError, NameError, SyntaxError, TypeError, ValueError) as error:
        fault = f"the signature of '{spec.call}' cannot be read: {error}; wrap it in a function with plain type hints"
        raise FunctionFault([Mistake("call", fault)]) from error
    parameters = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    open_inputs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    mistakes = _check_names(spec, tuple(parameters), open_inputs) + _check_types(spec)
    if mistakes:
        raise FunctionFault(mistakes)
    wants_seed = SEED in parameters and SEED not in spec.arguments and SEED not in spec.inputs
    inputs = {
        name: _input_port(spec, name, hints.get(name), parameters[name])
        for name in parameters
        if name not in spec.arguments and not (wants_seed and name == SEED)
    }
    if open_inputs:
        inputs |= {name: Port(port_type) for name, port_type in spec.input_types.items() if name not in inputs}
    outputs, returns = _outputs(spec, hints.get("return", Any), "return" in hints)
    return Function(
        function=function,
        ports=Ports(inputs, outputs, open_inputs),
        returns=returns,
        is_async=inspect.iscoroutinefunction(_annotated(function)),
        wants_seed=wants_seed,
        needs_none=frozenset(
            name
            for name, p in parameters.items()
            if p.default is p.empty and name in inputs and not inputs[name].required
        ),
        positional=tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY),
    )


@contextlib.contextmanager
def module_path(base_dir: str) -> Iterator[None]:
    """While it lasts, modules are also looked for in the graph file's folder and in the current one, in this order."""
    with _import_lock:
        before = list(sys.path)
        sys.path[:0] = _search_folders(base_dir)
        try:
            yield
        finally:
            sys.path[:] = before


def add_module_path(base_dir: str) -> None:
    """From now on, imports in this process are also looked for in these folders, after all others.

    For the process that hosts a function: what it imports while it runs is found too.
    """
    with _import_lock:
        sys.path.extend(folder for folder in _search_folders(base_dir) if folder not in sys.path)


def _search_folders(base_dir: str) -> list[str]:
    return list(dict.fromkeys((os.path.abspath(base_dir), os.getcwd())))


def _import_callable(call: str, base_dir: str) -> Callable[..., Any]:
    module_name, _, name = call.partition(":")
    _refuse_other_module(module_name, base_dir)
    try:
        with module_path(base_dir):
            importlib.invalidate_caches()
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _fault(f"importing '{module_name}' failed: {error}; install what it needs") from error
        raise _fault(_no_module(module_name, error.name, base_dir)) from error
    except IMPORT_FAULTS as error:
        raise _fault(f"importing '{module_name}' failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _fault(f"module '{module_name}' has no '{name}'{nearest(name, names) or _listed(names)}")
    function: Any = getattr(module, name)
    if not callable(function) or inspect.isclass(function):
        what = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        raise _fault(f"'{call}' is {what}; name a function")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise _fault(f"'{call}' is a generator; return a list instead")
    return function  # type: ignore[no-any-return]


def _refuse_other_module(module_name: str, base_dir: str) -> None:
    """A module of the same name may be loaded from elsewhere, and would silently be taken for the graph's own."""
    top = module_name.partition(".")[0]
    loaded, own = sys.modules.get(top), PathFinder.find_spec(top, [os.path.abspath(base_dir)])
    if loaded is None or own is None or not own.origin:
        return
    origin = str(getattr(loaded.__spec__, "origin", None) or "elsewhere")
    if not (os.path.exists(origin) and os.path.samefile(origin, own.origin)):
        raise _fault(f"{own.origin} cannot be imported: '{top}' is loaded from {origin} already; rename one of them")


def _no_module(module_name: str, missing: str, base_dir: str) -> str:
    parent, _, leaf = missing.rpartition(".")
    folders = list(getattr(sys.modules.get(parent), "__path__", [])) if parent else _search_folders(base_dir)
    close = nearest(leaf, [module.name for module in pkgutil.iter_modules(folders)])
    return f"there is no module '{missing}' in {', '.join(folders)} or among the installed packages{close}"


def _annotated(function: Callable[..., Any]) -> Any:
    """The plain function that carries the hints: below decorators, or the `__call__` of an object."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    return function if inspect.isroutine(function) else type(function).__call__


def _check_names(spec: FunctionSpec, names: tuple[str, ...], open_inputs: bool) -> list[Mistake]:
    mistakes = [
        Mistake(f"{key}.{name}", f"'{spec.call}' has no parameter '{name}'{nearest(name, names) or _listed(names)}")
        for key in ("arguments", "input_types")
        for name in getattr(spec, key)
        if name not in names and not open_inputs
    ]
    return mistakes + [
        Mistake(f"arguments.{name}", f"'{name}' is given by inputs.{name} too; remove one of them")
        for name in spec.arguments
        if name in spec.inputs
    ]


def _check_types(spec: FunctionSpec) -> list[Mistake]:
    return [
        Mistake(
            f"{key}.{name}",
            f"unknown type '{kind}'{nearest(kind, ALL_TYPES)} (allowed: {', '.join(PORT_TYPES)}, and list[T] of each)",
        )
        for key in ("input_types", "outputs")
        for name, kind in getattr(spec, key).items()
        if kind not in ALL_TYPES
    ]


def _input_port(spec: FunctionSpec, name: str, hint: Any, parameter: inspect.Parameter) -> Port:
    told = hint_type(Any if hint is None else hint)
    kind = spec.input_types.get(name, told.type)
    many = kind == "json" or (told.many and name not in spec.input_types)
    required = parameter.default is parameter.empty and not told.optional
    return Port(kind, required=required, many=many, each=kind in MEDIA and not many)


def _has_no_default(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.default is parameter.empty


def _outputs(
    spec: FunctionSpec, hint: Any, hinted: bool
) -> tuple[dict[str, Port], Literal["value", "fields", "nothing"]]:
    fields = fields_of(hint)
    if spec.outputs:
        several = len(spec.outputs) > 1 or fields is not None
        return {name: Port(kind) for name, kind in spec.outputs.items()}, "fields" if several else "value"
    if fields is not None:
        return {name: Port(hint_type(field).type) for name, field in fields.items()}, "fields"
    if hinted and hint in (None, type(None)):
        return {}, "nothing"
    kind = hint_type(hint).type
    return {"images" if kind == "list[image]" else base_type(kind): Port(kind)}, "value"


def _fault(message: str) -> FunctionFault:
    return FunctionFault([Mistake("call", message)])


def _listed(names: Any) -> str:
    return f"; it has {', '.join(sorted(names))}" if names else ""
