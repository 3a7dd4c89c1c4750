"""Blueprints of transformers' models: built, renamed, converted and tied by the library's own functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, _get_dtype
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class
from transformers.monkey_patching import patch_output_recorders
from transformers.utils.generic import ContextManagers
from transformers.utils.loading_report import LoadStateDictInfo

from omni.errors import UsageError
from stages.policies.load.blueprint import (
    DTYPES,
    MAX_NAMED,
    Blueprint,
    ComponentRequest,
    Merge,
    Target,
    Unsupported,
    check_keys,
    shape_faults,
)
from stages.policies.load.catalog import Entry


class _Group(msgspec.Struct):
    """Checkpoint tensors that one of the library's converters turns into others."""

    converter: Any
    sources: list[tuple[str, Entry, torch.dtype]] = []
    """(pattern that matched, entry, dtype to convert in)."""


def plan_transformers(request: ComponentRequest, entries: dict[str, Entry]) -> Blueprint:
    """The model on the meta device, with a target for each tensor that its checkpoint gives, whole or merged.

    Raises Unsupported when the model loads in a way of its own, UsageError when keys or shapes do not fit.
    """
    model, config, mapping = _build(request)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    choose_dtype = _dtype_chooser(model, config.dtype)
    whole: dict[str, Target] = {}
    groups: dict[str, _Group] = {}
    unexpected: dict[str, str] = {}
    for key in sorted(entries, key=dot_natural_key):
        entry = entries[key]
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, expected)
        if name not in expected:
            unexpected[name] = key
        elif pattern is None:
            whole[name] = Target(name, tuple(expected[name].shape), choose_dtype(name, expected[name]), entry)
        else:
            group = groups.setdefault(name, _Group(copy.deepcopy(by_pattern[pattern])))
            group.sources.append((pattern, entry, choose_dtype(name, expected[name])))
    made = {name: tensor for first, group in groups.items() for name, tensor in _try(model, first, group).items()}
    for name, tensor in made.items():
        whole[name] = Target(name, tuple(tensor.shape), tensor.dtype, None)
    info = _check(request, model, whole, unexpected)
    model._weight_conversions = [item for item in mapping if item.was_used()]
    targets = tuple(whole[name] for name in expected if name in whole)
    merges = tuple(
        Merge(tuple(entry for _, entry, _ in group.sources), _merger(model, first, group))
        for first, group in groups.items()
    )
    return Blueprint(request, model, targets, merges, _finisher(request, model, info, config.dtype, mapping))


def _build(request: ComponentRequest) -> tuple[PreTrainedModel, PreTrainedConfig, list[Any]]:
    """The model without weights, its config, and the library's conversions for its checkpoints."""
    folder = str(request.folder)
    model_class, config = request.model_class, None
    if issubclass(model_class, _BaseAutoModelClass):
        config = AutoConfig.from_pretrained(folder)
        if type(config) not in model_class._model_mapping:
            raise Unsupported(f"{model_class.__name__} knows no {type(config).__name__}")
        model_class = _get_model_class(config, model_class._model_mapping)
        if config.sub_configs.get("text_config") is getattr(model_class, "config_class", None) is not None:
            config = config.get_text_config()
    _refuse(request, model_class)
    if config is None:
        config = model_class.config_class.from_pretrained(folder)
    for name in ("quantization_config", "fusion_config", "transformers_weights"):
        if getattr(config, name, None) is not None:
            raise Unsupported(f"its config has a {name}")
    config, dtype = _get_dtype(request.dtype, None, config, None, None, True, None)
    config.name_or_path = folder
    config = copy.deepcopy(config)
    with ContextManagers(model_class.get_init_context(dtype, False, False, None)):
        model = model_class(config)
        patch_output_recorders(model)
    return model, config, get_model_conversion_mapping(model)


def _refuse(request: ComponentRequest, model_class: Any) -> None:
    """Raise Unsupported for classes and folders that need more than this policy does."""
    for name in ("from_pretrained", "_load_pretrained_model", "_finalize_model_loading"):
        own, stock = getattr(model_class, name), getattr(PreTrainedModel, name)
        if getattr(own, "__func__", own) is not getattr(stock, "__func__", stock):
            raise Unsupported(f"{model_class.__name__} has a {name} of its own")
    if request.options.get("trust_remote_code") or model_class.is_remote_code():
        raise Unsupported("it may load with code of its own")
    if (request.folder / "adapter_config.json").exists():
        raise Unsupported("it has an adapter")
    if model_class.config_class is None or model_class.config_class.extra_files:
        raise Unsupported(f"{model_class.__name__} reads further files")


def _dtype_chooser(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.dtype]:
    """The dtype of a tensor in the finished model: the model's own, unless the class keeps it in another."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name, tensor: tensor.dtype
    pattern, group_names, _ = build_glob_alternation(list(plan))

    def choose(name: str, tensor: torch.Tensor) -> torch.dtype:
        match = pattern.search(name)
        chosen: torch.dtype = plan[group_names[match.lastgroup]] if match else tensor.dtype
        return chosen

    return choose


def _convert(
    model: PreTrainedModel, first: str, group: _Group, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run the library's converter over `tensors` (by checkpoint name). Raises UsageError when it fails."""
    converter = copy.deepcopy(group.converter)
    for pattern, entry, dtype in group.sources:
        tensor = tensors[entry.name].to(dtype)
        converter.add_tensor(first, entry.name, pattern, lambda tensor=tensor: tensor)
    info = _info(set(), set())
    try:
        made = converter.convert(first, model=model, config=model.config, hf_quantizer=None, loading_info=info)
    except SkipParameters as error:  # the library's sign for a fault of any kind, which is the error's context
        file, names = (
            group.sources[0][1].file,
            ", ".join(f"'{entry.name}'" for _, entry, _ in group.sources[:MAX_NAMED]),
        )
        raise UsageError(f"{file}: {names} ... cannot make '{first}': {error.__context__}") from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _try(model: PreTrainedModel, first: str, group: _Group) -> dict[str, torch.Tensor]:
    """What the converter makes, on the meta device."""
    return _convert(
        model,
        first,
        group,
        {
            entry.name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for _, entry, _ in group.sources
        },
    )


def _merger(
    model: PreTrainedModel, first: str, group: _Group
) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: _convert(model, first, group, tensors)


def _check(
    request: ComponentRequest, model: PreTrainedModel, whole: Mapping[str, Target], unexpected: Mapping[str, str]
) -> LoadStateDictInfo:
    """Raise UsageError when keys or shapes do not fit; else what the library needs to know to finish the model."""
    expected = model.state_dict()
    missing = expected.keys() - whole.keys()
    tied: dict[str, set[str]] = {}
    for one, other in model.all_tied_weights_keys.items():
        tied.setdefault(other, {other}).add(one)
    covered = {name for group in tied.values() if group - missing for name in group}
    faults = _info(missing - covered, set(unexpected))
    model._adjust_missing_and_unexpected_keys(faults)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    check_keys(
        request.folder,
        type(model).__name__,
        missing=faults.missing_keys & parameters,
        unexpected=[unexpected[name] for name in faults.unexpected_keys],
        shapes=shape_faults(whole.values(), expected),
    )
    return _info(missing, set(unexpected))


def _finisher(
    request: ComponentRequest, model: PreTrainedModel, info: LoadStateDictInfo, dtype: torch.dtype, mapping: list[Any]
) -> Callable[[], None]:
    """What from_pretrained does after the weights: ties them, makes buffers, reads the generation config."""
    folder = str(request.folder)
    device = request.device if request.target == "device" else "cpu"

    def finish() -> None:
        load_config = LoadStateDictConfig(
            pretrained_model_name_or_path=folder, device_map={"": device}, dtype=dtype, weight_mapping=mapping
        )
        type(model)._finalize_model_loading(model, load_config, info)
        model.eval()
        model.set_use_kernels(False, None)
        if model.can_generate() and hasattr(model, "adjust_generation_fn"):
            hub = dict.fromkeys(("cache_dir", "proxies", "token"))
            model.adjust_generation_fn(
                None,
                issubclass(request.model_class, _BaseAutoModelClass),
                None,
                folder,
                **hub,
                force_download=False,
                local_files_only=True,
                revision=None,
                subfolder="",
                trust_remote_code=False,
            )

    return finish


def _info(missing: set[str], unexpected: set[str]) -> LoadStateDictInfo:
    return LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
