"""What a diffusers pipeline takes and gives, read from its source text: neither diffusers nor torch is imported.

A class is found through the tables of `diffusers/pipelines/__init__.py`; its `__call__` is parsed with `ast`. Classes
from elsewhere (custom code) are read with `inspect` once they are loaded.
"""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from omni.registry import Port

OWNED = {
    "generator": "Omni makes it from the request's seed",
    "return_dict": "Omni reads the result by name",
    "output_type": "Omni chooses the type that its output ports need",
}
"""Parameters that a graph may not set, with the reason. Callbacks belong to them too (`owned_reason`)."""

OUTPUT_PORTS = {
    "images": ("images", Port("list[image]")),
    "image": ("images", Port("list[image]")),
    "rgb": ("images", Port("list[image]")),
    "prediction": ("images", Port("list[image]")),
    "frames": ("video", Port("video")),
    "video": ("video", Port("video")),
    "audios": ("audio", Port("audio")),
    "audio": ("audio", Port("audio")),
    "sound": ("audio", Port("audio")),
}
"""Field of a pipeline's output -> the stage's output port, the main one first."""

ANY_OUTPUTS = dict(OUTPUT_PORTS.values())
"""Output ports of a pipeline that is not known yet."""

SCALARS: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
_NONE_WORDS = {"None", "NoneType", "Optional", "Union", "typing", "class"}
_LIST_WORDS = {"list", "List", "tuple", "Tuple", "Sequence"}
_PLAIN_WORDS = {"int", "float", "bool", "dict", "Dict", "Any", *_LIST_WORDS}
_NO_PIPELINE = re.compile(r"^Auto|Output$|^DiffusionPipeline$")


class Parameter(msgspec.Struct, frozen=True):
    """One parameter of a pipeline's call."""

    name: str
    port: Port
    scalars: tuple[str, ...] = ()
    """Names from SCALARS when nothing but these (and None) is allowed; empty: not known."""
    default: str | float | bool | None = None
    """The default where it is a plain constant."""


class Signature(msgspec.Struct, frozen=True):
    """A pipeline's call: what may be given, and which ports its output has."""

    pipeline: str
    parameters: dict[str, Parameter]
    """Without the parameters that Omni owns."""
    outputs: dict[str, Port]
    accepts: tuple[str, ...]
    """Names from OWNED that the call has."""


def owned_reason(name: str) -> str:
    """Why the graph may not set the parameter `name`; empty when it may."""
    return "Omni reports progress and aborts itself" if "callback" in name else OWNED.get(name, "")


def value_fault(parameter: Parameter, value: Any) -> str:
    """What is wrong with a text or plain value for `parameter`; empty when it fits or cannot be told."""
    if value is None:
        return ""
    if parameter.scalars:
        allowed = tuple(SCALARS[name] for name in parameter.scalars)
        fits = isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
        return "" if fits else f"must be {' or '.join(parameter.scalars)}, not {value!r:.60}"
    if parameter.port.type == "text":
        items = value if isinstance(value, (list, tuple)) and parameter.port.many else [value]
        return "" if all(isinstance(item, str) for item in items) else f"must be text, not {value!r:.60}"
    return ""


@cache
def pipeline_names() -> tuple[str, ...]:
    """All pipeline classes of the installed diffusers; empty when it is not installed."""
    return tuple(sorted(name for name in _folders() if "Pipeline" in name and not _NO_PIPELINE.search(name)))


@cache
def find_signature(pipeline: str) -> Signature | None:
    """The signature of the diffusers class `pipeline`; None when diffusers has no such class."""
    found = _find_class(pipeline)
    call = _find_call(found) if found else None
    if call is None:
        return None
    arguments = [*call.args.posonlyargs, *call.args.args, *call.args.kwonlyargs]
    positional = [*call.args.posonlyargs, *call.args.args]
    defaults: dict[str, ast.expr | None] = dict(
        zip([a.arg for a in positional[len(positional) - len(call.args.defaults) :]], call.args.defaults, strict=True)
    )
    defaults.update(zip([a.arg for a in call.args.kwonlyargs], call.args.kw_defaults, strict=True))
    parameters = {}
    for argument in arguments:
        default = defaults.get(argument.arg)
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        constant = default.value if isinstance(default, ast.Constant) else None
        parameters[argument.arg] = _parameter(argument.arg, annotation, default is None, constant)
    return _signature(pipeline, parameters, _outputs(call))


def signature_of(pipeline_class: type[Any]) -> Signature:
    """The signature of a loaded class: from its source when diffusers has it, else by introspection."""
    known = find_signature(pipeline_class.__name__) if pipeline_class.__module__.startswith("diffusers.") else None
    return known or inspect_signature(pipeline_class)


def inspect_signature(pipeline_class: type[Any]) -> Signature:
    """The signature of a loaded class by introspection; its outputs stay open."""
    parameters = {}
    for name, found in inspect.signature(pipeline_class.__call__).parameters.items():
        if found.kind in (found.VAR_POSITIONAL, found.VAR_KEYWORD):
            continue
        annotation = "" if found.annotation is found.empty else _annotation_text(found.annotation)
        constant = found.default if isinstance(found.default, (str, int, float, bool)) else None
        parameters[name] = _parameter(name, annotation, found.default is found.empty, constant)
    return _signature(pipeline_class.__name__, parameters, ANY_OUTPUTS)


def _signature(pipeline: str, parameters: dict[str, Parameter], outputs: dict[str, Port]) -> Signature:
    return Signature(
        pipeline=pipeline,
        parameters={n: p for n, p in parameters.items() if n != "self" and not owned_reason(n)},
        outputs=outputs,
        accepts=tuple(name for name in OWNED if name in parameters),
    )


# Types ----------------------------------------------------------------------------------------------------------


def _parameter(name: str, annotation: str, required: bool, constant: Any) -> Parameter:
    words = set(re.findall(r"[A-Za-z_]\w*", annotation)) - _NONE_WORDS
    port_type = _port_type(name, words)
    many = port_type in ("image", "tensor", "audio") or (port_type == "text" and bool(words & _LIST_WORDS or not words))
    scalars = tuple(sorted(words)) if words and words <= SCALARS.keys() else ()
    return Parameter(name, Port(port_type, required=required, many=many), scalars, constant)


def _port_type(name: str, words: set[str]) -> str:
    if words & {"int", "float", "bool"} and words <= _PLAIN_WORDS:
        return "json"
    if re.search(r"(^|_)(embeds?|latents?)(_|$)", name):
        return "tensor"
    if re.search(r"(^|_)prompt(_\d+)?$", name):
        return "text"
    if re.search(r"(^|_)video$", name):
        return "video"
    if re.search(r"(^|_)audio$", name):
        return "audio"
    if re.search(r"(^|_)images?$", name) or words & {"PipelineImageInput", "Image"}:
        return "image"
    if "str" in words and words <= {"str", *_LIST_WORDS}:
        return "text"
    if any(word.endswith("Tensor") for word in words):
        return "tensor"
    return "json" if words <= _PLAIN_WORDS | {"str"} else "any"


def _annotation_text(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


# Source text ----------------------------------------------------------------------------------------------------


@cache
def _root() -> Path | None:
    spec = find_spec("diffusers")  # of a top-level package: finds it, imports nothing
    return Path(spec.origin).parent if spec and spec.origin else None


@cache
def _folders() -> dict[str, str]:
    """Exported class -> the folder or module under diffusers/pipelines that defines it."""
    root = _root()
    if root is None:
        return {}
    folders: dict[str, str] = {}
    for node in ast.walk(ast.parse((root / "pipelines" / "__init__.py").read_text(encoding="utf-8"))):
        match node:
            case ast.Assign(targets=[ast.Subscript(value=ast.Name("_import_structure"), slice=key)], value=names):
                pass
            case ast.Call(
                func=ast.Attribute(value=ast.Subscript(value=ast.Name("_import_structure"), slice=key), attr="extend"),
                args=[names],
            ):
                pass
            case _:
                continue
        folders.update(dict.fromkeys(ast.literal_eval(names), ast.literal_eval(key)))
    return folders


@cache
def _find_class(name: str) -> ast.ClassDef | None:
    """The definition of the exported class `name`."""
    root, folder = _root(), _folders().get(name)
    if root is None or folder is None:
        return None
    place = root / "pipelines" / folder
    definition = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        text = path.read_text(encoding="utf-8")
        if definition.search(text):
            return next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name)
    return None


def _find_call(definition: ast.ClassDef) -> ast.FunctionDef | None:
    """The class's own `__call__`, or the one it inherits from another exported pipeline."""
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            return node
    bases = (_find_class(base.id) for base in definition.bases if isinstance(base, ast.Name))
    return next((call for base in bases if base and (call := _find_call(base))), None)


def _outputs(call: ast.FunctionDef) -> dict[str, Port]:
    """Ports for the fields of the output object that `call` returns; all media when that cannot be told."""
    fields: list[str] = []
    for node in ast.walk(call):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
            fields += [keyword.arg for keyword in node.value.keywords if keyword.arg]
    found = dict(OUTPUT_PORTS[field] for field in fields if field in OUTPUT_PORTS)
    if found:
        return {port: kind for port, kind in ANY_OUTPUTS.items() if port in found}
    tensors = {field: Port("any") for field in fields if re.search(r"embed", field)}
    return tensors or ANY_OUTPUTS
