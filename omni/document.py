"""One graph's document: its file, the files it is based on, and `--set` overrides, merged into one tree."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from omni.errors import GraphError, Mistake
from omni.graph import nearest
from omni.tree import Notes, Place, Value, read_data, read_yaml, show

MAX_BYTES = 1 << 20


class Document(msgspec.Struct, frozen=True):
    """A merged tree, and the mistakes that do not hinder further checks."""

    root: Value
    mistakes: tuple[Mistake, ...]


def read_file(path: str, overrides: tuple[str, ...] = ()) -> Document:
    """The document of a graph file. Raises GraphError when it or a base cannot be read at all."""
    reader = _Reader(os.path.dirname(os.path.abspath(path)))
    return reader.finish(reader.file(path, (), Place(path)), overrides)


def read_document(content: Any, base_dir: str, overrides: tuple[str, ...] = ()) -> Document:
    """The document of a graph that is plain data already; `base_dir` is where its `base` is looked for."""
    reader = _Reader(os.path.abspath(base_dir))
    root = _normalised(read_data(content, reader.notes))
    if not isinstance(root.content, dict):
        raise reader.notes.fatal(Place(), "", f"a graph is a mapping with 'stages', got {show(root.content)}")
    return reader.finish(reader.over_base(root, base_dir, ()), overrides)


class _Reader:
    def __init__(self, top_dir: str) -> None:
        self.top_dir = top_dir
        self.notes = Notes()

    def finish(self, root: Value, overrides: tuple[str, ...]) -> Document:
        for override in overrides:
            root = _merge(root, self.override(override))
        return Document(root, tuple(self.notes.mistakes))

    def file(self, path: str, readers: tuple[str, ...], named_at: Place) -> Value:
        """The tree of a file, laid over its bases; `readers` are the real paths of the files that led here."""
        text = self.text(path, named_at, is_base=bool(readers))
        real = os.path.realpath(path)
        if real in readers:
            chain = [os.path.basename(name) for name in (*readers[readers.index(real) :], real)]
            raise self.notes.fatal(named_at, "base", f"the bases form a cycle: {' -> '.join(chain)}")
        start = Place(path, 1, 1)
        root = _normalised(read_yaml(text, start, self.notes))
        if not isinstance(root.content, dict):
            what = "is empty" if root.content is None else f"holds {show(root.content)}"
            raise self.notes.fatal(start, "", f"the file {what}; a graph is a mapping with 'stages'")
        folder = os.path.dirname(path)
        if readers:
            root = self.with_moved_models(root, folder)
        return self.over_base(root, folder, (*readers, real))

    def text(self, path: str, named_at: Place, is_base: bool) -> str:
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            what = show(path) if is_base else "the file"
            fault = f"cannot read {what}: {getattr(error, 'strerror', None) or error}{_near_files(path)}"
            raise self.notes.fatal(named_at, "base" if is_base else "", fault) from error
        if len(data) > MAX_BYTES:
            raise self.notes.fatal(Place(path), "", f"the file is larger than {MAX_BYTES >> 20} MiB; is it a graph?")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            place = Place(path, line, error.start - data.rfind(b"\n", 0, error.start))
            raise self.notes.fatal(place, "", "the file is not UTF-8 text; save it as UTF-8") from error

    def over_base(self, root: Value, folder: str, readers: tuple[str, ...]) -> Value:
        """The tree laid over the file that its `base` names, if it names one."""
        base = root.entry("base")
        if base is None:
            return root
        if not isinstance(base.content, str) or not base.content:
            raise self.notes.fatal(base.place, "base", f"expected the path of a graph file, got {show(base.content)}")
        path = os.path.join(folder, base.content)
        own = {key: value for key, value in (root.content or {}).items() if key != "base"}  # type: ignore[union-attr]
        return _merge(self.file(path, readers or ("",), base.place), root.with_content(own))

    def with_moved_models(self, root: Value, folder: str) -> Value:
        """A model folder beside a base file is named from the top file's folder, where all model paths start."""
        stages = root.entry("stages")
        if stages is None or not isinstance(stages.content, dict):
            return root
        moved = {}
        for name, stage in stages.content.items():
            model = stage.entry("model")
            moved[name] = stage
            if model is not None and isinstance(model.content, str) and model.content:
                found = os.path.join(folder, model.content)
                if not os.path.isabs(model.content) and os.path.isdir(found):
                    there = os.path.relpath(os.path.realpath(found), os.path.realpath(self.top_dir))
                    moved[name] = _with(stage, "model", model.with_content(there))
        return _with(root, "stages", stages.with_content(moved))

    def override(self, text: str) -> Value:
        """The tree that `path=value` lays over the document; an empty one when the text is wrong."""
        path, equals, value = text.partition("=")
        shown = text if text.isprintable() and len(text) <= 80 else f"{ascii(text[:76])[1:-1]}..."
        place = Place(f"--set {shown}")
        keys = path.strip().split(".")
        nothing = Value({}, place, place)
        if not equals or not all(keys):
            self.notes.add(place, "", "expected path=value, for example stages.draw.call.num_inference_steps=8")
            return nothing
        if keys[0] == "base":
            self.notes.add(place, "base", "can only be set in a file")
            return nothing
        try:
            tree = read_yaml(value, place, self.notes, path.strip())
        except GraphError as error:
            fault = f"{error.mistakes[-1].message}; put text with special characters in quotes"
            self.notes.add(place, path.strip(), fault)
            return nothing
        for key in reversed(keys):
            tree = Value({key: tree}, place, place)
        return _normalised(tree)


def _normalised(root: Value) -> Value:
    """Inputs in the short form `prompt: text` become `prompt: {type: text}`, so that overlays merge into both."""
    inputs = root.entry("inputs")
    if inputs is None or not isinstance(inputs.content, dict):
        return root
    entries = {
        name: entry.with_content({"type": entry}) if isinstance(entry.content, str) else entry
        for name, entry in inputs.content.items()
    }
    return _with(root, "inputs", inputs.with_content(entries))


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
    return below.with_content(content)


def _with(value: Value, key: str, entry: Value) -> Value:
    assert isinstance(value.content, dict)
    return value.with_content({**value.content, key: entry})


def _near_files(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        names = [os.path.splitext(entry) for entry in os.listdir(folder or ".")]
    except (OSError, ValueError):
        return ""
    stem = os.path.splitext(name)[0]
    return nearest(name, [near + end for near, end in names if end in (".yaml", ".yml") and nearest(stem, [near])])
