"""Rule 3 of the planner: where the weights of a stage live, by a budget of device memory. Pure arithmetic.

Every component either stays on the device, takes turns with others (copied whole, once a request), or streams (its
blocks are copied through a few slots each time it runs). All combinations are weighed, and of those whose peak fits the
budget the one is taken that copies for the shortest time a request; blocks that still fit stay on the device. Weights
that are not on the device wait in host memory, or in the checkpoint when there is too little of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from omni.checkpoint import CheckpointFacts
from omni.errors import PlanError
from omni.hardware import PAGE_CACHE_OF_A_CORE
from omni.memory import ComponentMemory, ComponentUse, Links, MemoryPlan, Place, Policy, Room
from omni.memory_layouts import CONTEXT_BYTES, PROCESS_BYTES, Chooser, Layout, Mode, Part, Source
from omni.memory_reasons import reason, refusal
from omni.registry import find_kind_of
from omni.sizes import parse_bytes
from omni.spec import LoadSpec, OffloadSpec, StageSpec

LIBRARY_BYTES_PER_SECOND = 6e9
"""How fast diffusers and transformers load by themselves (`load.enabled: false`), measured on an H200."""


def plan_memory(
    spec: StageSpec, facts: CheckpointFacts, room: Room, *, activation_bytes: int | None = None
) -> MemoryPlan:
    """Where the weights of a stage live, within `room` and the spec's `offload.vram`.

    `activation_bytes` is a measured peak beside the weights, in place of the kind's estimates. An unknown checkpoint
    gives a plan without components. Raises PlanError with the numbers when the policy that was asked for cannot fit.
    """
    offload, load = _offload(spec), getattr(spec, "load", LoadSpec())
    budget = budget_of(spec, room)
    if not facts.known:
        policy: Policy = "none" if offload.policy == "auto" else offload.policy
        reason = "its checkpoint is not on this machine: planned again when it is"
        return MemoryPlan(policy=policy, awaits_checkpoint=True, budget_bytes=budget, room=room, reason=reason)
    parts = read_parts(spec, facts, room.device, activation_bytes)
    if room.device == "cpu":
        return _plan_cpu(parts, room, load)
    chooser = Chooser(parts, offload, room, budget, _has_policy(spec))
    layout = chooser.choose()
    if layout is None:
        raise PlanError(refusal(chooser))
    return _build_plan(parts, layout, chooser, load)


def settle(memory: MemoryPlan | None, spec: StageSpec, facts: CheckpointFacts) -> MemoryPlan | None:
    """The plan as a stage carries it out: made anew when the checkpoint was not here yet. Raises PlanError."""
    if memory is None or not memory.awaits_checkpoint or not facts.known:
        return memory
    return plan_memory(spec, facts, memory.room)


def correct(memory: MemoryPlan, spec: StageSpec, facts: CheckpointFacts, activation_bytes: int) -> MemoryPlan:
    """The plan of a running stage for another peak beside the weights: all places are kept, only the blocks that stay
    change. What does not fit any more has none of them."""
    placed = {part.name: part.place for part in memory.components}
    modes = tuple(_mode(placed[name]) for name in facts.components)
    source: Source = "disk" if memory.policy == "disk" else "host"
    chooser = Chooser(
        read_parts(spec, facts, memory.room.device, activation_bytes),
        _offload(spec),
        memory.room,
        memory.budget_bytes,
        True,
    )
    layout = chooser.lay_out(modes, source) or chooser.squeeze(modes, source)
    return _build_plan(chooser.parts, layout, chooser, getattr(spec, "load", LoadSpec()))


def memory_needs(spec: StageSpec, facts: CheckpointFacts, room: Room) -> tuple[int, int] | None:
    """Device memory that a stage takes when it has all it wants, and with the least that it can work with.

    None when the checkpoint is unknown, or its kind of stage cannot offload. Raises PlanError as plan_memory does.
    """
    if not facts.known or not _has_policy(spec):
        return None
    free = msgspec.structs.replace(room, device_bytes=0)
    parts = read_parts(spec, facts, room.device, None)
    offload = _offload(spec)
    chooser = Chooser(parts, offload, free, 0, True)
    layout, least = chooser.choose(), chooser.least()
    if layout is None or least is None:
        raise PlanError(refusal(chooser))
    wanted, least = layout.peak_bytes + CONTEXT_BYTES, least + CONTEXT_BYTES
    vram = parse_bytes(offload.vram) if offload.vram else wanted
    return max(min(wanted, vram), least), least


def budget_of(spec: StageSpec, room: Room) -> int:
    """Device memory that the stage may take: `offload.vram` or the device's, whichever is less; 0 when unknown."""
    vram = _offload(spec).vram
    limits = [limit for limit in (room.device_bytes, parse_bytes(vram) if vram else 0) if limit]
    return min(limits, default=0)


def read_parts(spec: StageSpec, facts: CheckpointFacts, device: str, activation_bytes: int | None) -> tuple[Part, ...]:
    """The components of a checkpoint, in its order, with what the stage's kind says about their use."""
    uses = find_kind_of(spec).uses(spec, facts)
    dtype = getattr(spec, "dtype", None)
    parts = []
    for name in facts.components:
        found, use = facts.part(name), uses.get(name, ComponentUse())
        if activation_bytes is not None:
            use = msgspec.structs.replace(use, activation_bytes=activation_bytes)
        total = found.loaded_bytes(dtype, device)
        blocks = found.block_bytes(dtype, device) if use.may_stream else ()
        if 2 * sum(blocks) < total:  # streaming it would gain little
            blocks = ()
        parts.append(Part(name, found.total_bytes, blocks, total - sum(blocks), use))
    return tuple(parts)


def _offload(spec: StageSpec) -> OffloadSpec:
    return getattr(spec, "offload", OffloadSpec(policy="none"))


def _has_policy(spec: StageSpec) -> bool:
    return hasattr(spec, "offload")


# Building the plan ----------------------------------------------------------------------------------------------


def _build_plan(parts: Sequence[Part], layout: Layout, chooser: Chooser, load: LoadSpec) -> MemoryPlan:
    room, rate = chooser.room, chooser.rate(layout.source)
    components = tuple(
        _component(part, mode, resident, layout.source, chooser)
        for part, mode, resident in zip(parts, layout.modes, layout.resident, strict=True)
    )
    steps = (
        component.streamed_bytes * part.use.calls_per_step
        for part, component in zip(parts, components, strict=True)
        if component.place.endswith("streamed") and (part.use.num_runs > 1 or len(parts) == 1)
    )
    return MemoryPlan(
        policy=_policy(layout),
        components=components,
        budget_bytes=chooser.budget,
        activation_bytes=max((part.use.activation_bytes for part in parts), default=0),
        context_bytes=CONTEXT_BYTES,
        peak_device_bytes=layout.peak_bytes,
        peak_host_bytes=_peak_host(parts, layout, chooser, load),
        load_seconds=_load_seconds(parts, layout, room.links, load, _page_cache(room.links, load)),
        cold_load_seconds=_load_seconds(parts, layout, room.links, load, room.links.disk_bytes_per_second),
        step_seconds=max(steps, default=0) / rate,
        copy_seconds=layout.seconds,
        room=room,
        reason=reason(layout, chooser),
    )


def _component(part: Part, mode: Mode, resident: int, source: Source, chooser: Chooser) -> ComponentMemory:
    place: Place = "device"
    device_bytes, slot_bytes = part.weight_bytes, 0
    if mode == "turn":
        place, device_bytes, slot_bytes = ("host, in turn", 0, part.weight_bytes)
        place = "host, in turn" if source == "host" else "disk, in turn"
    elif mode == "stream":
        place = "host, streamed" if source == "host" else "disk, streamed"
        device_bytes, slot_bytes = part.outside_bytes + resident, chooser.slots(part)
    return ComponentMemory(
        name=part.name,
        weight_bytes=part.weight_bytes,
        device_bytes=device_bytes,
        streamed_bytes=chooser.copied(part, mode, resident),
        slot_bytes=slot_bytes,
        place=place,
        num_copies=chooser.num_copies(part, mode),
    )


def _mode(place: Place) -> Mode:
    return "stay" if place == "device" else "turn" if place.endswith("in turn") else "stream"


def _policy(layout: Layout) -> Policy:
    if all(mode == "stay" for mode in layout.modes):
        return "none"
    if layout.source == "disk":
        return "disk"
    return "layerwise" if "stream" in layout.modes else "component"


def _peak_host(parts: Sequence[Part], layout: Layout, chooser: Chooser, load: LoadSpec) -> int:
    passing = load.threads * parse_bytes(load.chunk)
    if not load.enabled:  # the libraries load all of it into host memory first
        passing = sum(part.weight_bytes for part, mode in zip(parts, layout.modes, strict=True) if mode == "stay")
    return chooser.host_bytes(layout.modes, layout.source) + passing


def _page_cache(links: Links, load: LoadSpec) -> float:
    if load.reader == "direct":
        return links.disk_bytes_per_second
    return min(links.page_cache_bytes_per_second, load.threads * PAGE_CACHE_OF_A_CORE)


def _load_seconds(parts: Sequence[Part], layout: Layout, links: Links, load: LoadSpec, read_rate: float) -> float:
    """Reading and copying overlap, so the slower one counts; what streams from the disk is not read ahead."""
    both = list(zip(parts, layout.modes, strict=True))
    read = sum(part.stored_bytes for part, mode in both if mode == "stay" or layout.source == "host")
    copied = sum(part.weight_bytes for part, mode in both if mode == "stay") + sum(layout.resident)
    rate = read_rate if load.enabled else min(read_rate, LIBRARY_BYTES_PER_SECOND)
    return max(read / rate, copied / links.h2d_bytes_per_second)


def _plan_cpu(parts: Sequence[Part], room: Room, load: LoadSpec) -> MemoryPlan:
    weights = sum(part.weight_bytes for part in parts)
    activations = max((part.use.activation_bytes for part in parts), default=0)
    stored = sum(part.stored_bytes for part in parts)
    return MemoryPlan(
        policy="none",
        components=tuple(
            ComponentMemory(name=part.name, weight_bytes=part.weight_bytes, device_bytes=part.weight_bytes)
            for part in parts
        ),
        activation_bytes=activations,
        peak_host_bytes=weights + activations + PROCESS_BYTES["cpu"],
        load_seconds=stored / _page_cache(room.links, load),
        cold_load_seconds=stored / room.links.disk_bytes_per_second,
        room=room,
        reason="on the CPU all weights are in host memory",
    )
