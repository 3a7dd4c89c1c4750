"""Loads components: blueprints first, then room for their weights, then all bytes at once."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from omni.sizes import parse_bytes
from omni.spec import LoadSpec
from stages.device import use_device
from stages.memory.host import CHECK_BYTES, HostMemory, region_of
from stages.memory.limits import available_bytes, check_room
from stages.policies.load.blueprint import DTYPES, Blueprint, ComponentRequest, Merge, Target, Unsupported
from stages.policies.load.catalog import Entry, UnknownDtype, read_catalog
from stages.policies.load.chunks import plan_chunks
from stages.policies.load.files import Files
from stages.policies.load.pinning import PinAsFilled
from stages.policies.load.places import allocate_device, allocate_host, map_tensor, share_key, target_bytes
from stages.policies.load.probe import CACHED_SHARE, FAST_BYTES_PER_SECOND, cached_share, direct_rate
from stages.policies.load.reader import (
    ConvertRoute,
    FillRoute,
    Job,
    LeaveRoute,
    PopulateRoute,
    Progress,
    Route,
    StagedRoute,
    Targets,
    read_all,
)
from stages.policies.load.staging import CudaLink, Destination, HostStaging, RingStaging, Staging

log = logging.getLogger(__name__)

MIN_CHUNK_BYTES = 64 << 10
"""Smaller chunks only cost."""
RING_BYTES = 192 << 20
"""What all threads together read into on the way to a device, from the page cache: it stays in the processor's cache,
so that the device does not read from memory what was just written. Larger chunks than that leaves halve the rate."""

_one_at_a_time = threading.Lock()
"""Held while a library builds or finishes a module: for that time it changes torch for the whole process."""


def load_components(
    requests: Sequence[ComponentRequest], spec: LoadSpec, progress: Progress, *, from_disk: bool = False
) -> dict[str, torch.nn.Module]:
    """Load all components at once, through one pool of reader threads; name -> module in evaluation mode.

    With `spec.enabled` false, and where a component needs it, one after another by the library itself.

    With target `host` the tensors of a module lie in one region of host memory, in the order of the module; in the
    mapped files with `reader: mmap`, or with `from_disk`, which overrides the reader.
    `progress(component, done_bytes, total_bytes)` is called by this thread. Raises UsageError with file and tensor;
    wrong keys, shapes and files are found before any memory is taken.
    """
    if from_disk:
        spec = msgspec.structs.replace(spec, reader="mmap")
    modules: dict[str, torch.nn.Module] = {}
    blueprints: list[Blueprint] = []
    for request in requests:
        if not spec.enabled:
            modules[request.name] = load_by_library(request, progress)
            continue
        try:
            with no_collection():
                blueprints.append(plan(request))
        except Unsupported as reason:
            log.warning("component '%s' is loaded by %s itself: %s", request.name, request.library, reason)
            modules[request.name] = load_by_library(request, progress)
    Load(blueprints, spec).run(progress)
    for blueprint in blueprints:
        modules[blueprint.request.name] = blueprint.module
    return {request.name: modules[request.name].requires_grad_(False) for request in requests}


def plan(request: ComponentRequest) -> Blueprint:
    """The component's blueprint. Raises Unsupported, or UsageError when the checkpoint is broken or does not fit."""
    try:
        entries = read_catalog(request.folder, request.variant)
    except UnknownDtype as error:
        raise Unsupported(str(error)) from error
    if request.library == "diffusers":  # each takes long to import
        from stages.policies.load.from_diffusers import plan_diffusers as plan_by_library
    else:
        from stages.policies.load.from_transformers import plan_transformers as plan_by_library
    with _one_at_a_time:
        return plan_by_library(request, entries)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: thousands of modules and tensors come to stay, and would set off several of them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_by_library(request: ComponentRequest, progress: Progress) -> torch.nn.Module:
    """The component as its library loads it, on the device that the request wants."""
    total = sum(file.stat().st_size for file in request.folder.glob("*.safetensors"))
    progress(request.name, 0, total)
    variant = {"variant": request.variant} if request.variant else {}
    module: torch.nn.Module = request.model_class.from_pretrained(  # type: ignore[attr-defined]
        str(request.folder), dtype=request.dtype, use_safetensors=True, **variant, **request.options
    )
    module = module.to("cpu" if request.target == "host" else request.device).eval()
    progress(request.name, total, total)
    return module


class Load:
    """One load of several blueprints: room for their weights, and the chunks that fill it."""

    def __init__(self, blueprints: Sequence[Blueprint], spec: LoadSpec) -> None:
        self._blueprints = blueprints
        self._spec = spec
        self._chunk_bytes = max(parse_bytes(spec.chunk), MIN_CHUNK_BYTES)
        self._files = open_files(blueprints, spec.reader)
        self._jobs: list[Job] = []
        self._memories: dict[str, HostMemory] = {}
        """Component -> the region that is its master."""
        self._pinning = PinAsFilled() if torch.cuda.is_available() else None
        self._there: set[str] = set()
        """Components that somebody else has filled."""
        self._host_staging = functools.partial(HostStaging, self._chunk_bytes)
        self._device_stagings: dict[torch.device, Callable[[], Staging]] = {}

    def run(self, progress: Progress) -> None:
        """Fill and finish the modules. Raises UsageError, torch.OutOfMemoryError."""
        modules = {blueprint.request.name: blueprint.module for blueprint in self._blueprints}
        try:
            self._check_room()
            # In one order everywhere: two processes that wait for each other's regions would wait for ever
            for blueprint in sorted(self._blueprints, key=lambda blueprint: blueprint.request.folder.resolve()):
                with no_collection():
                    tensors = self._place(blueprint)
                    blueprint.bind(tensors)
                    if blueprint.request.name not in self._there:
                        self._plan_jobs(blueprint, tensors)
            totals = {blueprint.request.name: blueprint.num_bytes for blueprint in self._blueprints}
            read_all(self._jobs, self._files, self._spec.threads, totals, progress)
            for blueprint in self._blueprints:
                if blueprint.request.name in self._there:
                    progress(blueprint.request.name, blueprint.num_bytes, blueprint.num_bytes)
                else:
                    self._merge(blueprint)
                with _one_at_a_time:
                    blueprint.finish()
                if blueprint.request.target == "device":
                    move_rest(blueprint.module, torch.device(blueprint.request.device))
            for name, memory in self._memories.items():
                memory.filled()
                if memory.is_shared:
                    own_buffers(modules[name])
            if self._pinning is not None:
                self._pinning.finish()
                for memory in self._memories.values():
                    memory.pin()
        except BaseException:
            if self._pinning is not None:
                self._pinning.cancel()
            for memory in self._memories.values():
                memory.close()
            raise
        finally:
            self._files.close()
        for name, memory in self._memories.items():
            weakref.finalize(modules[name], memory.close).atexit = False

    def _check_room(self) -> None:
        """Raise UsageError when the host lacks memory for all components together: none of it is touched yet, so that
        each by itself would seem to fit."""
        needed = sum(
            target_bytes(target)
            for blueprint in self._blueprints
            if is_on_cpu(blueprint.request) and not blueprint.request.shares
            for target in self._fresh(blueprint)
        )
        if needed >= CHECK_BYTES:
            check_room(needed, "a copy of the weights")

    def _fresh(self, blueprint: Blueprint) -> list[Target]:
        """The targets that do not stay in their mapped files."""
        maps_equal = maps(blueprint.request, self._spec.reader)
        return [
            target
            for target in blueprint.targets
            if not (maps_equal and target.source and DTYPES[target.source.dtype] == target.dtype)
        ]

    def _place(self, blueprint: Blueprint) -> dict[str, torch.Tensor]:
        """Name -> tensor of each target: mapped files where they are to stay, else fresh memory."""
        request, fresh = blueprint.request, self._fresh(blueprint)
        names = {target.name for target in fresh}
        mapped = {
            target.name: map_tensor(target.source, self._files)
            for target in blueprint.targets
            if target.source and target.name not in names
        }
        if not fresh:
            return mapped
        if is_on_cpu(request):
            tensors, memory = allocate_host(
                fresh, share_key(blueprint, fresh) if request.shares and request.target == "host" else None
            )
            if memory.private_reason:
                log.warning("component '%s' is not shared with others: %s", request.name, memory.private_reason)
            if memory.is_filled:
                self._there.add(request.name)
            if request.target == "host":
                self._memories[request.name] = memory
        else:
            tensors = allocate_device(fresh, torch.device(request.device))
        return {**mapped, **tensors}

    def _plan_jobs(self, blueprint: Blueprint, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add the chunks of one component."""
        request = blueprint.request
        populated: list[Entry] = [entry for merge in blueprint.merges for entry in merge.sources]
        mapped: list[Entry] = []
        filled: dict[str, Destination] = {}
        changed: dict[str, Destination] = {}
        entries = {target.source.name: target.source for target in blueprint.targets if target.source}
        buffered = is_on_cpu(request) and self._files.method == "buffered"
        for target in blueprint.targets:
            entry = target.source
            if entry is None:
                continue
            same = DTYPES[entry.dtype] == target.dtype
            if same and maps(request, self._spec.reader):
                mapped.append(entry)
            else:
                to = Destination.of(DTYPES[entry.dtype], tensors[target.name])
                (filled if same and buffered else changed)[entry.name] = to
        self._add(request, populated, PopulateRoute())
        self._add(request, mapped, PopulateRoute() if self._populates(request) else LeaveRoute())
        self._add(request, [entries[name] for name in filled], FillRoute(filled), filled)
        route = ConvertRoute(changed) if buffered else StagedRoute(changed, self._staging_for(request))
        self._add(request, [entries[name] for name in changed], route, changed)

    def _add(
        self, request: ComponentRequest, entries: list[Entry], route: Route, targets: Targets | None = None
    ) -> None:
        """Add the chunks of these entries, which go to `targets`, if anywhere."""
        size = self._ring_chunk_bytes if isinstance(route, StagedRoute) else self._chunk_bytes
        jobs = [Job(request.name, chunk, route) for chunk in plan_chunks(entries, size)]
        memory = self._memories.get(request.name)
        if self._pinning is not None and memory is not None and targets is not None:
            jobs = self._pinning.watch(jobs, memory, targets)
        self._jobs += jobs

    @property
    def _ring_chunk_bytes(self) -> int:
        """What is read at once on the way to a device."""
        if self._files.method == "direct":
            return self._chunk_bytes
        share = RING_BYTES // (self._spec.threads * RingStaging.NUM_BUFFERS)
        return max(MIN_CHUNK_BYTES, min(self._chunk_bytes, share))

    def _populates(self, request: ComponentRequest) -> bool:
        """Whether to read mapped files now: not for offload, which reads by block, nor what memory cannot hold."""
        return request.target == "device" and sum(b.num_bytes for b in self._blueprints) < available_bytes()

    def _staging_for(self, request: ComponentRequest) -> Callable[[], Staging]:
        if is_on_cpu(request):
            return self._host_staging
        device = torch.device(request.device)

        def make() -> Staging:
            use_device(request.device)
            return RingStaging(CudaLink(device), self._ring_chunk_bytes, pin=True)

        return self._device_stagings.setdefault(device, make)

    def _merge(self, blueprint: Blueprint) -> None:
        """Make the tensors that are not whole in the checkpoint, from its mapped files into their places."""
        state = blueprint.module.state_dict()

        def make(merge: Merge) -> None:
            sources = {entry.name: map_tensor(entry, self._files) for entry in merge.sources}
            for name, tensor in merge.convert(sources).items():
                state[name].copy_(tensor)

        if blueprint.merges:
            with ThreadPoolExecutor(self._spec.threads, thread_name_prefix="merge") as pool:
                list(pool.map(make, blueprint.merges))


def move_rest(module: torch.nn.Module, device: torch.device) -> None:
    """Move what no checkpoint holds to `device`; `Module.to` would look at each weight, which takes longer."""
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type != device.type:
                    tensors[name] = tensor.to(device)  # type: ignore[assignment]


def own_buffers(module: torch.nn.Module) -> None:
    """Give a module buffers of its own: code may write to them, and the shared region is everybody's."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and region_of(buffer) is not None:
                owner._buffers[name] = buffer.clone()


def maps(request: ComponentRequest, reader: str) -> bool:
    """Whether tensors of equal dtype stay in their mapped files."""
    return is_on_cpu(request) and (reader == "mmap" or (reader == "auto" and request.target == "device"))


def is_on_cpu(request: ComponentRequest) -> bool:
    """Whether the weights end in the CPU's memory."""
    return request.target == "host" or torch.device(request.device).type == "cpu"


def open_files(blueprints: Sequence[Blueprint], reader: str) -> Files:
    """The files that are not mapped, read past the page cache when they are not in it and the disk is fast."""
    files = sorted(
        {
            target.source.file
            for blueprint in blueprints
            for target in blueprint.targets
            if target.source and not (maps(blueprint.request, reader) and DTYPES[target.source.dtype] == target.dtype)
        }
    )
    if not files:
        return Files("buffered")
    cached = cached_share(files) >= CACHED_SHARE
    if reader in ("buffered", "mmap") or (reader == "auto" and cached):
        return Files("buffered", cached=cached)
    rate = direct_rate(files[0])
    if isinstance(rate, str):
        log.log(
            logging.INFO if reader == "auto" else logging.WARNING, "files are read through the page cache: %s", rate
        )
        return Files("buffered")
    return Files("direct" if reader == "direct" or rate >= FAST_BYTES_PER_SECOND else "buffered")
