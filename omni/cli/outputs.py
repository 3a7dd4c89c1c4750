"""Where the outputs of `omni run` go: names that follow one rule, checked before any model is loaded.

A file is called STEM[-REQUEST][-OUTPUT][-ITEM].SUFFIX; each part in brackets stands there only where there are several
of its kind: requests (1, 2, ...), outputs with this suffix (their names), items of a list (1, 2, ...).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from omni.errors import UsageError
from omni.files import SUFFIXES, check_folder, items_of, kind_of, write_output
from omni.graph import Graph, base_type
from omni.media import Audio

PRINTED = ("text", "json")
"""Types that are printed, and written only when the suffix asks for it."""


class OutputPlan(msgspec.Struct, frozen=True):
    """Names for everything that a run may write."""

    folder: Path
    stem: str
    suffix: str
    """As the user asked, or empty: each type's default."""
    num_requests: int
    types: dict[str, str]
    """Output -> its type, lists taken off."""
    sound_of: dict[str, str]
    """Video output -> the audio output that becomes its sound track."""
    numbered: bool = False
    """Whether the stem is of our own choice and ends in a number: then no file is replaced."""

    def suffix_for(self, kind: str) -> str:
        """The suffix of files of a kind; empty when it is only printed."""
        if self.suffix in SUFFIXES[kind]:
            return self.suffix
        return "" if kind in PRINTED else SUFFIXES[kind][0]

    def is_written(self, name: str) -> bool:
        """Whether the output gets files of its own."""
        kind = self.types[name]
        return name not in self.sound_of.values() and (kind == "any" or bool(self.suffix_for(kind)))

    def _may_be(self, name: str, kind: str) -> bool:
        return self.types[name] == "any" or self.suffix_for(self.types[name]) == self.suffix_for(kind)

    def path(self, request: int, name: str, item: int, num_items: int, kind: str) -> Path:
        """The file for item number `item` of output `name` of request number `request`, both from 0."""
        parts = [self.stem]
        if self.num_requests > 1:
            parts.append(f"{request + 1:0{len(str(self.num_requests))}d}")
        rivals = [output for output in self.types if self.is_written(output) and self._may_be(output, kind)]
        if len(rivals) > 1:
            parts.append(name)
        if num_items > 1:
            parts.append(f"{item + 1:0{len(str(num_items))}d}")
        return self.folder / ("-".join(parts) + self.suffix_for(kind))

    def write(self, request: int, outputs: Mapping[str, Any], metadata: str) -> list[Path]:
        """Write the outputs of one request; returns the paths, in the graph's order. Raises UsageError."""
        paths = []
        for name, value in outputs.items():
            items = items_of(value)
            if not self.is_written(name):
                continue
            sounds = items_of(outputs[self.sound_of[name]]) if name in self.sound_of else []
            for index, item in enumerate(items):
                kind = kind_of(item)
                if not self.suffix_for(kind):
                    continue
                sound = sounds[index] if index < len(sounds) and isinstance(sounds[index], Audio) else None
                place = (request, name, index, len(items))
                paths.append(self._write_item(item, place, metadata, sound))
        return paths

    def _write_item(self, item: Any, place: tuple[int, str, int, int], metadata: str, sound: Audio | None) -> Path:
        path = self.path(*place, kind_of(item))
        try:
            return write_output(item, path, metadata=metadata, sound=sound, replace=not self.numbered)
        except FileExistsError:  # another run has taken the name since
            stem, _, number = self.stem.rpartition("-")
            plan = msgspec.structs.replace(self, stem=_numbered(stem, int(number) + 1))
            return plan._write_item(item, place, metadata, sound)


def plan_outputs(graph: Graph, output: str | None, num_requests: int) -> OutputPlan:
    """Decide names and check that they can be written. Raises UsageError."""
    ports = {name: graph.ports[source.stage].outputs[source.port] for name, source in graph.outputs.items()}
    types = {name: base_type(port.type) for name, port in ports.items()}
    folder, stem, suffix = _split(output, graph.spec.name)
    allowed = sorted({s for kind in types.values() for s in _suffixes(kind)})
    if suffix and suffix not in allowed:
        gives = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise UsageError(f"--output {output}: the graph gives {gives}; allowed suffixes: {' '.join(allowed)}")
    if output is not None and not suffix and not _is_folder(output):
        raise UsageError(f"--output {output}: a suffix is missing, or the folder does not exist ({' '.join(allowed)})")
    check_folder(folder)
    if output is not None and suffix and Path(output).is_dir():
        raise UsageError(f"--output {output}: is a folder")
    sound_of = {}
    if suffix in ("", ".mp4"):
        for video, sound in ((v, a) for v in types for a in types if (types[v], types[a]) == ("video", "audio")):
            if graph.outputs[video].stage == graph.outputs[sound].stage:
                sound_of[video] = sound
    numbered = output is None or _is_folder(output)
    return OutputPlan(folder, stem, suffix, num_requests, types, sound_of, numbered)


def _suffixes(kind: str) -> tuple[str, ...]:
    return tuple(s for group in SUFFIXES.values() for s in group) if kind == "any" else SUFFIXES[kind]


def _is_folder(output: str) -> bool:
    return output.endswith(os.sep) or Path(output).is_dir()


def _split(output: str | None, graph_name: str) -> tuple[Path, str, str]:
    """Folder, stem and suffix; a name of our own choice where the user gave none."""
    if output is not None and not _is_folder(output):
        path = Path(output)
        return path.parent, path.stem, path.suffix.lower()
    folder = Path(output or ".")
    name = re.sub(r"[^\w.-]+", "_", graph_name).strip(".") or "graph"
    taken = {re.split(r"[.-]", entry.removeprefix(f"{name}-"), maxsplit=1)[0] for entry in _entries(folder, f"{name}-")}
    number = next(number for number in range(1, len(taken) + 2) if f"{number:03d}" not in taken)
    return folder, _numbered(name, number), ""


def _numbered(name: str, number: int) -> str:
    return f"{name}-{number:03d}"


def _entries(folder: Path, prefix: str) -> list[str]:
    return [entry for entry in os.listdir(folder) if entry.startswith(prefix)] if folder.is_dir() else []
