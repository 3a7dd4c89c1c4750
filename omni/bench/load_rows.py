"""One row of `omni bench load`, in a process of its own: load a checkpoint in one way, once.

Imports, the device's start and the state of the page cache come before the time is taken.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from omni.bench.checkpoints import Component
from omni.bench.fresh import Memory, MemoryMeter
from omni.bench.page_cache import make_cold, make_warm, wake_memory
from omni.registry import import_string
from omni.spec import LoadSpec

CHUNK_BYTES = 16 << 20
PAGE_BYTES = 4096
SAMPLES = 4096
"""Numbers of each tensor that the checksum covers, evenly spread."""
LINK_BYTES = 1 << 30
LINK_COPIES = 8


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a row does."""

    way: str
    """omni, library, raw or link."""
    components: tuple[Component, ...]
    dtype: str
    device: str
    cold: bool = False
    fresh_bytes: int = 0
    """Memory that the row takes anew, page cache included."""
    threads: int = 4
    policy: str
    """The module of Omni's load policy."""
    target: str = "device"
    device_map: bool = False
    copy: bool = False
    """Copy all that was loaded into fresh memory."""
    fresh: bool = False
    """Raw reads fill fresh memory that holds all, instead of reading over the same bytes again and again."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a row gives."""

    seconds: float
    num_bytes: int
    """Of the weights as they were loaded, or of what was read or copied."""
    memory: Memory
    checksum: str = ""
    doubt: str = ""
    """Why the files may not have been cold."""


def run(job: Mapping[str, Any]) -> Loaded:
    """Carry out a Job, given as JSON."""
    order = msgspec.convert(job, Job)
    files = [Path(file) for component in order.components for file in component.files]
    prepared = WAYS[order.way](order)
    start_device(order.device)
    doubt = make_cold(files) if order.cold else ""
    if not order.cold:
        make_warm(files)
    wake_memory(order.fresh_bytes)
    meter = MemoryMeter()
    begin = time.perf_counter()
    result = prepared()
    if order.device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    memory = meter.read()
    if isinstance(result, dict):
        num_bytes = sum(tensor.nbytes for tensor in unique_tensors(result))
        return Loaded(seconds=seconds, num_bytes=num_bytes, memory=memory, checksum=checksum(result), doubt=doubt)
    num_bytes = sum(file.stat().st_size for file in files)
    if isinstance(result, float):  # bytes a second, instead of the time it took
        seconds = num_bytes / result
    return Loaded(seconds=seconds, num_bytes=num_bytes, memory=memory, doubt=doubt)


def find_class(component: Component) -> Any:
    """The component's class in its library."""
    return getattr(importlib.import_module(component.library), component.class_name)


def prepare_load(
    policy: str, components: Sequence[Component], dtype: str, target: str, device: str, threads: int
) -> Callable[[], dict[str, Any]]:
    """What loads components through Omni's load policy, all at once; name -> module. `policy`: its module."""
    load, request = (import_string(f"{policy}:{name}") for name in ("load_components", "ComponentRequest"))
    requests = [
        request(
            name=component.name,
            model_class=find_class(component),
            folder=Path(component.folder),
            library=component.library,
            dtype=getattr(torch, dtype),
            variant=component.variant,
            target=target,
            device=device,
            options={},
        )
        for component in components
    ]

    def load_all() -> dict[str, Any]:
        modules: dict[str, Any] = load(requests, LoadSpec(threads=threads), lambda name, done, total: None)
        return modules

    return load_all


def _prepare_omni(job: Job) -> Callable[[], dict[str, Any]]:
    """Omni's load policy, all components at once, to the stage's target; what may be only mapped is touched."""
    import_libraries()
    load = prepare_load(job.policy, job.components, job.dtype, job.target, job.device, job.threads)

    def load_all() -> dict[str, Any]:
        modules = load()
        if job.target == "device":  # a host master is filled, nothing of it is only mapped
            touch(modules)
        return modules

    return load_all


def _prepare_library(job: Job) -> Callable[[], dict[str, Any]]:
    """from_pretrained, component by component as a pipeline does it; every page is touched."""
    import_libraries()
    classes = {component.name: find_class(component) for component in job.components}

    def load_all() -> dict[str, Any]:
        modules: dict[str, Any] = {}
        for component in job.components:
            options: dict[str, Any] = {"variant": component.variant} if component.variant else {}
            if job.device_map:
                options["device_map"] = job.device
            module = classes[component.name].from_pretrained(
                component.folder, dtype=getattr(torch, job.dtype), use_safetensors=True, **options
            )
            modules[component.name] = module if job.device_map else module.to(job.device)
        if job.copy:
            for tensor in unique_tensors(modules):
                tensor.data = tensor.data.clone()
        touch(modules)
        return modules

    return load_all


def _prepare_raw(job: Job) -> Callable[[], None]:
    """Plain preads of all files in chunks, by so many threads."""
    files = [Path(file) for component in job.components for file in component.files]
    memory_class = import_string("stages.memory.host:HostMemory")
    scratch = [memory_class(CHUNK_BYTES).bytes.fill_(1).numpy() for _ in range(job.threads)]

    def read_all() -> None:
        chunks = [(file, start) for file in files for start in range(0, file.stat().st_size, CHUNK_BYTES)]
        fresh = memory_class(len(chunks) * CHUNK_BYTES).bytes.numpy() if job.fresh else None
        descriptors = {file: os.open(file, os.O_RDONLY) for file in files}
        places = iter(enumerate(chunks))
        lock = threading.Lock()

        def read(number: int) -> None:
            while True:
                with lock:
                    place = next(places, None)
                if place is None:
                    return
                index, (file, start) = place
                base = 0 if fresh is None else index * CHUNK_BYTES
                target = memoryview(scratch[number] if fresh is None else fresh)[base : base + CHUNK_BYTES]
                done = 0
                while done < len(target) and (count := os.preadv(descriptors[file], [target[done:]], start + done)):
                    done += count

        threads = [threading.Thread(target=read, args=(number,)) for number in range(job.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for descriptor in descriptors.values():
            os.close(descriptor)

    return read_all


def _prepare_link(job: Job) -> Callable[[], float]:
    return lambda: link_rate(job.device)


def link_rate(device: str) -> float:
    """Bytes a second from pinned memory to the device; on a CPU, those of a copy."""
    is_gpu = device != "cpu"
    source = torch.ones(LINK_BYTES if is_gpu else LINK_BYTES // 16, dtype=torch.uint8, pin_memory=is_gpu)
    target = torch.ones_like(source, device=device)
    seconds = []
    for _ in range(LINK_COPIES):
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return float(source.nbytes / statistics.median(seconds))


def start_device(device: str) -> None:
    """Have a GPU's context made, and make it the current one."""
    if device != "cpu":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)


def import_libraries() -> None:
    """Everything that from_pretrained would import within the time; no bars."""
    import accelerate  # noqa: F401
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


WAYS: dict[str, Callable[[Job], Callable[[], Any]]] = {
    "omni": _prepare_omni,
    "library": _prepare_library,
    "raw": _prepare_raw,
    "link": _prepare_link,
}


def unique_tensors(modules: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Every parameter and buffer once, also where modules share one."""
    seen: set[int] = set()
    for module in modules.values():
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def touch(modules: Mapping[str, Any]) -> None:
    """Look at every page of tensors in main memory, so that what was only mapped is paid for."""
    for tensor in unique_tensors(modules):
        if tensor.device.type == "cpu" and tensor.numel():
            tensor.detach().reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum()


def checksum(modules: Mapping[str, Any]) -> str:
    """Of names, shapes, dtypes and evenly spread numbers of everything that a checkpoint holds."""
    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().double().numpy()
            digest.update(f"{name} {key} {list(tensor.shape)} {tensor.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()
