"""What a PNG written by Omni remembers, so that it can be made again: its graph, inputs and seed.

The text chunk `omni` (iTXt) holds a Recipe as JSON. Paths are kept as the user typed them, never made absolute.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from omni.errors import UsageError

CHUNK = "omni"
PACKAGES = ("omni-stages", "torch", "diffusers", "transformers")
"""Libraries whose version may change the pixels."""
TRUSTED_KINDS = ("llm", "diffusion")
"""Kinds of stage that run no code of the graph's choice."""


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
    """The recipe as the text of a PNG's chunk."""
    return msgspec.json.encode(recipe).decode()


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a PNG. Raises UsageError when there is none."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.info.get(CHUNK)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or 'not a PNG picture'}") from error
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{path} is a broken PNG: {error}") from error
    if not isinstance(text, str):
        raise UsageError(f"{path} was not written by `omni run`, or has lost its metadata: it cannot be repeated")
    try:
        return msgspec.json.decode(text.encode(), type=Recipe)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path}: its metadata cannot be read: {error}") from error


def digest_file(path: str) -> str:
    """SHA-256 of a file, in hex. Raises UsageError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def check_files(files_of: dict[str, list[SourceFile]]) -> None:
    """Raise UsageError when an input file (by the name of its input) is gone or has changed."""
    for name, files in files_of.items():
        for file in files:
            if digest_file(file.path) != file.sha256:
                raise UsageError(
                    f"{file.path} is not the file that the picture was made from; use another with --input {name}=FILE"
                )


def needs_trust(recipe: Recipe) -> list[str]:
    """What in the recipe could run code or send a key somewhere: the picture may come from a stranger."""
    stages = recipe.graph.get("stages")
    found = []
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        fields = stage if isinstance(stage, dict) else {}
        if fields.get("kind") not in TRUSTED_KINDS:
            found.append(f"stages.{name}.kind: {fields.get('kind')}")
        found += [f"stages.{name}.{key}" for key in ("trust_remote_code", "api_key_env") if fields.get(key)]
    return found


def installed_versions() -> dict[str, str]:
    """Versions of PACKAGES, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
