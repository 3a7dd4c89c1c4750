"""Where a model lies: a folder relative to the graph file, or a hub id's snapshot in the local cache."""

from __future__ import annotations

import os
from pathlib import Path

from omni.graph import nearest


def resolve_model_path(model: str, base_dir: str) -> str:
    """A model folder relative to the graph file becomes absolute; a hub id is returned as it is."""
    path = os.path.join(base_dir, os.path.expanduser(model))
    return os.path.abspath(path) if os.path.isdir(path) else model


def is_path(model: str) -> bool:
    """True when `model` cannot be a hub id, `name` or `owner/name`."""
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1 or "\\" in model


def missing_folder(model: str, base_dir: str) -> str:
    """What is wrong with a path that is no folder: nearest sibling, and what a model is."""
    path = Path(os.path.abspath(os.path.join(base_dir, os.path.expanduser(model))))
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    fault = "is a file, name its folder" if path.is_file() else f"does not exist{nearest(path.name, siblings)}"
    return f"{path} {fault}; a model is a folder or a hub id (owner/name)"


def cached_snapshot(model: str, revision: str | None = None) -> Path | None:
    """The folder of a hub checkpoint in the local cache, by the cache's documented layout; None when not there.

    The hub's own library is not asked: importing it takes longer than the rest of planning.
    """
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    repo = cache.expanduser() / f"models--{model.replace('/', '--')}"
    named = repo / "refs" / (revision or "main")
    commit = named.read_text().strip() if named.is_file() else named.name
    snapshot = repo / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
