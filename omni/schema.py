"""The spec types as documents: JSON Schema for editors, and the tables of keys in docs/graph-files.md."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from typing import Any

import msgspec
from msgspec import inspect as types
from msgspec import structs

from omni.graph import NAME
from omni.load import type_words
from omni.port_types import ALL_TYPES
from omni.registry import find_kind, kind_names
from omni.spec import GraphSpec, InputSpec, StageSpec

REF = "#/$defs/{name}"
NULL = {"type": "null"}
BASE = {"type": "string", "description": "Graph file that this one is laid over; relative to this file."}


def graph_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of graph files, with all kinds of stage that are installed.

    A file with `base` may leave anything out, and null removes a key of the base.
    """
    kinds = {name: find_kind(name).spec_type for name in dict.fromkeys(kind_names())}
    _, whole = msgspec.json.schema_components((GraphSpec, *kinds.values()), ref_template=REF)
    for spec_type in _struct_types((GraphSpec, *kinds.values())):
        for key, text in field_docs(spec_type).items():
            if key in whole[spec_type.__name__]["properties"]:
                whole[spec_type.__name__]["properties"][key]["description"] = text
    whole["InputSpec"]["properties"]["type"]["enum"] = list(ALL_TYPES)
    del whole["StageSpec"]
    overlay = {f"{name}Overlay": _relaxed(schema) for name, schema in whole.items()}
    names = {name: spec_type.__name__ for name, spec_type in kinds.items()}
    whole["Stage"] = {**_by_kind(names), "required": ["kind"]}
    overlay["StageOverlay"] = {**_by_kind({name: f"{spec}Overlay" for name, spec in names.items()})}
    overlay["StageOverlay"]["allOf"].append(_without_kind([overlay[f"{spec}Overlay"] for spec in names.values()]))
    for definitions, suffix in ((whole, ""), (overlay, "Overlay")):
        _finish_graph(definitions[f"GraphSpec{suffix}"], suffix)
    overlay["GraphSpecOverlay"]["properties"]["base"] = BASE
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Omni graph",
        "type": "object",
        "if": {"required": ["base"]},
        "then": {"$ref": REF.format(name="GraphSpecOverlay")},
        "else": {"$ref": REF.format(name="GraphSpec")},
        "$defs": whole | overlay,
    }


def key_tables() -> str:
    """Markdown tables of all keys of the built-in and installed kinds: type, default, meaning."""
    parts = [_table("The file", GraphSpec, ()), _table("inputs.NAME", InputSpec, ())]
    parts += _tables("stages.NAME", "stages.NAME, every kind", StageSpec, ())
    for name in dict.fromkeys(kind_names()):
        title = f"stages.NAME, kind: {name}"
        parts += _tables("stages.NAME", title, find_kind(name).spec_type, structs.fields(StageSpec))
    return "\n".join(parts)


def field_docs(spec_type: type) -> dict[str, str]:
    """Field -> the text under it in the source, of a class and its bases; nothing where there is no source."""
    docs: dict[str, str] = {}
    for base in reversed(spec_type.__mro__):
        if not issubclass(base, msgspec.Struct) or base is msgspec.Struct:
            continue
        try:
            definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except OSError:
            continue
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = inspect.cleandoc(doc).replace("\n", " ")
    return docs


# JSON Schema ----------------------------------------------------------------------------------------------------


def _by_kind(names: dict[str, str]) -> dict[str, Any]:
    """A stage whose schema its `kind` chooses; an editor then tells the faults of that kind only."""
    chosen = [
        {
            "if": {"properties": {"kind": {"const": name}}, "required": ["kind"]},
            "then": {"$ref": REF.format(name=spec)},
        }
        for name, spec in names.items()
    ]
    return {"type": "object", "properties": {"kind": {"enum": list(names)}}, "allOf": chosen}


def _without_kind(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """A part of a stage whose kind the base says: any key that some kind has."""
    keys = dict.fromkeys(key for schema in schemas for key in schema["properties"])
    properties = {key: {"anyOf": [s["properties"][key] for s in schemas if key in s["properties"]]} for key in keys}
    return {"if": {"not": {"required": ["kind"]}}, "then": {"properties": properties, "additionalProperties": False}}


def _relaxed(schema: Any) -> Any:
    """The schema of something that is laid over another: nothing is required, null removes a key."""
    if isinstance(schema, list):
        return [_relaxed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    relaxed = {
        key: _relaxed(value) for key, value in schema.items() if key not in ("required", "properties", "default")
    }
    if "$ref" in schema:
        relaxed["$ref"] += "Overlay"
    if "properties" in schema:
        relaxed["properties"] = {key: {"anyOf": [_relaxed(s), NULL]} for key, s in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        relaxed["additionalProperties"] = {"anyOf": [_relaxed(schema["additionalProperties"]), NULL]}
    return relaxed


def _finish_graph(schema: dict[str, Any], suffix: str) -> None:
    """Put in what the types cannot say: names, the short form of inputs, stages by kind."""
    null = [NULL] if suffix else []
    short = {"enum": list(ALL_TYPES)}
    full = [{"$ref": REF.format(name=f"InputSpec{suffix}")}, *null]
    entries = {
        "inputs": {"anyOf": [short, *full]},
        "stages": {"anyOf": [{"$ref": REF.format(name="StageOverlay")}, NULL]} if suffix else {"$ref": "#/$defs/Stage"},
        "outputs": {"anyOf": [{"type": "string"}, *null]},
    }
    for key, entry in entries.items():
        mapping = {
            "type": "object",
            "propertyNames": {"pattern": f"^{NAME.pattern}$"},
            "additionalProperties": entry,
        }
        schema["properties"][key] = {**mapping, "type": ["object", "null"]} if suffix else mapping


def _struct_types(roots: tuple[type, ...]) -> list[type]:
    """All struct types that the roots mention, each once."""
    found: dict[type, None] = {}

    def visit(info: Any) -> None:
        if isinstance(info, types.StructType):
            if info.cls in found:
                return
            found[info.cls] = None
            for field in info.fields:
                visit(field.type)
        for name in ("type", "item_type", "key_type", "value_type"):
            if isinstance(getattr(info, name, None), types.Type):
                visit(getattr(info, name))
        for name in ("types", "item_types"):
            for member in getattr(info, name, ()):
                visit(member)

    for info in types.multi_type_info(roots):
        visit(info)
    return list(found)


# Tables ---------------------------------------------------------------------------------------------------------


def _tables(path: str, title: str, spec_type: type[msgspec.Struct], known: tuple[structs.FieldInfo, ...]) -> list[str]:
    """The table of a type and of the types inside it, without the fields in `known`."""
    told = [field.name for field in known]
    tables = [_table(title, spec_type, tuple(told))]
    for field in structs.fields(spec_type):
        inner = field.type
        if field.name not in told and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            tables += _tables(f"{path}.{field.name}", f"{path}.{field.name}", inner, ())
    return tables


def _table(title: str, spec_type: type[msgspec.Struct], left_out: tuple[str, ...]) -> str:
    docs = field_docs(spec_type)
    lines = [f"### {title}", "", str(spec_type.__doc__), "", "| key | value | default | meaning |", "|---|---|---|---|"]
    for field in structs.fields(spec_type):
        if field.name not in left_out:
            words = type_words(types.type_info(field.type)).replace("|", "\\|")
            meaning = docs.get(field.name, "").replace("|", "\\|")
            lines.append(f"| `{field.encode_name}` | {words} | {_default(field)} | {meaning} |")
    return "\n".join([*lines, ""])


def _default(field: structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
    plain = msgspec.to_builtins(value) if value is not msgspec.UNSET else None
    return f"`{json.dumps(plain)}`" if plain not in (None, "", {}, []) else ""
