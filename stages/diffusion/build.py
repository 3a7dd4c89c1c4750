"""Builds a diffusion stage's pipeline: one function of numbered steps, the only place that knows all policies."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import torch
import transformers

from omni.checkpoint import UNKNOWN, auto_dtype, read_facts
from omni.errors import Mistake, StageSetupError
from omni.memory_planner import settle
from omni.messages import LoadProgress
from omni.registry import CheckpointRef
from omni.sizes import parse_seconds
from omni.spec import DiffusionSpec
from omni.stage import Report, StageContext
from stages.diffusion.batching.locks import Locks, lock_components
from stages.diffusion.batching.meeting import Meeting
from stages.diffusion.check import call_mistakes, check
from stages.diffusion.checkpoint import (
    absent_components,
    components,
    find_folder,
    has_variant,
    is_path,
    pipeline_name,
    read_index,
)
from stages.diffusion.denoiser import Seam, find_denoisers, find_text_encoders, pixels_per_value
from stages.diffusion.faults import setup_faults
from stages.diffusion.signature import Signature, signature_of
from stages.policies.load import ComponentRequest, load_components
from stages.policies.offload.apply import Offload, apply_offload
from stages.policies.offload.correction import Correction


class Built(msgspec.Struct, frozen=True):
    """A pipeline that is ready for calls."""

    pipeline: Any
    """Never called itself: every request forks it."""
    signature: Signature
    seams: tuple[Seam, ...]
    device: str
    dtype: torch.dtype
    offload: Offload | None = None
    """The policy that moves its weights; None when all are on `device`."""
    correction: Correction | None = None
    """Corrects the policy's plan by what requests take."""
    meeting: Meeting | None = None
    """Where requests join their denoise steps; None: one request at a time."""
    locks: Locks | None = None
    """One thread at a time in what several requests use, where several run at once."""


def build_pipeline(context: StageContext, report: Report) -> Built:
    """Load the pipeline that `context.spec` names and make it ready.

    Raises StageSetupError with the cause and the remedy.
    """
    spec, stage, device = context.spec, context.name, context.device
    assert isinstance(spec, DiffusionSpec)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise StageSetupError(stage, f"torch sees no GPU, and the stage wants '{device}'", "set device: cpu")
    if context.num_threads:
        torch.set_num_threads(context.num_threads)
    with setup_faults(stage, spec.model, device):
        # 1. The checkpoint's folder, downloaded when it is a hub id that is not here yet
        folder = _folder(spec, context)
        # 2. The class and the dtype
        pipeline_class = _pipeline_class(spec, folder)
        dtype = choose_dtype(spec, device)
        known = pipeline_class is not diffusers.DiffusionPipeline
        facts = read_facts(CheckpointRef(str(folder), variant=spec.variant), "") if known else UNKNOWN
        context = msgspec.structs.replace(context, memory=settle(context.memory, spec, facts))
        sizes = facts.components
        # 3. The components, all at once, then the pipeline around them
        loaded = _load_components(context, pipeline_class, folder, sizes, dtype, report)
        with _any_component_types():
            pipeline = pipeline_class.from_pretrained(folder, dtype=dtype, **_load_options(spec), **loaded)
        # 4. Onto the device, as a whole or as the plan's offload policy says; ready for inference
        offload = _offload(pipeline, context)
        if offload is None:
            pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
    with contextlib.ExitStack() as undo:
        if offload is not None:
            undo.callback(offload.reset)
        # 5. The call, now that the class is known for sure
        signature = signature_of(type(pipeline))
        if mistakes := call_mistakes(spec.call, signature):
            raise _mistaken(stage, mistakes)
        # 6. One request at a time in each component, where several run at once
        meeting = _meeting(spec)
        locks = None if meeting is None else lock_components(pipeline)
        # 7. The seam in each denoiser's forward, and in text encoders' where their calls are joined too
        seams = _seams(pipeline, meeting)
        # 8. What requests take corrects the plan, where there is one
        correction = Correction.of(stage, offload, context.memory, spec, facts)
        undo.pop_all()
    total = sum(sizes.values())
    report(LoadProgress(stage=stage, component="", done_bytes=total, total_bytes=total, state="ready"))
    return Built(pipeline, signature, seams, device, dtype, offload, correction, meeting, locks)


def _meeting(spec: DiffusionSpec) -> Meeting | None:
    """The meeting point of a stage that works on several requests at once."""
    batching = spec.batching
    if batching.max_requests == 1:
        return None
    return Meeting(batching.max_requests, batching.max_pixels, parse_seconds(batching.wait))


def _seams(pipeline: Any, meeting: Meeting | None) -> tuple[Seam, ...]:
    pixels = pixels_per_value(pipeline)
    seams = [Seam(denoiser, meeting, pixels) for denoiser in find_denoisers(pipeline).values()]
    if meeting is not None:
        seams += [Seam(encoder, meeting, 0.0, is_denoiser=False) for encoder in find_text_encoders(pipeline).values()]
    return tuple(seams)


def choose_dtype(spec: DiffusionSpec, device: str) -> torch.dtype:
    """The spec's dtype, or what `auto` is on `device`."""
    dtype = getattr(torch, auto_dtype(device) if spec.dtype == "auto" else spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _offload(pipeline: Any, context: StageContext) -> Offload | None:
    spec, memory = context.spec, context.memory
    assert isinstance(spec, DiffusionSpec)
    if memory is None or memory.policy == "none":
        return None
    modules = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module) and any(tensor.device.type == "cpu" for tensor in part.parameters())
    }
    order = (pipeline.model_cpu_offload_seq or "").split("->")
    return apply_offload(modules, memory, context.device, spec.offload, order=order)


def _folder(spec: DiffusionSpec, context: StageContext) -> Path:
    folder = find_folder(spec, context.base_dir)
    if folder is None and not is_path(spec.model):
        options = _load_options(spec)
        folder = Path(diffusers.DiffusionPipeline.download(spec.model, revision=spec.revision, **options))
    mistakes = check(spec, context.base_dir)
    if folder is None or mistakes:
        raise _mistaken(context.name, mistakes)
    return folder


def _mistaken(stage: str, mistakes: list[Mistake]) -> StageSetupError:
    return StageSetupError(stage, "; ".join(map(str, mistakes)), f"change stages.{stage}")


def _pipeline_class(spec: DiffusionSpec, folder: Path) -> Any:
    """The diffusers class; DiffusionPipeline itself, which finds custom code, when diffusers has none of that name."""
    return getattr(diffusers, pipeline_name(spec, folder) or "", diffusers.DiffusionPipeline)


def _load_options(spec: DiffusionSpec) -> dict[str, Any]:
    options: dict[str, Any] = {"use_safetensors": True, "variant": spec.variant}
    return {**options, "trust_remote_code": True} if spec.trust_remote_code else options


def _load_components(
    context: StageContext,
    pipeline_class: Any,
    folder: Path,
    sizes: dict[str, int],
    dtype: torch.dtype,
    report: Report,
) -> dict[str, torch.nn.Module | None]:
    """The models that the pipeline takes. `sizes`: bytes of each one's weights.

    The rest (tokenizers, noise schedulers, models of custom code) loads with the pipeline. Components that the
    checkpoint was saved without are None: embeddings then come in.
    """
    spec = context.spec
    assert isinstance(spec, DiffusionSpec)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    wanted, index = inspect.signature(pipeline_class.__init__).parameters, read_index(folder)
    absent = {name: None for name in absent_components(index) if name in wanted or not sizes}
    requests = [
        _request(context, name, model_class, folder / name, dtype)
        for name, (library, class_name) in components(index).items()
        if name in sizes and name in wanted and (model_class := _model_class(library, class_name)) is not None
    ]
    total = sum(sizes.values())
    done: dict[str, int] = {}

    def progress(component: str, done_bytes: int, _: int) -> None:
        done[component] = done_bytes
        so_far = min(sum(done.values()), total)
        report(LoadProgress(stage=context.name, component=component, done_bytes=so_far, total_bytes=total))

    for request in requests:
        progress(request.name, 0, 0)
    from_disk = context.memory is not None and context.memory.policy == "disk"
    return {**absent, **load_components(requests, spec.load, progress, from_disk=from_disk)}


@contextlib.contextmanager
def _any_component_types() -> Iterator[None]:
    """Without diffusers' warning that a component is of another class than the pipeline's type hints name.

    The hints name the classes of the released models; a checkpoint that names another one means it.
    """
    log = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def is_kept(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Expected types for ")

    log.addFilter(is_kept)
    try:
        yield
    finally:
        log.removeFilter(is_kept)


def _model_class(library: str, class_name: str) -> Any:
    """The class of a component: of diffusers, of transformers, or of one of diffusers' own pipelines; else None."""
    libraries = ("diffusers", "transformers")
    home = importlib.import_module(library) if library in libraries else getattr(diffusers.pipelines, library, None)
    found = getattr(home, class_name, None)
    kinds = (diffusers.ModelMixin, transformers.PreTrainedModel)
    return found if isinstance(found, type) and issubclass(found, kinds) else None


def _request(context: StageContext, name: str, model_class: Any, folder: Path, dtype: torch.dtype) -> ComponentRequest:
    assert isinstance(context.spec, DiffusionSpec)
    variant = context.spec.variant
    return ComponentRequest(
        name=name,
        model_class=model_class,
        folder=folder,
        library="diffusers" if issubclass(model_class, diffusers.ModelMixin) else "transformers",
        dtype=dtype,
        variant=variant if has_variant(folder, variant) else None,
        target="host" if context.memory is not None and context.memory.moves(name) else "device",
        device=context.device,
        shares=context.memory is not None and context.memory.shares_host,
    )
