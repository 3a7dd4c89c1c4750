"""Blueprints of diffusers' models, built as their from_pretrained builds them, but without weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import accelerate
import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights

from stages.policies.load.blueprint import (
    DTYPES,
    Blueprint,
    ComponentRequest,
    Target,
    Unsupported,
    check_keys,
    matches,
    shape_faults,
)
from stages.policies.load.catalog import Entry


def plan_diffusers(request: ComponentRequest, entries: dict[str, Entry]) -> Blueprint:
    """The model on the meta device, with a target for each tensor of its checkpoint.

    Raises Unsupported when its class loads in a way of its own, UsageError when keys or shapes do not fit.
    """
    model_class, folder = request.model_class, str(request.folder)
    if getattr(model_class.from_pretrained, "__func__", None) is not ModelMixin.from_pretrained.__func__:
        raise Unsupported(f"{model_class.__name__} has a way of loading of its own")
    config, unused, _ = model_class.load_config(folder, return_unused_kwargs=True, return_commit_hash=True)
    if config.get("quantization_config"):
        raise Unsupported("its weights are quantized")
    if not request.dtype.is_floating_point or request.dtype.itemsize < 2:
        raise Unsupported(f"{request.dtype} is not a dtype to compute in")
    with _default_dtype(request.dtype), no_init_weights(), accelerate.init_empty_weights():
        model = model_class.from_config(copy.deepcopy(config), **unused)
    names = {name: name for name in entries}
    model._fix_state_dict_keys_on_load(names)
    expected = model.state_dict()
    targets = tuple(
        Target(name, tuple(tensor.shape), _dtype(request, name, entries[names[name]]), entries[names[name]])
        for name, tensor in expected.items()
        if name in names
    )
    parameters = {name for name, _ in model.named_parameters()}
    check_keys(
        request.folder,
        model_class.__name__,
        missing=[name for name in parameters if name not in names],
        unexpected=[
            key
            for name, key in names.items()
            if name not in expected and not matches(model_class._keys_to_ignore_on_load_unexpected, name)
        ],
        shapes=shape_faults(targets, expected),
    )

    def finish() -> None:
        model.register_to_config(_name_or_path=folder)
        model.eval()

    return Blueprint(request, model, targets, finish=finish)


def _dtype(request: ComponentRequest, name: str, entry: Entry) -> torch.dtype:
    """Numbers that are not floating point stay as they are, and so do modules that the class keeps in float32."""
    dtype = DTYPES[entry.dtype]
    if not dtype.is_floating_point:
        return dtype
    kept = request.model_class._keep_in_fp32_modules or ()
    return torch.float32 if set(kept) & set(name.split(".")) else request.dtype


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What modules make buffers and tables in. torch knows it for the whole process only, as the library does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
