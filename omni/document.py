"""Graph files as trees that know their places: safe YAML reading, `base:` inheritance, `--set` overrides.

Scalars follow YAML 1.2, as editors do: `no` and `16:9` are text, `1e-4` is a number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import yaml

from omni.errors import GraphError, Mistake

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000
MAX_DEPTH = 32
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(~|null|Null|NULL)?")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SCALARS = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}
"""YAML type -> what its plain scalars look like, in order of trial."""


class Place(msgspec.Struct, frozen=True):
    """Where something stands: 1-based line and column, or line 0 when `file` is not a file."""

    file: str = ""
    line: int = 0
    column: int = 0

    def mistake(self, path: str, message: str) -> Mistake:
        """A mistake at this place."""
        return Mistake(path, message, self.file, self.line, self.column)


class Value(msgspec.Struct, frozen=True):
    """A value of a document and where it and its key stand."""

    content: dict[str, Value] | list[Value] | str | int | float | bool | None
    place: Place = Place()
    key_place: Place = Place()

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.content, dict):
            return {key: value.plain() for key, value in self.content.items()}
        return [item.plain() for item in self.content] if isinstance(self.content, list) else self.content

    def find(self, path: str) -> Place:
        """Where `path` (`stages.draw.inputs.images[1]`) stands; the nearest thing around it when it is not there."""
        here, rest = self, path
        while rest:
            if isinstance(here.content, list) and (match := re.match(r"\[(\d+)\]\.?", rest)):
                if int(match[1]) >= len(here.content):
                    break
                here, rest = here.content[int(match[1])], rest[match.end() :]
                continue
            keys = here.content if isinstance(here.content, dict) else {}
            fits = [key for key in keys if key and (rest == key or rest.startswith((f"{key}.", f"{key}[")))]
            if not fits:
                break
            key = max(fits, key=len)
            here, rest = keys[key], rest[len(key) :].removeprefix(".")
        return here.key_place if rest or isinstance(here.content, dict) else here.place


class Document(msgspec.Struct, frozen=True):
    """A graph's merged tree, and the mistakes of writing that do not hinder further checks."""

    root: Value
    mistakes: list[Mistake]


def read_file(path: str, overrides: tuple[str, ...] = ()) -> Document:
    """The document of a graph file with its bases and overrides. Raises GraphError when it cannot be read at all."""
    reader = _Reader(os.path.dirname(os.path.abspath(path)))
    return reader.finish(reader.file(path, (), Place(path)), overrides)


def read_plain(content: Any, base_dir: str, overrides: tuple[str, ...] = ()) -> Document:
    """The document of a graph that is plain data already; `base_dir` is where its `base` is looked for."""
    reader = _Reader(os.path.abspath(base_dir))
    root = _normalised(reader.plain(content, "", 0))
    return reader.finish(reader.with_base(root, "", base_dir, ()), overrides)


def dump(document: dict[str, Any]) -> str:
    """A plain document as YAML text that reads back as the same document."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def join_path(path: str, key: str) -> str:
    """The path of `key` below `path`; a key that would break the line is quoted."""
    shown = key if key and key.isprintable() and len(key) <= 60 else show(key)
    return f"{path}.{shown}" if path else shown


def show(content: Any) -> str:
    """A value in a message: short, on one line, in YAML's words."""
    if isinstance(content, dict):
        return "a mapping"
    if isinstance(content, list):
        return "a list"
    if content is None or isinstance(content, bool):
        return {None: "null", True: "true", False: "false"}[content]
    if isinstance(content, int) and abs(content) >= 10**40:
        return "a huge number"
    text = ascii(content) if isinstance(content, str) and not content.isprintable() else repr(content)
    return text if len(text) <= 60 else f"{text[:56]}...{text[0]}"


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 reads as a number, too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _type in ("int", "float"):
    _Dumper.add_implicit_resolver(_TAG + _type, re.compile(rf"({_SCALARS[_type].pattern})\Z"), list("-+.0123456789"))


class _Reader:
    def __init__(self, top_dir: str) -> None:
        self.top_dir = top_dir
        self.mistakes: list[Mistake] = []
        self.num_values = 0

    def finish(self, root: Value, overrides: tuple[str, ...]) -> Document:
        for override in overrides:
            root = _merge(root, self.override(override))
        return Document(root, self.mistakes)

    def fail(self, place: Place, path: str, message: str) -> GraphError:
        return GraphError((*self.mistakes, place.mistake(path, message)))

    # Files and their bases ----------------------------------------------------------------------------------------

    def file(self, path: str, readers: tuple[str, ...], named_at: Place) -> Value:
        """The tree of a file, merged over its bases; `readers` are the files that led here."""
        real = os.path.realpath(path)
        if real in readers:
            chain = [os.path.basename(name) for name in (*readers[readers.index(real) :], real)]
            raise self.fail(named_at, "base", f"the bases form a cycle: {' -> '.join(chain)}")
        root = self.yaml(self.text(path, named_at, "base" if readers else ""), path)
        if not isinstance(root.content, dict):
            what = "is empty" if root.content is None else f"holds {show(root.content)}"
            raise self.fail(Place(path, 1, 1), "", f"the file {what}; a graph is a mapping with 'stages'")
        folder = os.path.dirname(path)
        root = _normalised(root)
        if readers:
            root = self.with_moved_models(root, folder)
        return self.with_base(root, path, folder, (*readers, real))

    def with_base(self, root: Value, path: str, folder: str, readers: tuple[str, ...]) -> Value:
        if not isinstance(root.content, dict) or "base" not in root.content:
            return root
        base = root.content["base"]
        if not isinstance(base.content, str) or not base.content:
            raise self.fail(base.place, "base", f"expected the path of a graph file, got {show(base.content)}")
        own = Value({key: value for key, value in root.content.items() if key != "base"}, root.place, root.key_place)
        below = self.file(os.path.join(folder, os.path.expanduser(base.content)), readers or (path,), base.place)
        return _merge(below, own)

    def text(self, path: str, named_at: Place, key: str) -> str:
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise self.fail(named_at, key, f"cannot read {show(path)}: {reason}{_near_files(path)}") from error
        if len(data) > MAX_BYTES:
            raise self.fail(Place(path), "", f"the file is larger than {MAX_BYTES >> 20} MiB; is it a graph?")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            column = error.start - data.rfind(b"\n", 0, error.start)
            raise self.fail(Place(path, line, column), "", "the file is not UTF-8 text; save it as UTF-8") from error

    def with_moved_models(self, root: Value, folder: str) -> Value:
        """A model folder beside a base file is named from the top file's folder, where all model paths start."""
        stages = root.content.get("stages") if isinstance(root.content, dict) else None
        if stages is None or not isinstance(stages.content, dict):
            return root
        moved = {}
        for name, stage in stages.content.items():
            model = stage.content.get("model") if isinstance(stage.content, dict) else None
            if model is not None and isinstance(model.content, str) and "\0" not in model.content:
                found = os.path.join(folder, model.content)
                if found != model.content and os.path.isdir(found):
                    there = os.path.relpath(os.path.realpath(found), os.path.realpath(self.top_dir))
                    stage = _with(stage, "model", Value(there, model.place, model.key_place))
            moved[name] = stage
        return _with(root, "stages", Value(moved, stages.place, stages.key_place))

    def override(self, text: str) -> Value:
        """The tree that `path=value` lays over the document."""
        path, equals, value = text.partition("=")
        shown = text if text.isprintable() and len(text) <= 80 else f"{ascii(text[:76])[1:-1]}..."
        place = Place(f"--set {shown}")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise self.fail(place, "", "expected path=value, for example stages.draw.call.num_inference_steps=8")
        if keys[0] == "base":
            raise self.fail(place, "base", "can only be set in a file")
        try:
            tree = self.yaml(value, place.file)
        except GraphError as error:
            fault = f"{error.mistakes[-1].message}; put text with special characters in quotes"
            raise self.fail(place, path.strip(), fault) from error
        tree = _placed(tree, place)
        for key in reversed(keys):
            tree = Value({key: tree}, place, place)
        return _normalised(tree)

    # YAML text and plain data to trees ----------------------------------------------------------------------------

    def yaml(self, text: str, file: str) -> Value:
        """The tree of one YAML document."""
        return _YamlReader(self, text, file).read()

    def plain(self, content: Any, path: str, depth: int) -> Value:
        """The tree of plain data, without places."""
        self.count(Place(), path, depth)
        if isinstance(content, dict):
            tree = {}
            for key, value in content.items():
                if isinstance(key, str):
                    tree[key] = self.plain(value, join_path(path, key), depth + 1)
                else:
                    self.mistakes.append(Mistake(path, f"keys must be text, got {show(key)}"))
            return Value(tree)
        if isinstance(content, (list, tuple)):
            return Value([self.plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(content)])
        if content is None or isinstance(content, (str, int, float)):
            return Value(content)
        self.mistakes.append(Mistake(path, f"a value of type {type(content).__name__} cannot be written in a graph"))
        return Value(None)

    def count(self, place: Place, path: str, depth: int) -> None:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise self.fail(place, path, f"the graph has more than {MAX_VALUES} values, aliases counted each time")
        if depth > MAX_DEPTH:
            raise self.fail(place, path, f"values are nested more than {MAX_DEPTH} deep")


class _YamlReader:
    """Builds the tree of one YAML text from the parser's events: no recursion in C, no constructors, no tags."""

    def __init__(self, reader: _Reader, text: str, file: str) -> None:
        self.reader = reader
        self.text = text
        self.name = file
        self.anchors: dict[str, Value] = {}
        self.events: Iterator[Any] = iter(())

    def read(self) -> Value:
        try:
            self.events = yaml.parse(self.text, Loader=_Loader)
            root = None
            for event in self.events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        raise self.reader.fail(self.place(event), "", "a second document starts here; write one only")
                    root = self.value(next(self.events), 0)
            return root or Value(None, Place(self.name, 1, 1), Place(self.name, 1, 1))
        except yaml.MarkedYAMLError as error:
            raise self.syntax_error(error) from error
        except yaml.reader.ReaderError as error:
            lines = self.text[: error.position].split("\n")
            place = Place(self.name, len(lines), len(lines[-1]) + 1)
            raise self.reader.fail(place, "", f"not valid YAML: {error.reason}") from error
        except UnicodeEncodeError as error:
            raise self.reader.fail(Place(self.name, 1, 1), "", "not valid Unicode text") from error

    def syntax_error(self, error: yaml.MarkedYAMLError) -> GraphError:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        lines = self.text.split("\n")
        problem = " ".join(part for part in (error.context, error.problem) if part)
        if line < len(lines) and lines[line][column : column + 1] == "\t":
            problem = "a tab cannot indent or separate; use spaces"
        return self.reader.fail(Place(self.name, line + 1, column + 1), "", f"not valid YAML: {problem}")

    def value(self, event: Any, depth: int) -> Value:
        """The value that starts with `event`."""
        place = self.place(event)
        self.reader.count(place, "", depth)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, place, depth)
        if isinstance(event, yaml.MappingStartEvent):
            value = Value(self.mapping(depth), place, place)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = Value(list(self.items(depth)), place, place)
        else:
            value = Value(self.scalar(event, place), place, place)
        if event.tag and not event.tag.startswith(_TAG) and event.tag != "!":
            self.reader.mistakes.append(place.mistake("", f"the tag {show(event.tag)} is not allowed; write plain values"))
        if event.anchor:
            self.anchors[event.anchor] = value
        return value

    def items(self, depth: int) -> Iterator[Value]:
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            yield self.value(event, depth + 1)

    def mapping(self, depth: int) -> dict[str, Value]:
        content: dict[str, Value] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.value(event, depth + 1)
            value = self.value(next(self.events), depth + 1)
            if not isinstance(key.content, str):
                fault = f"keys must be text, got {show(key.content)}; put it in quotes"
            elif key.content == "<<" and isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
                fault = "merge keys ('<<') are not part of YAML 1.2; use an alias for a whole value, or base:"
            elif key.content in content:
                fault = f"the key {show(key.content)} stands twice, first in line {content[key.content].key_place.line}"
            else:
                content[key.content] = Value(value.content, value.place, key.place)
                continue
            self.reader.mistakes.append(key.place.mistake("", fault))
        return content

    def alias(self, event: Any, place: Place, depth: int) -> Value:
        if event.anchor not in self.anchors:
            raise self.reader.fail(place, "", f"the alias '*{event.anchor}' has no anchor '&{event.anchor}' before it")
        return self.copy(self.anchors[event.anchor], place, depth)

    def copy(self, value: Value, place: Place, depth: int) -> Value:
        """The anchor's value once more, so that aliases of aliases count against the limits."""
        self.reader.count(place, "", depth)
        content = value.content
        if isinstance(content, dict):
            content = {key: self.copy(item, place, depth + 1) for key, item in content.items()}
        elif isinstance(content, list):
            content = [self.copy(item, place, depth + 1) for item in content]
        return Value(content, value.place, value.key_place)

    def scalar(self, event: Any, place: Place) -> str | int | float | bool | None:
        text: str = event.value
        kind = (event.tag or "").removeprefix(_TAG)
        if not event.tag and event.implicit[0]:
            kind = next((name for name, pattern in _SCALARS.items() if pattern.fullmatch(text)), "str")
        try:
            match kind:
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "int":
                    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
                case "float":
                    return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").lstrip("."))
        except ValueError:
            fault = f"{show(text)} is too long for a number, or none" if kind == "int" else f"{show(text)} is no number"
            self.reader.mistakes.append(place.mistake("", fault))
        return text

    def place(self, event: Any) -> Place:
        return Place(self.name, event.start_mark.line + 1, event.start_mark.column + 1)


def _normalised(root: Value) -> Value:
    """Inputs in the short form `prompt: text` become `prompt: {type: text}`, so that overlays merge into both."""
    inputs = root.content.get("inputs") if isinstance(root.content, dict) else None
    if inputs is None or not isinstance(inputs.content, dict):
        return root
    content = {
        name: Value({"type": entry}, entry.place, entry.key_place) if isinstance(entry.content, str) else entry
        for name, entry in inputs.content.items()
    }
    return _with(root, "inputs", Value(content, inputs.place, inputs.key_place))


def _merge(below: Value, above: Value) -> Value:
    """`above` laid over `below`: mappings merge, everything else replaces, null removes a key that is there."""
    if not isinstance(below.content, dict) or not isinstance(above.content, dict):
        return above
    content = dict(below.content)
    for key, value in above.content.items():
        if key not in content:
            content[key] = value
        elif value.content is None:
            del content[key]
        else:
            content[key] = _merge(content[key], value)
    return Value(content, below.place, below.key_place)


def _with(value: Value, key: str, entry: Value) -> Value:
    assert isinstance(value.content, dict)
    return Value({**value.content, key: entry}, value.place, value.key_place)


def _placed(value: Value, place: Place) -> Value:
    """The tree with one place for all its values."""
    content = value.content
    if isinstance(content, dict):
        content = {key: _placed(item, place) for key, item in content.items()}
    elif isinstance(content, list):
        content = [_placed(item, place) for item in content]
    return Value(content, place, place)


def _near_files(path: str) -> str:
    from omni.graph import nearest

    folder, name = os.path.split(path)
    try:
        names = [entry for entry in os.listdir(folder or ".") if entry.endswith((".yaml", ".yml"))]
    except (OSError, ValueError):
        return ""
    return nearest(name, names)
