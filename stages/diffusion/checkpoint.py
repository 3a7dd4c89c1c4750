"""Where a diffusers checkpoint lies and what its folder says, without torch: class name, components, weight files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omni.checkpoint import PICKLED, find_checkpoint
from omni.errors import Mistake
from omni.graph import nearest
from omni.model_paths import is_path, missing_folder
from omni.registry import CheckpointRef
from omni.spec import DiffusionSpec

INDEX = "model_index.json"
CONVERT = "convert it once where you trust it: DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder)"


def find_folder(spec: DiffusionSpec, base_dir: str) -> Path | None:
    """The checkpoint's folder on this machine: the model path, or the hub id's whole snapshot in the local cache."""
    return find_checkpoint(CheckpointRef(spec.model, spec.revision, spec.variant), base_dir)


def read_index(folder: Path) -> dict[str, Any]:
    """The content of model_index.json; empty when there is none or it is not a JSON object."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def pipeline_name(spec: DiffusionSpec, folder: Path | None) -> str | None:
    """Name of the pipeline class: the spec's, else the checkpoint's; None when neither is known here."""
    if spec.pipeline or folder is None:
        return spec.pipeline
    name = read_index(folder).get("_class_name")
    return name[-1] if isinstance(name, list) else name


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Component -> (library, class) of those that the checkpoint holds."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and not name.startswith("_") and isinstance(value[0], str)
    }


def absent_components(index: dict[str, Any]) -> list[str]:
    """Components that the pipeline knows and the checkpoint was saved without."""
    return [name for name, value in index.items() if value == [None, None]]


def has_variant(folder: Path, variant: str | None) -> bool:
    """Whether one component's folder has weights of this variant."""
    return variant is not None and any(folder.glob(f"*.{variant}.*"))


def checkpoint_mistakes(spec: DiffusionSpec, base_dir: str, folder: Path | None) -> list[Mistake]:
    """Faults of the model's place and files that can be seen without loading it."""
    if folder is None:
        return [Mistake("model", missing_folder(spec.model, base_dir))] if is_path(spec.model) else []
    if not (folder / INDEX).is_file():
        other = "modular_model_index.json"
        kind = f"it is a modular pipeline ({other}), which is not supported" if (folder / other).is_file() else ""
        return [Mistake("model", f"{folder} holds no {INDEX}: {kind or 'it is not a diffusers pipeline folder'}")]
    index = read_index(folder)
    if "_class_name" not in index:
        return [Mistake("model", f"{folder / INDEX} names no pipeline class (_class_name)")]
    mistakes = [fault for name in components(index) if (fault := _component_fault(folder, name))]
    variants = sorted({path.name.split(".")[-2] for path in folder.glob("*/*.*.safetensors")})
    if spec.variant and spec.variant not in variants:
        allowed = ", ".join(variants) or "it has none, leave variant out"
        mistakes.append(
            Mistake("variant", f"the checkpoint has no '{spec.variant}'{nearest(spec.variant, variants)} ({allowed})")
        )
    return mistakes


def _component_fault(folder: Path, name: str) -> Mistake | None:
    place = folder / name
    if not place.is_dir():
        return Mistake("model", f"{folder} lacks the folder of its component '{name}'; copy the checkpoint again")
    files = [path.name for path in place.iterdir()]
    pickled = [file for file in files if file.endswith(PICKLED)]
    if pickled and not any(file.endswith(".safetensors") for file in files):
        return Mistake(
            "model",
            f"component '{name}' of {folder} has only pickled weights ({pickled[0]}), and only safetensors are loaded; "
            + CONVERT,
        )
    return None
