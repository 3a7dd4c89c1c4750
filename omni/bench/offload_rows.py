"""One row of `omni bench offload`, in a process of its own: load a denoiser, set a way to offload up, take steps."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from omni.bench.checkpoints import Component
from omni.bench.fresh import Memory, MemoryMeter
from omni.bench.load_rows import find_class, import_libraries, link_rate, prepare_load, start_device, unique_tensors
from omni.bench.page_cache import make_warm
from omni.memory import MemoryPlan
from omni.models.denoiser_inputs import build_inputs
from omni.registry import import_string
from omni.spec import OffloadSpec

NUM_SWAPS = 3


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a row does."""

    way: str
    """link, resident, layerwise, component, group, leaf or hook."""
    component: Component
    dtype: str
    device: str
    sizes: tuple[tuple[int, int, int], ...]
    """Width, height and frames of what is denoised."""
    steps: int
    threads: int = 4
    resident_share: float = 0.0
    """layerwise: of the weights that stay on the device."""
    load_policy: str
    offload_policy: str
    """Modules of Omni's policies."""


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """Denoise steps of one size."""

    first_seconds: float
    """Of the step before those that count, which finds nothing ready."""
    seconds: tuple[float, ...]
    bytes_in: float | None = None
    """Copied to the device in a step, on average; None where nobody counts."""
    copies_in: float | None = None
    digest: str
    """Of the output, every byte."""
    is_sound: bool
    """Finite, and not one number throughout."""


class Offloaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a row gives; rates in bytes a second."""

    link_rate: float = 0.0
    load_seconds: float = 0.0
    setup_seconds: float = 0.0
    weight_bytes: int = 0
    steps: tuple[Steps, ...] = ()
    swap_seconds: tuple[float, ...] = ()
    """What a call took longer because the weights had to come to the device first (and go, where they do)."""
    bytes_out: int | None = None
    """Weights copied from the device back to the host; None where nobody counts."""
    device_bytes: int | None = None
    """Weights and room for weights on the device."""
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    """Device memory during the steps, as torch counts it."""
    memory: Memory | None = None
    pinned_bytes: int = 0
    """What torch's allocator of pinned memory holds."""


class Handle:
    """A denoiser with a way to offload on it."""

    def __init__(self, module: Any, offload: Any = None, evict: Callable[[], object] | None = None) -> None:
        self.module = module
        self.offload = offload
        """Omni's policy at work."""
        self.evict = evict
        """Makes the weights leave the device, as another component's call would; None where they never do."""

    def counters(self) -> Any:
        """Copies and bytes so far; None where nobody counts."""
        return self.offload.counters if self.offload is not None else None


def run(job: Mapping[str, Any]) -> Offloaded:
    """Carry out a Job, given as JSON."""
    order = msgspec.convert(job, Job)
    start_device(order.device)
    if order.way == "link":
        return Offloaded(link_rate=link_rate(order.device))
    import_libraries()
    load, set_up = WAYS[order.way]
    find_class(order.component)
    make_warm([Path(file) for file in order.component.files])
    meter = MemoryMeter()
    begin = time.perf_counter()
    module = load(order)
    _synchronize(order.device)
    loaded = time.perf_counter()
    module.eval().requires_grad_(False)
    handle = set_up(order, module)
    ready = time.perf_counter()  # copies may still be under way; the first step waits for what it needs
    if order.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        steps = tuple(_take_steps(order, handle, size) for size in order.sizes)
        swaps = _swap(order, handle) if handle.evict else ()
    counters, on_gpu = handle.counters(), order.device != "cpu"
    return Offloaded(
        load_seconds=loaded - begin,
        setup_seconds=ready - loaded,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in unique_tensors({"": module})),
        steps=steps,
        swap_seconds=swaps,
        bytes_out=counters.bytes_out if counters is not None else None,
        device_bytes=handle.offload.device_bytes if handle.offload is not None else None,
        peak_allocated_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_gpu else None,
        memory=meter.read(),
        pinned_bytes=torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) if on_gpu else 0,
    )


# Loading -----------------------------------------------------------------------------------------------------------


def _load_omni(job: Job, target: str) -> Any:
    part = job.component
    return prepare_load(job.load_policy, [part], job.dtype, target, job.device, job.threads)()[part.name]


def _load_library(job: Job) -> Any:
    options = {"variant": job.component.variant} if job.component.variant else {}
    model_class = find_class(job.component)
    return model_class.from_pretrained(
        job.component.folder, dtype=getattr(torch, job.dtype), use_safetensors=True, **options
    )


# Setting up --------------------------------------------------------------------------------------------------------


def _apply(job: Job, components: dict[str, Any], policy: str, resident_bytes: int) -> Any:
    apply_offload = import_string(f"{job.offload_policy}:apply_offload")
    spec = OffloadSpec(policy=policy, resident=f"{resident_bytes}B")  # type: ignore[arg-type]
    return apply_offload(components, MemoryPlan(policy=policy), job.device, spec)  # type: ignore[arg-type]


def _set_up_layerwise(job: Job, module: Any) -> Handle:
    size = sum(tensor.nbytes for tensor in module.parameters())
    return Handle(module, _apply(job, {job.component.name: module}, "layerwise", int(size * job.resident_share)))


def _set_up_component(job: Job, module: Any) -> Handle:
    """In turns with a component so small that it stands for nothing but a call of another one."""
    other = torch.nn.Linear(1, 1).requires_grad_(False)
    offload = _apply(job, {job.component.name: module, "other": other}, "component", 0)
    empty = torch.zeros(1, 1, device=job.device)
    return Handle(module, offload, lambda: other(empty))


def _set_up_group(job: Job, module: Any, offload_type: str) -> Handle:
    module.enable_group_offload(
        onload_device=torch.device(job.device),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
        use_stream=True,
        record_stream=True,
    )
    return Handle(module)


def _set_up_hook(job: Job, module: Any) -> Handle:
    """What a pipeline's enable_model_cpu_offload puts on each of its models."""
    from accelerate import cpu_offload_with_hook

    module, hook = cpu_offload_with_hook(module, job.device)
    return Handle(module, evict=hook.offload)


WAYS: dict[str, tuple[Callable[[Job], Any], Callable[[Job, Any], Handle]]] = {
    "resident": (lambda job: _load_omni(job, "device"), lambda job, module: Handle(module)),
    "layerwise": (lambda job: _load_omni(job, "host"), _set_up_layerwise),
    "component": (lambda job: _load_omni(job, "host"), _set_up_component),
    "group": (_load_library, lambda job, module: _set_up_group(job, module, "block_level")),
    "leaf": (_load_library, lambda job, module: _set_up_group(job, module, "leaf_level")),
    "hook": (_load_library, _set_up_hook),
}


# Denoise steps -----------------------------------------------------------------------------------------------------


def _inputs(job: Job, handle: Handle, size: tuple[int, int, int]) -> dict[str, Any]:
    width, height, num_frames = size
    dtype = getattr(torch, job.dtype)
    return build_inputs(handle.module, height, width, num_frames, device=job.device, dtype=dtype)


def _take_steps(job: Job, handle: Handle, size: tuple[int, int, int]) -> Steps:
    """One step that does not count, then steps one after another, without waiting for the device in between."""
    inputs = _inputs(job, handle, size)
    begin = time.perf_counter()
    output = handle.module(**inputs)
    _synchronize(job.device)
    first_seconds = time.perf_counter() - begin
    digest, is_sound = _describe(output)
    before = handle.counters()
    clock = _Clock(job.device)
    for _ in range(job.steps):
        handle.module(**inputs)
        clock.tick()
    seconds = clock.read()
    after = handle.counters()
    counted = before is not None and after is not None
    return Steps(
        first_seconds=first_seconds,
        seconds=seconds,
        bytes_in=(after.bytes_in - before.bytes_in) / job.steps if counted else None,
        copies_in=(after.num_copies_in - before.num_copies_in) / job.steps if counted else None,
        digest=digest,
        is_sound=is_sound,
    )


def _swap(job: Job, handle: Handle) -> tuple[float, ...]:
    """Seconds that a call takes longer when the weights were away; where they are copied back, with that."""
    assert handle.evict is not None
    inputs = _inputs(job, handle, job.sizes[0])
    swaps = []
    for _ in range(NUM_SWAPS):
        times = []
        for action in (handle.evict, lambda: handle.module(**inputs), lambda: handle.module(**inputs)):
            _synchronize(job.device)
            begin = time.perf_counter()
            action()
            _synchronize(job.device)
            times.append(time.perf_counter() - begin)
        leaving, call, again = times
        swaps.append(leaving + call - again)
    return tuple(swaps)


class _Clock:
    """Times between ticks, where the device has come to them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._ticks: list[Any] = []
        self.tick()

    def tick(self) -> None:
        if self._device == "cpu":
            self._ticks.append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ticks.append(event)

    def read(self) -> tuple[float, ...]:
        """Seconds."""
        pairs = zip(self._ticks, self._ticks[1:], strict=False)
        if self._device == "cpu":
            return tuple(end - begin for begin, end in pairs)
        torch.cuda.synchronize()
        return tuple(begin.elapsed_time(end) / 1000 for begin, end in pairs)


def _describe(output: Any) -> tuple[str, bool]:
    """A digest of every byte of an output, and whether its numbers are finite and differ."""
    digest, is_sound = hashlib.sha256(), True
    for tensor in _tensors(output):
        is_sound = is_sound and bool(tensor.isfinite().all()) and bool((tensor != tensor.view(-1)[0]).any())
        digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest(), is_sound


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output if part is not None for tensor in _tensors(part)]


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
