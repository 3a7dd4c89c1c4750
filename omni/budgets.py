"""What each stage may take of GPUs and hosts: its claim before GPUs are given out, and its memory plan after that."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from omni.checkpoint import UNKNOWN, auto_dtype
from omni.errors import PlanError
from omni.hardware import Hardware
from omni.memory import MemoryPlan, Room
from omni.memory_planner import memory_needs, plan_memory
from omni.model_paths import resolve_model_path
from omni.placement import Claim, Share
from omni.processes import Want, device_of
from omni.registry import find_kind_of


def build_claim(want: Want, hardware: Hardware, in_driver: bool) -> Claim:
    """What a stage on GPUs wants of them, and with how little it could work. Raises PlanError."""
    _, _, number = device_of(want.spec).partition(":")
    room = Room(host_bytes=max(node.memory_bytes for node in hardware.nodes))
    try:
        needs = memory_needs(want.spec, want.facts or UNKNOWN, room)
    except PlanError as error:
        raise PlanError(f"stage '{want.name}': {error}") from error
    return Claim(
        stage=want.name,
        weight_bytes=want.weight_bytes,
        gpus=want.spec.resources.gpus,
        gpu_id=int(number) if number and in_driver else None,
        wanted_bytes=needs[0] if needs else None,
        least_bytes=needs[1] if needs else None,
    )


def plan_memories(
    hardware: Hardware, wants: Mapping[str, Want], shares: Mapping[str, Share], nodes: Mapping[str, str]
) -> dict[str, MemoryPlan]:
    """Stage -> its memory plan, for those with a checkpoint. `nodes`: stage -> name of its node.

    Stages that share a GPU get parts that add up to it, and those on one host parts of its memory. Raises PlanError.
    """
    plans = {}
    for name, want in wants.items():
        if want.weight_bytes == 0:
            continue
        share = shares.get(name)
        rivals = [other for other in wants.values() if nodes[other.name] == nodes[name]]
        node = next(node for node in hardware.nodes if node.name == nodes[name])
        room = Room(
            device="cuda" if share else "cpu",
            device_bytes=_device_bytes(hardware, share),
            host_bytes=_host_bytes(want, rivals, shares, node.memory_bytes),
            links=node.links(min(share.gpu_ids) if share else None),
        )
        try:
            plans[name] = plan_memory(want.spec, want.facts or UNKNOWN, room)
        except PlanError as error:
            raise PlanError(f"stage '{name}': {error}") from error
    return plans


def share_hosts(
    memories: Mapping[str, MemoryPlan], wants: Mapping[str, Want], nodes: Mapping[str, str], base_dir: str
) -> dict[str, MemoryPlan]:
    """The plans, with `shares_host` where stages on one node keep the same weights in host memory.

    The first of them counts those in its peak, the others do not. Private memory is quicker to fill, so that nobody
    shares with himself.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, memory in memories.items():
        ref = find_kind_of(wants[name].spec).checkpoint(wants[name].spec)
        if ref is not None and _waiting(memory):
            model = resolve_model_path(ref.model, base_dir)
            dtype = getattr(wants[name].spec, "dtype", None)
            dtype = auto_dtype(memory.room.device) if dtype == "auto" else dtype
            alike.setdefault((nodes[name], model, ref.revision, ref.variant, dtype), []).append(name)
    found = dict(memories)
    for names in alike.values():
        held: set[str] = set()
        for name in names:
            waiting = _waiting(memories[name])
            others = set[str]().union(*(_waiting(memories[other]) for other in names if other != name))
            if not others.isdisjoint(waiting):
                again = sum(size for part, size in waiting.items() if part in held)
                found[name] = msgspec.structs.replace(
                    memories[name], shares_host=True, peak_host_bytes=memories[name].peak_host_bytes - again
                )
            held |= set(waiting)
    return found


def _waiting(memory: MemoryPlan) -> dict[str, int]:
    """Component -> bytes, of those that wait in host memory for the GPU."""
    return {part.name: part.weight_bytes for part in memory.components if part.place.startswith("host")}


def _device_bytes(hardware: Hardware, share: Share | None) -> int:
    """A stage works on the first of its GPUs, or on a part of it."""
    if share is None:
        return 0
    return int(min(1.0, share.gpus) * hardware.nodes[share.node].gpus[min(share.gpu_ids)].memory_bytes)


def _host_bytes(want: Want, rivals: list[Want], shares: Mapping[str, Share], memory_bytes: int) -> int:
    """What stages on the CPUs leave, in parts as large as the weights of those on GPUs."""
    on_cpu = sum(rival.weight_bytes or 0 for rival in rivals if rival.name not in shares)
    on_gpu = sum(rival.weight_bytes or 0 for rival in rivals if rival.name in shares)
    if want.name not in shares or not want.weight_bytes:
        return memory_bytes
    return int(max(1, memory_bytes - on_cpu) * want.weight_bytes / on_gpu)
