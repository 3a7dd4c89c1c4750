"""What a PNG written by Omni remembers, so that it can be made again: its graph, inputs and seed.

The text chunk `omni` (iTXt) holds a Recipe as JSON. Paths are kept as the user typed them, never made absolute.
"""

from __future__ import annotations

import hashlib
import os
import stat
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from omni.errors import UsageError
from omni.sizes import GIB

CHUNK = "omni"
PACKAGES = ("omni-stages", "torch", "diffusers", "transformers")
"""Libraries whose version may change the pixels."""
TRUSTED_KINDS = ("llm", "diffusion")
"""Kinds of stage that run no code of the graph's choice."""
MAX_FILE_BYTES = 8 * GIB
"""A larger file is no input; a picture of a stranger may name anything."""


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file that was given as an input: its name as typed, and the digest that tells whether it is still the same."""

    path: str
    sha256: str


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to run one request again."""

    graph: dict[str, Any]
    """The graph as a plain document, bases and overrides merged."""
    graph_path: str = ""
    """The graph file as it was named; relative model folders start at its folder."""
    inputs: dict[str, Any] = {}
    """Text and JSON fields of the request."""
    files: dict[str, list[SourceFile]] = {}
    """Media fields of the request."""
    seed: int
    versions: dict[str, str] = {}


def encode_recipe(recipe: Recipe) -> str:
    """The recipe as the text of a PNG's chunk. Raises UsageError when a name in it is no text."""
    try:
        return msgspec.json.encode(recipe).decode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{error.object!a} is not valid UTF-8 text; rename the file") from error


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a PNG. Raises UsageError when there is none, or one that `omni run` cannot have written."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.info.get(CHUNK)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or 'not a PNG picture'}") from error
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is a broken PNG: {error}") from error
    if not isinstance(text, str):
        raise UsageError(f"{path} was not written by `omni run`, or has lost its metadata: it cannot be repeated")
    try:
        recipe = msgspec.json.decode(text.encode(), type=Recipe)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise UsageError(f"{path}: its metadata cannot be read: {error}") from error
    if "base" in recipe.graph:  # it would be merged in after `needs_trust` has looked
        raise UsageError(f"{path}: its graph has a `base`; `omni run` writes merged graphs, so this one is refused")
    return recipe


def digest_file(path: str) -> str:
    """SHA-256 of a file, in hex. Raises UsageError when it cannot be read, is no regular file or is too large."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a device or pipe may have no end
            raise UsageError(f"cannot read {path}: not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise UsageError(f"cannot read {path}: larger than {MAX_FILE_BYTES // GIB} GiB")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error


def check_files(files_of: dict[str, list[SourceFile]]) -> None:
    """Raise UsageError when an input file (by the name of its input) is gone or has changed."""
    for name, files in files_of.items():
        for file in files:
            if digest_file(file.path) != file.sha256:
                raise UsageError(
                    f"{file.path} is not the file that the picture was made from; use another with --input {name}=FILE"
                )


def needs_trust(recipe: Recipe) -> list[str]:
    """What in the recipe could run code, or send a prompt or a key somewhere: the picture may be a stranger's."""
    stages = recipe.graph.get("stages")
    found = []
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        fields = stage if isinstance(stage, dict) else {}
        if fields.get("kind") not in TRUSTED_KINDS:
            found.append(f"stages.{name}.kind: {fields.get('kind')}")
        if fields.get("engine", "transformers") != "transformers":
            found.append(f"stages.{name}.engine: {fields['engine']}")
        keys = ("base_url", "api_key_env", "trust_remote_code")
        found += [f"stages.{name}.{key}" for key in keys if fields.get(key)]
    return [text if text.isprintable() else ascii(text) for text in found]


def installed_versions() -> dict[str, str]:
    """Versions of PACKAGES, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def changed_versions(recipe: Recipe) -> list[str]:
    """The libraries whose version is another than when the picture was made, as `torch '2.1' (here '2.2')`."""
    here = installed_versions()
    return [
        f"{name} {recipe.versions[name]!r} (here {here.get(name, 'none')!r})"
        for name in PACKAGES
        if name in recipe.versions and recipe.versions[name] != here.get(name)
    ]
