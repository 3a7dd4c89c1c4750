"""Graph files, specs and plain documents -> checked graphs, with every mistake at its place, all at once."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import inspect, structs

from omni.document import Document, read_document, read_file
from omni.errors import GraphError, Mistake
from omni.graph import Graph, check_graph, kind_or_fault, nearest
from omni.registry import kind_names
from omni.spec import GraphSpec, InputSpec, Source, StageSpec
from omni.tree import Notes, Value, join_path, show


class LoadedGraph(msgspec.Struct, frozen=True):
    """A graph and what it was read from."""

    spec: GraphSpec
    graph: Graph
    path: str | None
    """The graph file as the caller named it; None when the graph came as an object."""
    base_dir: str
    """Absolute folder where relative model paths start."""
    document: dict[str, Any]
    """The plain document after `base:` and `--set`; `load_graph(document, base_dir=...)` gives the same graph."""


def load_graph(
    graph: str | os.PathLike[str] | GraphSpec | Mapping[str, Any],
    overrides: Sequence[str] = (),
    base_dir: str | os.PathLike[str] | None = None,
) -> LoadedGraph:
    """Read and check a graph: a YAML file, a GraphSpec, or a plain document.

    `overrides` are `path=value` texts, as of `--set`. `base_dir` is where relative paths start; left out, it is the
    file's folder, or the current folder for a graph that is no file. Raises GraphError with all mistakes.
    """
    path = None
    if isinstance(graph, (str, os.PathLike)):
        path = os.fspath(graph)
        folder = os.path.abspath(base_dir or os.path.dirname(path))
        document = read_file(path, tuple(overrides))
    else:
        folder = os.path.abspath(base_dir or ".")
        document = read_document(_plain(graph), folder, tuple(overrides))
    spec, checked = _check(document, folder)
    return LoadedGraph(spec, checked, path, folder, document.root.plain())


def _plain(graph: GraphSpec | Mapping[str, Any]) -> Any:
    if isinstance(graph, GraphSpec):
        try:
            return msgspec.to_builtins(graph)
        except (TypeError, ValueError, RecursionError) as error:
            raise GraphError((Mistake("", f"the graph holds a value that no file can hold: {error}"),)) from error
    return dict(graph) if isinstance(graph, Mapping) else graph


def _check(document: Document, base_dir: str) -> tuple[GraphSpec, Graph]:
    """The spec and the graph of a document. Raises GraphError."""
    notes = Notes()
    spec, unclear = _Converter(notes).graph(document.root)
    mistakes = [*document.mistakes, *notes.mistakes]
    graph = None
    if spec.stages or not mistakes:
        graph, faults = check_graph(spec, base_dir, unclear)
        mistakes += [document.root.find(fault.path).mistake(fault.path, fault.message) for fault in faults]
    if mistakes or graph is None:
        raise GraphError(tuple(sorted(mistakes, key=lambda mistake: (mistake.file, mistake.line, mistake.column))))
    return spec, graph


class _Bad:
    """What conversion gives for a value that is wrong."""


_BAD = _Bad()


class _Converter:
    """Converts trees to spec types; faults are noted and conversion goes on."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def graph(self, root: Value) -> tuple[GraphSpec, frozenset[str]]:
        """The graph as far as it can be made out, and the stages that have faults."""
        fields = self.fields(root, GraphSpec, "")
        inputs = {n: InputSpec(type="any") if s is _BAD else s for n, s in _entries(fields, "inputs").items()}
        outputs = {n: s for n, s in _entries(fields, "outputs").items() if s is not _BAD}
        stages = _entries(fields, "stages")
        unclear = frozenset(name for name, stage in stages.items() if stage is _BAD)
        written = root.entry("stages") or root
        stages |= {name: StageSpec(inputs=_clear_inputs(written.entry(name))) for name in unclear}
        plain = {key: fields[key] for key in ("name", "description") if isinstance(fields.get(key), str)}
        return GraphSpec(inputs=inputs, stages=stages, outputs=outputs, **plain), unclear

    def convert(self, value: Value, wanted: Any, path: str) -> Any:
        """`value` as the type `wanted`, or _BAD."""
        kind = _matching(value, wanted)
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if _is_struct(kind):
            return self.stage(value, path) if kind is StageSpec else self.struct(value, kind, path)
        if origin is dict and isinstance(value.content, dict):
            entries = value.content.items()
            return {key: self.convert(item, args[1], join_path(path, key)) for key, item in entries}
        if origin is list and isinstance(value.content, list):
            items = [self.convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value.content)]
            return _BAD if any(item is _BAD for item in items) else items
        try:
            return msgspec.convert(value.plain(), kind)
        except (msgspec.ValidationError, OverflowError):
            return self.wrong(value, wanted, path)

    def wrong(self, value: Value, wanted: Any, path: str) -> _Bad:
        field, tags = _tags(wanted)
        if field and isinstance(value.content, dict):
            return self.wrong_tag(value, field, tags, path)
        info = inspect.type_info(wanted)
        near = nearest(value.content, _choices(info)) if isinstance(value.content, str) else ""
        self.notes.add(value.place, path, f"expected {type_words(info)}, got {show(value.content)}{near}")
        return _BAD

    def wrong_tag(self, value: Value, field: str, tags: list[str], path: str) -> _Bad:
        tag = value.entry(field)
        if tag is None:
            self.notes.add(value.key_place, path, f"missing key '{field}' (one of: {', '.join(tags)})")
        else:
            told = f"expected one of {', '.join(tags)}, got {show(tag.content)}{nearest(str(tag.content), tags)}"
            self.notes.add(tag.place, join_path(path, field), told)
        return _BAD

    def stage(self, value: Value, path: str) -> Any:
        """A stage's spec, of the type that its kind says."""
        tag = value.entry("kind")
        if not isinstance(value.content, dict):
            self.notes.add(value.place, path, f"expected a mapping with 'kind', got {show(value.content)}")
        elif tag is None:
            self.notes.add(value.key_place, path, f"missing key 'kind' (one of: {', '.join(kind_names())})")
        elif not isinstance(tag.content, str):
            self.wrong(tag, str, f"{path}.kind")
        elif isinstance(kind := kind_or_fault(tag.content), str):
            self.notes.add(tag.place, f"{path}.kind", kind)
        else:
            return self.struct(value, kind.spec_type, path)
        return _BAD

    def struct(self, value: Value, kind: type[msgspec.Struct], path: str) -> Any:
        """An instance of the struct type `kind`, or _BAD when anything in it is wrong."""
        if not isinstance(value.content, dict):
            return self.wrong(value, kind, path)
        before = len(self.notes.mistakes)
        fields = self.fields(value, kind, path)
        if len(self.notes.mistakes) > before:
            return _BAD
        try:
            return kind(**fields)
        except (ValueError, TypeError) as error:
            self.notes.add(value.key_place, path, str(error))
            return _BAD

    def fields(self, value: Value, kind: type[msgspec.Struct], path: str) -> dict[str, Any]:
        """Field name -> converted value or _BAD; unknown and missing keys are noted."""
        content = value.content if isinstance(value.content, dict) else {}
        fields = {field.encode_name: field for field in structs.fields(kind)}
        tag_field = kind.__struct_config__.tag_field
        allowed = [*([tag_field] if tag_field else []), *fields, *(["base"] if kind is GraphSpec else [])]
        for key, item in content.items():
            if key not in allowed:
                told = f"unknown key{nearest(key, allowed)} (allowed: {', '.join(sorted(allowed))})"
                self.notes.add(item.key_place, join_path(path, key), told)
        tag = content.get(tag_field) if tag_field else None
        if tag is not None and tag.content != kind.__struct_config__.tag:
            self.wrong_tag(value, str(tag_field), [str(kind.__struct_config__.tag)], path)
        for key, field in fields.items():
            if field.required and key not in content:
                self.notes.add(value.key_place, path, f"missing key '{key}'")
        return {
            field.name: self.convert(content[key], field.type, join_path(path, key))
            for key, field in fields.items()
            if key in content
        }


def _entries(fields: dict[str, Any], key: str) -> dict[str, Any]:
    entries = fields.get(key)
    return entries if isinstance(entries, dict) else {}


def _clear_inputs(stage: Value | None) -> dict[str, Source]:
    """What can be read of a faulty stage's `inputs`, so that its edges still count."""
    inputs = stage.entry("inputs") if stage is not None else None
    if inputs is None or not isinstance(inputs.content, dict):
        return {}
    entries = _Converter(Notes()).convert(inputs, dict[str, Source], "")
    return {port: source for port, source in entries.items() if source is not _BAD}


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _matching(value: Value, wanted: Any) -> Any:
    """The member of a union that fits the value's shape; other types, and unions of scalars, stay."""
    origin = typing.get_origin(wanted)
    if origin is typing.Annotated:
        inner = typing.get_args(wanted)[0]
        matching = _matching(value, inner)
        return wanted if matching is inner and not _is_struct(inner) else matching
    if origin not in (typing.Union, types.UnionType):
        return wanted
    members = typing.get_args(wanted)
    if isinstance(value.content, list):
        return next((member for member in members if typing.get_origin(member) is list), wanted)
    if isinstance(value.content, dict):
        found = [member for member in members if _is_struct(member)]
        tagged = [member for member in found if _tag_fits(value.content, member)]
        mappings = [member for member in members if typing.get_origin(member) is dict]
        return (tagged or (found if len(found) == 1 else []) or mappings or [wanted])[0]
    return wanted


def _tag_fits(content: dict[str, Value], kind: Any) -> bool:
    config = kind.__struct_config__
    return config.tag_field in content and content[config.tag_field].content == config.tag


def _tags(wanted: Any) -> tuple[str, list[str]]:
    """The key that tells the members of a union apart, and its values; empty for other types."""
    configs = [kind.__struct_config__ for kind in typing.get_args(wanted) if _is_struct(kind)]
    return next((config.tag_field or "" for config in configs), ""), [str(config.tag) for config in configs]


def _choices(info: inspect.Type) -> list[str]:
    """Texts that a type allows, when it allows only some."""
    match info:
        case inspect.LiteralType():
            return [str(value) for value in info.values]
        case inspect.UnionType():
            return [choice for member in info.types for choice in _choices(member)]
        case inspect.Metadata():
            return _choices(info.type)
    return []


def type_words(info: inspect.Type) -> str:
    """A type in the words of those who write YAML."""
    match info:
        case inspect.Metadata():
            told = (info.extra_json_schema or {}).get("description")
            return str(told) if told else type_words(info.type)
        case inspect.StrType():
            return f"text matching {info.pattern}" if info.pattern else "text"
        case inspect.IntType() | inspect.FloatType():
            signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
            bounds = [f"{sign} {limit:g}" for key, sign in signs.items() if (limit := getattr(info, key)) is not None]
            noun = "a whole number" if isinstance(info, inspect.IntType) else "a number"
            return " ".join([noun, " and ".join(bounds)]).strip()
        case inspect.BoolType():
            return "true or false"
        case inspect.NoneType():
            return "null"
        case inspect.LiteralType():
            return f"one of {', '.join(str(value) for value in info.values)}"
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType():
            return f"a list of {type_words(info.item_type).removeprefix('a ')}"
        case inspect.DictType() | inspect.StructType():
            return "a mapping"
        case inspect.UnionType():
            return " or ".join(type_words(member) for member in info.types if not isinstance(member, inspect.NoneType))
    return "any value"
