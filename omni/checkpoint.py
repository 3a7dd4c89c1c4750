"""Sizes, dtypes and blocks of checkpoints, from headers and JSON alone: no weights are read, nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from omni.component_facts import ComponentFacts, auto_dtype, loaded_size, sort_tensors
from omni.errors import UsageError
from omni.graph import Graph
from omni.model_paths import cached_snapshot, is_path, resolve_model_path
from omni.registry import CheckpointRef, find_kind_of
from omni.safetensors_headers import read_header

__all__ = [
    "PICKLED",
    "STEMS",
    "UNKNOWN",
    "CheckpointFacts",
    "auto_dtype",
    "find_checkpoint",
    "gather_facts",
    "read_facts",
]

STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers name weight files."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class CheckpointFacts(msgspec.Struct, frozen=True):
    """What safetensors headers say about a checkpoint. Nothing but headers is read."""

    components: dict[str, int]
    """Component (folder name, or `model`) -> bytes of its weights."""
    dtypes: dict[str, int] = {}
    """dtype name as in the header (`BF16`) -> bytes."""
    known: bool = True
    """False when the checkpoint is not on this machine yet."""
    parts: dict[str, ComponentFacts] = {}
    """Component -> its blocks and its config.json."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.components.values())

    def loaded_bytes(self, dtype: str | None, device: str) -> int:
        """Bytes of all weights once loaded as `dtype` onto `device`; None keeps the checkpoint's own dtypes."""
        return loaded_size(self.dtypes, dtype, device) if self.dtypes else self.total_bytes

    def part(self, name: str) -> ComponentFacts:
        """The facts of one component; of one whose tensors are not known, its bytes as they are."""
        return self.parts.get(name) or ComponentFacts({"": self.components[name]}, {"": self.components[name]})


_T = TypeVar("_T")
UNKNOWN = CheckpointFacts({}, known=False)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class MissingFile(Exception):
    """A file that the checkpoint names is not there."""


def gather_facts(graph: Graph) -> dict[str, CheckpointFacts]:
    """Stage -> facts, for every stage that has a checkpoint. Raises UsageError on a broken one."""
    facts = {}
    for name, spec in graph.spec.stages.items():
        ref = find_kind_of(spec).checkpoint(spec)
        if ref is not None:
            try:
                facts[name] = read_facts(ref, graph.base_dir)
            except UsageError as error:
                raise UsageError(f"stage '{name}': {error}") from error
    return facts


def read_facts(ref: CheckpointRef, base_dir: str) -> CheckpointFacts:
    """Read the headers of a folder (relative to `base_dir`) or of a hub checkpoint in the local cache.

    A hub checkpoint that is not complete on this machine is unknown. Raises UsageError for a folder that is broken,
    missing, or has pickled weights only.
    """
    resolved = resolve_model_path(ref.model, base_dir)
    if os.path.isdir(resolved):
        try:
            return _read_folder(Path(resolved), ref.variant)
        except MissingFile as error:
            raise UsageError(f"{error}: the checkpoint is incomplete, fetch it again") from error
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", ref.model):
        raise UsageError(f"model '{ref.model}': no such folder in {os.path.abspath(base_dir)}, and no hub id either")
    snapshot = cached_snapshot(ref.model, ref.revision)
    if snapshot is None:
        return UNKNOWN
    try:
        return _read_folder(snapshot, ref.variant)
    except MissingFile:  # a download that was cut short
        return UNKNOWN


def find_checkpoint(ref: CheckpointRef, base_dir: str) -> Path | None:
    """The checkpoint's folder on this machine: its path, or the hub id's snapshot in the local cache.

    A snapshot that is not whole is a download that was cut short, and does not count.
    """
    resolved = resolve_model_path(ref.model, base_dir)
    if os.path.isdir(resolved):
        return Path(resolved)
    snapshot = None if is_path(ref.model) else cached_snapshot(ref.model, ref.revision)
    try:
        if snapshot is not None:
            _read_folder(snapshot, ref.variant)
    except MissingFile:
        return None
    except UsageError:  # all there, but of no use; whoever loads it says why
        pass
    return snapshot


def _read_folder(folder: Path, variant: str | None) -> CheckpointFacts:
    """Sizes of a diffusers pipeline (one component per subfolder) or of a single model."""
    index = folder / "model_index.json"
    if index.is_file():
        entries = _decode(index, dict[str, msgspec.Raw])
        classes = {name: _component(bytes(raw)) for name, raw in entries.items() if not name.startswith("_")}
        folders = {name: folder / name for name, found in classes.items() if found}
        models = {name for name, found in classes.items() if found and _is_model(*found)}
    else:
        folders, models = {"model": folder}, {"model"}
    parts: dict[str, ComponentFacts] = {}
    for name, place in folders.items():
        if not place.is_dir():
            raise MissingFile(f"{place}: {index.name} names this folder, but it is not there")
        files = tuple(weight_files(place, variant))
        if files:
            parts[name] = _read_component(place, files)
        elif name in models and (place / "config.json").is_file():
            raise MissingFile(f"{place}: holds a config.json, but no safetensors weights")
    if not parts:
        raise MissingFile(f"{folder}: holds no safetensors weights")
    dtypes: Counter[str] = Counter()
    for part in parts.values():
        dtypes.update(part.dtypes)
    components = {name: part.total_bytes for name, part in parts.items()}
    return CheckpointFacts(components, dict(dtypes), parts=parts)


def _read_component(folder: Path, files: tuple[Path, ...]) -> ComponentFacts:
    config = folder / "config.json"
    return sort_tensors(
        (
            (name, tensor.dtype, tensor.num_bytes)
            for file in files
            for name, tensor in read_header(file).tensors.items()
        ),
        _decode(config, dict[str, Any]) if config.is_file() else {},
    )


def _component(raw: bytes) -> tuple[str, str] | None:
    """`["diffusers", "AutoencoderKL"]` is one; `[null, null]` is an optional one left out; the rest is settings."""
    try:
        return msgspec.json.decode(raw, type=tuple[str, str])
    except msgspec.ValidationError:
        return None


def _is_model(library: str, name: str) -> bool:
    """Whether a component has weights, as far as its class can tell without being imported."""
    return library in ("diffusers", "transformers") and not re.search("Token|Processor|Extractor|Scheduler", name)


def weight_files(folder: Path, variant: str | None) -> Iterator[Path]:
    """The files that hold a model's weights; none for a tokenizer or a noise scheduler."""
    for chosen in dict.fromkeys((variant, None)):  # parts that lack the variant fall back to the plain files
        middle = f".{chosen}" if chosen else ""
        for stem in STEMS:
            for ending in (f"index{middle}.json", f"{chosen}.index.json"):  # the second is an older way
                index = folder / f"{stem}.safetensors.{ending}"
                if index.is_file():
                    yield from _shards(index)
                    return
            single = folder / f"{stem}{middle}.safetensors"
            if single.is_file():
                yield single
                return
    others = sorted(folder.glob("*.safetensors"))
    yield from others
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled and not others:
        raise UsageError(
            f"{folder / pickled[0]}: pickled weights can run code and are not loaded: convert them to safetensors "
            "(load them once where you trust them and call save_pretrained)"
        )


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(_decode(index, _Index).weight_map.values()))]
    for file in files:
        if file.parent != index.parent or file.name == "..":
            raise UsageError(f"{index}: names a file outside its folder: {file}")
        if not file.is_file():
            raise MissingFile(f"{file}: {index.name} names this file, but it is not there")
    return files


def _decode(file: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not the JSON that belongs there ({error}): fetch it again") from error
