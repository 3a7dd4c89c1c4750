"""Values that know where they were written: safe reading of YAML text and of plain data, and dumping again.

Scalars follow YAML 1.2, as editors do: `no` and `16:9` are text, `1e-4` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import yaml

from omni.errors import GraphError, Mistake

MAX_VALUES = 20_000
MAX_DEPTH = 32
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": re.compile(r"(~|null|Null|NULL)?"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}
"""YAML type -> what its plain scalars look like, in order of trial."""


class Place(msgspec.Struct, frozen=True):
    """Where something stands: 1-based line and column, or line 0 when `file` is not a file."""

    file: str = ""
    line: int = 0
    column: int = 0

    def at(self, line: int, column: int) -> Place:
        """Another place of the same file; the same place when this is no file."""
        return Place(self.file, line, column) if self.line else self

    def mistake(self, path: str, message: str) -> Mistake:
        """A mistake at this place, on one line whatever names it quotes."""
        return Mistake(_one_line(path), _one_line(message), self.file, self.line, self.column)


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

    def entry(self, key: str) -> Value | None:
        """The value under `key`; None when there is none, or this is no mapping."""
        return self.content.get(key) if isinstance(self.content, dict) else None

    def with_content(self, content: Any) -> Value:
        """Another content at the same place."""
        return Value(content, self.place, self.key_place)

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


class Notes:
    """What is wrong in the values read so far, and how many there are."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []
        self.num_values = 0

    def add(self, place: Place, path: str, message: str) -> None:
        """Note a mistake; reading goes on."""
        self.mistakes.append(place.mistake(path, message))

    def fatal(self, place: Place, path: str, message: str) -> GraphError:
        """The error for a mistake that ends the reading, with all that were noted before."""
        return GraphError((*self.mistakes, place.mistake(path, message)))

    def count(self, place: Place, path: str, depth: int) -> None:
        """Count one value. Raises GraphError when there are too many, or it is nested too deep."""
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise self.fatal(place, path, f"the graph has more than {MAX_VALUES} values, aliases counted each time")
        if depth > MAX_DEPTH:
            raise self.fatal(place, "", f"values are nested more than {MAX_DEPTH} deep")


def read_yaml(text: str, start: Place, notes: Notes, path: str = "") -> Value:
    """The tree of one YAML document that starts at `start` and belongs at `path`.

    Raises GraphError when it cannot be parsed.
    """
    return _YamlReader(text, start, notes).read(path)


def read_data(content: Any, notes: Notes, path: str = "", depth: int = 0) -> Value:
    """The tree of plain data, without places."""
    notes.count(Place(), path, depth)
    if isinstance(content, dict):
        tree = {}
        for key, value in content.items():
            if isinstance(key, str):
                tree[key] = read_data(value, notes, join_path(path, key), depth + 1)
            else:
                notes.add(Place(), path, f"keys must be text, got {show(key)}")
        return Value(tree)
    if isinstance(content, (list, tuple)):
        return Value([read_data(item, notes, f"{path}[{i}]", depth + 1) for i, item in enumerate(content)])
    if content is None or isinstance(content, (str, int, float)):
        return Value(content)
    notes.add(Place(), path, f"a value of type {type(content).__name__} cannot be written in a graph")
    return Value(None)


def dump(document: dict[str, Any]) -> str:
    """A plain document as ASCII YAML text that reads back as the same document."""
    text: str = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120)
    return text


def join_path(path: str, key: str) -> str:
    """The path of `key` below `path`; a key that would break the line is quoted."""
    shown = key if key and key.isprintable() and len(key) <= 60 else show(key)
    return f"{path}.{shown}" if path else shown


def show(content: Any) -> str:
    """A value in a message: short, on one line, in YAML's words."""
    if isinstance(content, dict):
        return "a mapping"
    if isinstance(content, (list, tuple)):
        return "a list"
    if content is None or isinstance(content, bool):
        return {None: "null", True: "true", False: "false"}[content]
    if isinstance(content, int) and abs(content) >= 10**40:
        return "a huge number"
    text = repr(content)
    return text if len(text) <= 60 else f"{text[:56]}...{text[0]}"


def _one_line(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML ships no types
    """Writes no aliases, and quotes text that YAML 1.2 reads as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _type in ("int", "float"):
    _Dumper.add_implicit_resolver(_TAG + _type, re.compile(rf"({_SCALARS[_type].pattern})\Z"), list("-+.0123456789"))


class _YamlReader:
    """Builds the tree from the parser's events: no recursion in C code, no constructors, no tags."""

    def __init__(self, text: str, start: Place, notes: Notes) -> None:
        self.text = text
        self.start = start
        self.notes = notes
        self.anchors: dict[str, Value] = {}
        self.events: Iterator[Any] = iter(())

    def read(self, path: str) -> Value:
        try:
            self.events = yaml.parse(self.text, Loader=_Loader)
            root = None
            for event in self.events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        raise self.notes.fatal(self.place(event), "", "a second document starts here; write one only")
                    root = self.value(next(self.events), path, 0)
            return root or Value(None, self.start, self.start)
        except yaml.MarkedYAMLError as error:
            raise self.syntax_error(error) from error
        except yaml.reader.ReaderError as error:
            before = self.text[: error.position].split("\n")
            place = self.start.at(len(before), len(before[-1]) + 1)
            raise self.notes.fatal(place, "", f"not valid YAML: {error.reason}") from error
        except UnicodeEncodeError as error:
            raise self.notes.fatal(self.start, "", "the text is not valid Unicode") from error

    def syntax_error(self, error: yaml.MarkedYAMLError) -> GraphError:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        lines = self.text.split("\n")
        problem = " ".join(part for part in (error.context, error.problem) if part)
        if line < len(lines) and lines[line][column : column + 1] == "\t":
            problem = "a tab cannot indent or separate; use spaces"
        return self.notes.fatal(self.start.at(line + 1, column + 1), "", f"not valid YAML: {problem}")

    def value(self, event: Any, path: str, depth: int) -> Value:
        """The value that starts with `event`."""
        place = self.place(event)
        self.notes.count(place, path, depth)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event.anchor, place, path, depth)
        if isinstance(event, yaml.MappingStartEvent):
            value = Value(self.mapping(path, depth), place, place)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = Value(list(self.items(path, depth)), place, place)
        else:
            value = Value(self.scalar(event, path), place, place)
        if event.tag:
            tag = show(event.tag.replace(_TAG, "!!"))
            self.notes.add(place, path, f"the tag {tag} is not allowed; write plain values")
        if event.anchor:
            self.anchors[event.anchor] = value
        return value

    def items(self, path: str, depth: int) -> Iterator[Value]:
        index = 0
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            yield self.value(event, f"{path}[{index}]", depth + 1)
            index += 1

    def mapping(self, path: str, depth: int) -> dict[str, Value]:
        content: dict[str, Value] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.value(event, path, depth + 1)
            name = key.content if isinstance(key.content, str) else show(key.content)
            value = self.value(next(self.events), join_path(path, name), depth + 1)
            if not isinstance(key.content, str):
                fault = f"keys must be text, got {name}; put it in quotes"
            elif name == "<<" and isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
                fault = "merge keys ('<<') are not part of YAML 1.2; use an alias for a whole value, or base:"
            elif name in content:
                first = content[name].key_place.line
                fault = f"the key stands twice{f', first in line {first}' if first else ''}"
            else:
                content[name] = Value(value.content, value.place, key.place)
                continue
            self.notes.add(key.place, join_path(path, name), fault)
        return content

    def alias(self, name: str, place: Place, path: str, depth: int) -> Value:
        if name not in self.anchors:
            raise self.notes.fatal(place, path, f"the alias '*{name}' has no anchor '&{name}' before it")
        return self.copy(self.anchors[name], place, path, depth)

    def copy(self, value: Value, place: Place, path: str, depth: int) -> Value:
        """The anchor's value once more, so that aliases of aliases count against the limits."""
        self.notes.count(place, path, depth)
        content = value.content
        if isinstance(content, dict):
            content = {key: self.copy(item, place, path, depth + 1) for key, item in content.items()}
        elif isinstance(content, list):
            content = [self.copy(item, place, path, depth + 1) for item in content]
        return value.with_content(content)

    def scalar(self, event: Any, path: str) -> str | int | float | bool | None:
        text: str = event.value
        plain = event.implicit[0]
        kind = next((name for name, pattern in _SCALARS.items() if plain and pattern.fullmatch(text)), "str")
        match kind:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "float":
                return float(re.sub(r"\.(?=[iInN])", "", text))
            case "int" if len(text) <= 1000:
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            case "int":
                self.notes.add(self.place(event), path, "the number is too long")
        return text

    def place(self, event: Any) -> Place:
        return self.start.at(event.start_mark.line + 1, event.start_mark.column + 1)
