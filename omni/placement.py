"""Which GPUs each stage gets: whole ones while they suffice, shared ones by memory after that.

Pure arithmetic over claims and memory sizes. The result is deterministic, and no GPU is promised beyond its memory.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence

import msgspec

from omni.errors import PlanError
from omni.sizes import GIB, format_bytes

SHARE_FACTOR = 1.2
"""A stage that shares a GPU gets its weights times this ..."""
SHARE_ROOM_BYTES = 2 * GIB
"""... and this on top, for activations and the CUDA context."""
UNITS = 10_000
"""Ray counts fractions of a GPU in ten-thousandths."""
PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Of what the stages want beyond their least: tried in this order until they all fit."""
PLANNED_STEP = 100
"""Planned fractions are rounded up to hundredths, which read well."""
UNKNOWN_ROOM = 2**60
"""Stands for the memory of a GPU that nobody knows; such a GPU is not shared by memory."""
REMEDY = "use more or larger GPUs, a smaller model or dtype, or say device: cpu"


class Claim(msgspec.Struct, frozen=True):
    """What one stage wants of the GPUs."""

    stage: str
    weight_bytes: int | None
    """None when unknown: then only a whole GPU is safe."""
    gpus: float | None = None
    """As the graph says: whole GPUs, or a fraction below 1; None leaves it to the planner."""
    gpu_id: int | None = None
    """`device: cuda:N`: this GPU and no other."""
    wanted_bytes: int | None = None
    """Device memory with which nothing has to be offloaded; None for a stage of which only the weights are known."""
    least_bytes: int | None = None
    """Device memory with which it still works, its weights offloaded; None when it cannot offload."""

    def share_bytes(self, part: float = 1.0) -> int:
        """Device memory on a shared GPU: all that is wanted, or this part of the way to it from the least."""
        if self.wanted_bytes is None or self.least_bytes is None:
            return math.ceil((self.weight_bytes or 0) * SHARE_FACTOR) + SHARE_ROOM_BYTES
        return self.least_bytes + math.ceil(part * (self.wanted_bytes - self.least_bytes))

    @property
    def whole_bytes(self) -> int:
        """Memory of a whole GPU with which nothing has to be offloaded."""
        return (self.weight_bytes or 0) if self.wanted_bytes is None else self.wanted_bytes

    @property
    def floor_bytes(self) -> int:
        """Memory of a whole GPU that it cannot do without."""
        return (self.weight_bytes or 0) if self.least_bytes is None else self.least_bytes


class Share(msgspec.Struct, frozen=True):
    """What one stage got: `gpus` is whole, or the fraction of its one GPU."""

    node: int
    gpu_ids: tuple[int, ...]
    gpus: float


class Slot(msgspec.Struct):
    """One GPU while it is being filled."""

    node: int
    gpu_id: int
    memory_bytes: int
    free_units: int
    free_bytes: int

    @classmethod
    def of(cls, node: int, gpu_id: int, memory_bytes: int) -> Slot:
        """An untouched GPU; with 0 bytes its memory is unknown, and it is taken to hold anything."""
        room = memory_bytes or UNKNOWN_ROOM
        return cls(node, gpu_id, room, UNITS, room)

    @property
    def is_whole(self) -> bool:
        """Nobody has a part of it yet."""
        return self.free_units == UNITS and self.free_bytes == self.memory_bytes


def place_gpus(claims: Sequence[Claim], slots: Sequence[Slot]) -> dict[str, Share]:
    """Give every claim its GPUs and take them out of `slots`. Raises PlanError when they do not suffice.

    Claims with a number of their own come first. Of the others the largest get whole GPUs, as many as leave enough
    for the rest to share; the rest is packed best fit, largest first. Only when they do not fit so, stages that can
    offload weights get less than they want.
    """
    shares: dict[str, Share] = {}
    for claim in claims:
        _check_alone(claim, slots)
    own = [claim for claim in claims if claim.gpus is not None or claim.gpu_id is not None]
    for claim in sorted(own, key=lambda claim: (claim.gpu_id is None, -(claim.gpus or 0))):
        shares[claim.stage] = _place_own(claim, slots)
    # sort is stable: equal sizes keep the order of the graph
    rest = sorted((claim for claim in claims if claim not in own), key=_size, reverse=True)
    num_unknown = sum(claim.weight_bytes is None for claim in rest)
    num_free = sum(slot.is_whole for slot in slots)
    yielding = any(claim.least_bytes is not None for claim in rest)
    failure: PlanError | None = None
    for strict, part in ((True, 1.0), *((False, part) for part in PARTS if yielding)):
        for num_whole in range(min(len(rest), num_free), num_unknown - 1, -1):
            trial = copy.deepcopy(list(slots))
            try:
                found = {claim.stage: _place_whole(claim, 1, trial, strict) for claim in rest[:num_whole]}
                found |= {claim.stage: _place_share(claim, trial, part) for claim in rest[num_whole:]}
            except PlanError as error:
                failure = error
                continue
            _take(slots, trial)
            return shares | found
    raise failure or PlanError(_unknown_message(rest, num_free))


def _check_alone(claim: Claim, slots: Sequence[Slot]) -> None:
    """A stage that would not fit even if it were alone is named first, since that is the clearest message."""
    gpus = claim.gpus if claim.gpus is not None else 1
    if gpus > 1 and gpus != int(gpus):
        raise PlanError(f"stage '{claim.stage}': resources.gpus: {gpus:g} must be a whole number or below 1")
    per_node: dict[int, list[int]] = {}
    for slot in slots:
        per_node.setdefault(slot.node, []).append(slot.memory_bytes)
    most = max((len(sizes) for sizes in per_node.values()), default=0)
    count = max(1, int(gpus))
    if count > most:
        there = f"one node has {most}" if most else "there is no GPU for it"
        raise PlanError(f"stage '{claim.stage}': needs {count} GPU{'s' * (count > 1)}, but {there}: {REMEDY}")
    room = max(sum(sorted(sizes)[-count:]) for sizes in per_node.values() if len(sizes) >= count)
    if claim.floor_bytes > room:
        have = "the largest GPU has" if count == 1 else f"{count} GPUs have"
        what = "its weights take" if claim.least_bytes is None else "with its offload policy it needs at least"
        raise PlanError(
            f"stage '{claim.stage}': {what} {format_bytes(claim.floor_bytes)} and {have} {format_bytes(room)}: {REMEDY}"
        )


def _place_own(claim: Claim, slots: Sequence[Slot]) -> Share:
    if claim.gpu_id is not None:
        pinned = [slot for slot in slots if slot.gpu_id == claim.gpu_id]
        if not pinned:
            ids = ", ".join(str(slot.gpu_id) for slot in slots)
            raise PlanError(f"stage '{claim.stage}': device: cuda:{claim.gpu_id}, but the GPUs there are {ids}")
        is_large = claim.gpus is None and claim.whole_bytes > pinned[0].memory_bytes and pinned[0].is_whole
        if claim.weight_bytes is None or (claim.gpus or 0) >= 1 or (is_large and claim.least_bytes is not None):
            return _place_whole(claim, 1, pinned, strict=False)
        return _place_part(claim, pinned)
    assert claim.gpus is not None
    return _place_whole(claim, int(claim.gpus), slots, strict=False) if claim.gpus >= 1 else _place_part(claim, slots)


def _place_part(claim: Claim, slots: Sequence[Slot]) -> Share:
    """As much of one GPU as there is for it."""
    for part in PARTS[:-1]:
        with contextlib.suppress(PlanError):
            return _place_share(claim, slots, part)
    return _place_share(claim, slots, PARTS[-1])


def _place_whole(claim: Claim, count: int, slots: Sequence[Slot], strict: bool) -> Share:
    """`count` untouched GPUs of one node: the smallest with room for all, on the node with the fewest left.

    Without `strict` the largest will do when none has that room.
    """
    choices = []
    for node in sorted({slot.node for slot in slots}):
        free = sorted((s for s in slots if s.node == node and s.is_whole), key=lambda slot: slot.memory_bytes)
        for start in range(len(free) - count + 1):
            chosen = free[start : start + count]
            memory = sum(slot.memory_bytes for slot in chosen)
            if memory >= claim.whole_bytes:
                choices.append((memory, len(free), node, chosen))
                break
            if not strict and memory >= claim.floor_bytes:  # after all that have room, the largest first
                choices.append((2 * UNKNOWN_ROOM * count - memory, len(free), node, chosen))
    if not choices:
        number = "a whole GPU" if count == 1 else f"{count} whole GPUs of one node"
        raise PlanError(
            f"stage '{claim.stage}': needs {number} with {format_bytes(claim.floor_bytes)} for its weights, "
            f"and the other stages leave none: {REMEDY}"
        )
    _, _, node, chosen = min(choices, key=lambda choice: choice[:3])
    for slot in chosen:
        slot.free_units = slot.free_bytes = 0
    return Share(node, tuple(slot.gpu_id for slot in chosen), float(count))


def _place_share(claim: Claim, slots: Sequence[Slot], part: float) -> Share:
    """A part of the fullest GPU that still has room for it."""
    best: tuple[int, int, Slot] | None = None
    for slot in slots:
        units, size = _part(claim, slot, part)
        fits = units <= slot.free_units and size <= slot.free_bytes
        if fits and (best is None or slot.free_bytes - size < best[2].free_bytes - best[1]):
            best = (units, size, slot)
    if best is None:
        room = max((slot.free_bytes for slot in slots), default=0)
        needs = f"{claim.gpus:g} of a GPU and " if claim.gpus is not None else ""
        size = claim.share_bytes(part) if claim.gpus is None else claim.floor_bytes
        raise PlanError(
            f"stage '{claim.stage}': needs {needs}{format_bytes(size)} on a shared GPU, and the other stages leave "
            f"at most {format_bytes(room)}: {REMEDY}"
        )
    units, size, slot = best
    slot.free_units -= units
    slot.free_bytes -= size
    return Share(slot.node, (slot.gpu_id,), units / UNITS)


def _part(claim: Claim, slot: Slot, part: float) -> tuple[int, int]:
    """Units and bytes that the claim takes of this GPU; who names a fraction decides about the room as well."""
    if claim.gpus is not None:
        size = claim.whole_bytes
        if claim.least_bytes is not None:
            size = max(claim.least_bytes, min(size, int(claim.gpus * slot.memory_bytes)))
        return max(1, math.ceil(round(claim.gpus * UNITS, 6))), size
    size = claim.share_bytes(part)
    if slot.memory_bytes == UNKNOWN_ROOM:
        return UNITS, size
    steps = math.ceil(size * UNITS / PLANNED_STEP / slot.memory_bytes)
    return steps * PLANNED_STEP, size


def _size(claim: Claim) -> float:
    return math.inf if claim.weight_bytes is None else claim.weight_bytes


def _take(slots: Sequence[Slot], trial: Sequence[Slot]) -> None:
    for slot, filled in zip(slots, trial, strict=True):
        slot.free_units, slot.free_bytes = filled.free_units, filled.free_bytes


def _unknown_message(rest: Sequence[Claim], num_free: int) -> str:
    unknown = [claim.stage for claim in rest if claim.weight_bytes is None]
    return (
        f"stage{'s' * (len(unknown) > 1)} {', '.join(repr(stage) for stage in unknown)}: checkpoint not on this "
        f"machine, so each needs a whole GPU, and {num_free} {'is' if num_free == 1 else 'are'} free: download the "
        "checkpoint, set resources.gpus to a fraction, or use more GPUs"
    )


# CPUs -----------------------------------------------------------------------------------------------------------

SMALLEST_CPUS = 0.01
"""What an actor reserves at least: Ray refuses a bundle of nothing."""


class CpuClaim(msgspec.Struct, frozen=True):
    """What one process wants of the CPUs."""

    process: str
    reserves: bool
    """False for the driver, which Ray does not count."""
    cpus: float | None = None
    """As the graph says; None leaves it to the planner."""
    node: int | None = None
    """Where its GPUs are; None leaves it to the planner."""
    gpu_part: float = 0.0
    """Its GPUs, of all that its node has; 0 for a process without."""
    rivals: frozenset[str] = frozenset()
    """Processes that may work on the same request at the same time."""


class CpuShare(msgspec.Struct, frozen=True):
    """What one process got: its node, its reservation in cores and the threads it may start."""

    node: int
    cpus: float
    num_threads: int


def place_cpus(claims: Sequence[CpuClaim], cores: Sequence[float]) -> dict[str, CpuShare]:
    """Give every process a node (an index into `cores`), a reservation and threads. Raises PlanError.

    A process reserves one core, or less where there are more processes than cores. Threads are another matter:
    processes that wait for each other may each use all cores, those that work side by side split them, and a process
    with a GPU gets no more than its GPUs' part of the cores.
    """
    asked = [0.0] * len(cores)
    planned = [0] * len(cores)
    nodes: dict[str, int] = {}
    for claim in sorted(claims, key=lambda claim: (claim.node is None, claim.cpus is None, -(claim.cpus or 0))):
        nodes[claim.process] = node = _choose_node(claim, cores, asked, planned)
        if claim.reserves:
            asked[node] += _asked(claim)
            planned[node] += claim.cpus is None
    shares = {}
    for claim in claims:
        node = nodes[claim.process]
        left = cores[node] - asked[node]
        planned_cpus = min(1.0, math.floor(100 * left / max(1, planned[node]) + 1e-6) / 100)
        if claim.reserves and claim.cpus is None and planned_cpus < SMALLEST_CPUS:
            raise PlanError(
                f"process '{claim.process}': the other stages reserve {asked[node]:g} of {cores[node]:g} cores of its "
                "node and leave none: lower resources.cpus"
            )
        cpus = planned_cpus if claim.cpus is None else _asked(claim)
        side_by_side = 1 + sum(nodes[rival] == node for rival in claim.rivals)
        part = min(1 / side_by_side, claim.gpu_part or 1.0)
        threads = int(claim.cpus or cores[node] * part)
        shares[claim.process] = CpuShare(node, cpus if claim.reserves else 0.0, max(1, threads))
    return shares


def _choose_node(claim: CpuClaim, cores: Sequence[float], asked: Sequence[float], planned: Sequence[int]) -> int:
    """The first node with room; a process that names no number may also squeeze in where there is most."""
    if claim.cpus is None:
        free = [cores[node] - asked[node] - planned[node] for node in range(len(cores))]
        roomy = [node for node in range(len(cores)) if free[node] >= 1]
        fallback = max(range(len(cores)), key=lambda node: free[node])
        return claim.node if claim.node is not None else (roomy or [fallback])[0]
    fits = [node for node in range(len(cores)) if cores[node] - asked[node] >= _asked(claim) - 1e-6]
    if claim.node is not None and claim.reserves:
        fits = [node for node in fits if node == claim.node]
    if not claim.reserves:
        return claim.node or 0
    if not fits:
        there = f"{cores[claim.node]:g}" if claim.node is not None else f"at most {max(cores):g}"
        raise PlanError(
            f"process '{claim.process}': reserves {claim.cpus:g} cores, and a node has {there}, part of which other "
            "stages may reserve: lower resources.cpus"
        )
    return fits[0]


def _asked(claim: CpuClaim) -> float:
    return 0.0 if claim.cpus is None else max(claim.cpus, SMALLEST_CPUS)
