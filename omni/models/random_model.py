"""Writes a model of a stock configuration with random weights, as `save_pretrained` would write it.

No more than one shard is in memory at a time: the module is built without weights, and only its names and shapes count.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import save_file

from omni.errors import OmniError, UsageError
from omni.models.random_values import RandomValues, spread_of
from omni.models.stock import Scale, Stock, find_stock, part_config
from omni.models.stock_part import Part
from omni.models.tokenizers import build_tokenizer
from omni.sizes import format_bytes

SPARE_BYTES = 64 << 20
"""Left free on the disk."""
ALIGNMENT = 64
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


class RandomModel(msgspec.Struct, frozen=True, kw_only=True):
    """What to write."""

    config: str
    component: str = "transformer"
    """A component's name, or `all` for a pipeline's folder."""
    scale: Scale = "full"
    layers: int | None = None
    dtype: str = "bfloat16"
    shard_bytes: int = 5 * 10**9
    seed: int = 0


class Written(msgspec.Struct, frozen=True):
    """What was written."""

    num_parameters: int
    num_bytes: int
    num_files: int


def write_model(
    model: RandomModel,
    folder: Path,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write `model` into `folder`; `progress` gets the bytes that are written and those there will be.

    Raises UsageError for an unknown name, a folder with content (unless `force`), and a disk without the space.
    """
    stock = find_stock(model.config)
    names = list(stock.parts) if model.component == "all" else [model.component]
    if unknown := [name for name in names if name not in stock.parts]:
        raise UsageError(
            f"component '{unknown[0]}': {model.config} has {', '.join(stock.parts)}, or take all of them: all"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not force:
        raise UsageError(f"{folder}: is there and not empty; name another folder, or write over it with --force")
    modules = {name: build_empty(stock.parts[name], model.scale, model.layers) for name in names}
    dtype = getattr(torch, model.dtype)
    weights = {name: saved_weights(module, dtype) for name, module in modules.items()}
    total = sum(map(_num_bytes, weights.values()))
    _check_space(folder, total)
    values = {kind: RandomValues(model.seed, kind) for kind in _float_dtypes(weights)}
    done = files = 0
    with _one_thread():
        for name in names:
            place = folder / name if model.component == "all" else folder
            _write_config(modules[name], place, model.dtype)
            stem = STEMS[stock.parts[name].library]
            for num_bytes in _write_shards(weights[name], name, stem, place, model.shard_bytes, values):
                done, files = done + num_bytes, files + 1
                progress(done, total)
    if model.component == "all":
        _write_pipeline(stock, modules, folder)
    return Written(sum(t.numel() for tensors in weights.values() for t in tensors.values()), total, files)


def build_empty(part: Part, scale: Scale, layers: int | None = None) -> Any:
    """The component's module: parameters on the meta device, buffers as its constructor computes them."""
    model_class: Any = importlib.import_module(part.library)
    for name in part.class_name.split("."):
        model_class = getattr(model_class, name)
    config = part_config(part, scale, layers)
    with init_empty_weights():
        return model_class(**config) if part.library == "diffusers" else model_class(model_class.config_class(**config))


def saved_weights(module: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Name in the checkpoint -> tensor, of all that is saved: meta for parameters, real for buffers.

    Floating-point tensors have `dtype`, or float32 where diffusers keeps a part of the class in that.
    """
    state = dict(module.state_dict())
    for tied in getattr(module, "all_tied_weights_keys", {}):
        state.pop(tied, None)
    kept = () if dtype == torch.float32 or not hasattr(module, "config_name") else module._keep_in_fp32_modules or ()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
    if hasattr(module, "config_class"):
        from transformers.core_model_loading import revert_weight_conversion

        state = dict(revert_weight_conversion(module, state))
    return state


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small pieces are done before several threads have met, above all on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _float_dtypes(weights: Mapping[str, Mapping[str, torch.Tensor]]) -> set[torch.dtype]:
    return {t.dtype for tensors in weights.values() for t in tensors.values() if t.is_floating_point()}


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _check_space(folder: Path, needed: int) -> None:
    """Raises UsageError when the disk has no room for so many bytes."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed + SPARE_BYTES > free:
        raise UsageError(
            f"{folder}: the model takes {format_bytes(needed)}, and {format_bytes(free)} are free there; take fewer "
            "--layers, another --scale, or a folder on another disk"
        )


def _write_config(module: Any, place: Path, dtype: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for stale in (*place.glob("*.safetensors"), *place.glob("*.safetensors.index.json")):
        if stale.is_file():
            stale.unlink()
    if hasattr(module, "save_config"):
        module.save_config(place)
    else:
        module.config.architectures = [type(module).__name__]
        module.config.dtype = dtype
        module.config.save_pretrained(place)


def _write_shards(
    weights: Mapping[str, torch.Tensor],
    component: str,
    stem: str,
    place: Path,
    shard_bytes: int,
    values: Mapping[torch.dtype, RandomValues],
) -> Iterator[int]:
    """Write a component's files; yields the bytes of each as it is there."""
    shards = _split(weights, shard_bytes)
    # Of one shard after the other: fresh memory would take longer than filling it.
    memory = torch.empty(max(sum(_room(weights[name]) for name in names) for names in shards), dtype=torch.uint8)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = place / f"{stem}{suffix}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        begin = 0
        for name in names:
            like = weights[name]
            tensors[name] = memory[begin : begin + like.nbytes].view(like.dtype).view(like.shape)
            _fill(tensors[name], like, f"{component}/{name}", values)
            begin += _room(like)
        try:
            save_file(tensors, file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise OmniError(f"{file}: cannot be written: {error}") from error
        files |= dict.fromkeys(names, file.name)
        yield _num_bytes(tensors)
    if len(shards) > 1:
        index = {"metadata": {"total_size": _num_bytes(weights)}, "weight_map": files}
        text = json.dumps(index, indent=2, sort_keys=True)
        (place / f"{stem}.safetensors.index.json").write_text(text + "\n")


def _split(weights: Mapping[str, torch.Tensor], shard_bytes: int) -> list[list[str]]:
    """Names of each file, in the module's order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _room(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes in the memory of a shard."""
    return -(-int(tensor.nbytes) // ALIGNMENT) * ALIGNMENT


def _fill(out: torch.Tensor, like: torch.Tensor, key: str, values: Mapping[torch.dtype, RandomValues]) -> None:
    """Random numbers for a parameter; a buffer keeps what it holds, if that varies."""
    if like.is_meta:
        values[out.dtype].fill(out, key, *spread_of(key, like.shape))
    elif like.is_floating_point() and like.numel() > 1 and bool((like == like.view(-1)[0]).all()):
        values[out.dtype].fill(out, key, spread=0.1)
        out += like
    else:
        out.copy_(like)


def _write_pipeline(stock: Stock, modules: Mapping[str, Any], folder: Path) -> None:
    """Everything of a pipeline's folder but the weights."""
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    tokenizers = {
        name: build_tokenizer(class_name, modules[name.replace("tokenizer", "text_encoder")].config)
        for name, class_name in stock.tokenizers.items()
    }
    pipeline_class = getattr(diffusers, stock.pipeline)
    pipeline_class(**modules, **tokenizers, scheduler=scheduler, **stock.settings).save_config(folder)
    for name, part in {**tokenizers, "scheduler": scheduler}.items():
        part.save_pretrained(folder / name)
