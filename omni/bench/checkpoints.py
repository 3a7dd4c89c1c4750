"""What a bench must know of a checkpoint's folder, and a copy of it with one file for each component."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from omni.bench.page_cache import make_cold
from omni.checkpoint import STEMS, MissingFile, weight_files
from omni.errors import UsageError
from omni.safetensors_headers import read_header
from omni.sizes import format_bytes

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
COPY_BYTES = 64 << 20
SPARE_BYTES = 1 << 30


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a checkpoint."""

    name: str
    folder: str
    library: str
    """diffusers or transformers."""
    class_name: str
    files: tuple[str, ...]
    variant: str | None = None


def read_components(folder: Path, variant: str | None = None) -> tuple[Component, ...]:
    """The models in a pipeline's folder, or the one in a model's own. Raises UsageError."""
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        found = [
            (name, entry[0], entry[1])
            for name, entry in index.items()
            if isinstance(entry, list) and entry[0] in ("diffusers", "transformers") and (folder / name).is_dir()
        ]
        places = [(name, library, class_name, folder / name) for name, library, class_name in found]
    elif (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        if not name:
            raise UsageError(f"{folder / 'config.json'}: names no class (_class_name, or architectures)")
        places = [("model", "diffusers" if "_class_name" in config else "transformers", name, folder)]
    else:
        raise UsageError(f"{folder}: neither a pipeline (model_index.json) nor a model (config.json)")
    try:
        parts = [
            Component(
                name=name, library=library, class_name=kind, folder=str(place), files=tuple(files), variant=variant
            )
            for name, library, kind, place in places
            if (files := [str(file) for file in weight_files(place, variant)])
        ]
    except MissingFile as error:
        raise UsageError(f"{error}: the checkpoint is incomplete, fetch it again") from error
    if not parts:
        raise UsageError(f"{folder}: holds no safetensors weights")
    return tuple(parts)


def weight_bytes(components: Sequence[Component]) -> int:
    """Bytes of all weight files."""
    return sum(os.stat(file).st_size for component in components for file in component.files)


def main_dtype(components: Sequence[Component]) -> str:
    """torch's name of the floating dtype that most bytes have. Raises UsageError when there is none."""
    sizes: Counter[str] = Counter()
    for component in components:
        for file in component.files:
            for tensor in read_header(Path(file)).tensors.values():
                sizes[tensor.dtype] += tensor.data_offsets[1] - tensor.data_offsets[0]
    known = {dtype: size for dtype, size in sizes.items() if dtype in DTYPES}
    if not known:
        raise UsageError(f"the weights are {', '.join(sizes)}; the bench takes {', '.join(DTYPES)}")
    return DTYPES[max(known, key=lambda dtype: known[dtype])]


def find_device(name: str) -> str:
    """What `--device` names: `cpu`, or `cuda:N`; `auto` is a GPU, if torch sees any. Raises UsageError."""
    import torch

    is_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if is_gpu else "cpu"
    if name != "cpu" and not is_gpu:
        raise UsageError(f"--device {name}: torch sees no GPU")
    return "cuda:0" if name == "cuda" else name


@contextlib.contextmanager
def consolidated(components: Sequence[Component], beside: Path) -> Iterator[tuple[Component, ...]]:
    """The components with one file each, in a folder on the same disk that is removed in the end.

    Raises UsageError when the disk has no room.
    """
    needed, free = weight_bytes(components), shutil.disk_usage(beside).free
    if needed + SPARE_BYTES > free:
        raise UsageError(f"{beside}: a copy in one file takes {format_bytes(needed)}, {format_bytes(free)} are free")
    with tempfile.TemporaryDirectory(prefix="omni-bench-", dir=beside.resolve().parent) as folder:
        yield tuple(_consolidate(component, Path(folder) / component.name) for component in components)


def _consolidate(component: Component, target: Path) -> Component:
    target.mkdir()
    shutil.copyfile(Path(component.folder) / "config.json", target / "config.json")
    file = target / f"{STEMS[component.library == 'transformers']}.safetensors"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    bases, size = [], 0
    for source in component.files:
        content = read_header(Path(source))
        for name, tensor in content.tensors.items():
            begin, end = tensor.data_offsets
            place = (size + begin, size + end)
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
        bases.append(content.data_start)
        size += os.stat(source).st_size - content.data_start
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for source, base in zip(component.files, bases, strict=True):
            with open(source, "rb") as part:
                part.seek(base)
                shutil.copyfileobj(part, stream, COPY_BYTES)
    # Pages that were written are smaller than pages that were read, and slower to copy: read it like all others
    make_cold([file])
    return msgspec.structs.replace(component, folder=str(target), files=(str(file),), variant=None)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not the JSON that belongs there ({error})") from error
