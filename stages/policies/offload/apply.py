"""Puts an offload policy on the components of a model, in numbered steps, and takes it off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from omni.memory import ComponentMemory, MemoryPlan
from omni.sizes import parse_bytes
from omni.spec import OffloadSpec
from stages.memory.engine import CopyEngine, Counters, HostEngine, engine_for
from stages.memory.host import HostMemory
from stages.policies.offload.component import Seat, Turns
from stages.policies.offload.layerwise import LayerwiseComponent
from stages.policies.offload.units import Parts, is_scattered, pack, regions_of, shared_parameters, take_apart

Way = Literal["stay", "turn", "stream"]


class Offload:
    """A policy at work on some components. `reset` before the modules are used in another way."""

    def __init__(
        self,
        components: dict[str, nn.Module],
        memory: MemoryPlan,
        spec: OffloadSpec,
        engine: CopyEngine,
        order: Sequence[str],
    ) -> None:
        self.policy = memory.policy
        self.engine = engine
        self._components, self._memory, self._spec, self._order = components, memory, spec, order
        self._from_disk = memory.policy == "disk"
        self._layers: list[LayerwiseComponent] = []
        """Components that stay or stream."""
        self._streaming: list[LayerwiseComponent] = []
        """Those of them that stream."""
        self._turns: Turns | None = None
        self._regions: dict[int, HostMemory] = {}

    @property
    def counters(self) -> Counters:
        """Copies and bytes so far, set-up included."""
        return self.engine.counters

    @property
    def device_bytes(self) -> int:
        """Weights and room for weights on the device now."""
        return self.engine.device_bytes

    @property
    def host_bytes(self) -> int:
        """Regions of host memory that hold masters; `reset` closes them."""
        return sum(region.num_bytes for region in self._regions.values())

    @property
    def measured_activation_bytes(self) -> int:
        """The most that calls took beside the weights so far; 0 on a device that does not count."""
        return self.engine.peak_activation_bytes()

    @property
    def free_bytes(self) -> int:
        """What the budget leaves beside all that is there and what a request takes; negative without one."""
        plan = self._memory
        elsewhere = sum(part.device_bytes for part in plan.components if part.name not in self._components)
        taken = plan.context_bytes + plan.activation_bytes + elsewhere + self.engine.device_bytes
        return plan.budget_bytes - taken

    @property
    def resident_bytes(self) -> int:
        """What `set_resident` has control of: blocks that stay of streamed components, and the room for turns."""
        blocks = sum(layers.streamer.resident_bytes for layers in self._streaming)
        return blocks + (self._turns.arena_bytes if self._turns is not None else 0)

    def set_resident(self, num_bytes: int) -> None:
        """Keep weights of that size on the device at most, beside what always stays; waits for running calls.

        The largest of the components that take turns has its room in any case. Then come streamed components, in order
        of how often they were called so far; the rest makes the room for turns larger. Raises torch.OutOfMemoryError;
        the policy then goes on with the least it needs.
        """
        least = self._turns.least_bytes if self._turns is not None else 0
        left = max(0, num_bytes - least)
        shares: list[tuple[LayerwiseComponent, int]] = []
        for layers in sorted(self._streaming, key=lambda layers: -layers.lock.num_calls):
            shares.append((layers, min(left, layers.block_bytes)))
            left -= shares[-1][1]
        self._share_out(shares, least + left)

    def follow(self, memory: MemoryPlan) -> None:
        """Change what stays to what another plan with the same places says; waits for running calls.

        Raises torch.OutOfMemoryError; the policy then goes on with the least it needs.
        """
        planned = {component.name: component for component in memory.components}
        shares = [
            (layers, layers.resident_for(planned[layers.name].device_bytes) if layers.name in planned else 0)
            for layers in self._streaming
        ]
        self._memory = memory
        self._share_out(shares, self.free_bytes + self.resident_bytes - sum(share for _, share in shares))

    def _share_out(self, shares: Sequence[tuple[LayerwiseComponent, int]], arena_bytes: int) -> None:
        turns = self._turns
        # Those that shrink go first: they make the room.
        if turns is not None and arena_bytes < turns.arena_bytes:
            turns.resize(arena_bytes)
        for layers, share in sorted(shares, key=lambda item: item[1] - item[0].streamer.resident_bytes):
            layers.set_resident(share)
        if turns is not None and arena_bytes > turns.arena_bytes:
            turns.resize(arena_bytes)

    def refresh(self) -> None:
        """Take up modules and parameters that were added or replaced since; no call may be under way."""
        self._undo()
        self._do()

    def reset(self) -> None:
        """Take the policy off: plain CPU modules again, no gates, no device memory, no pinned or shared memory."""
        self._undo()
        self.engine.close()
        for region in self._regions.values():
            region.close()
        self._regions = {}

    def _do(self) -> None:
        """Put the policy on. Leaves nothing behind when it fails."""
        try:
            # 1. Components, each once: one that lies inside another goes with that
            roots = _roots(self._components)
            shared = shared_parameters(list(roots.values()))
            parts = {name: take_apart(module, shared) for name, module in roots.items()}
            _leave_shared_to_first(parts)
            # 2. What becomes of each: as planned, and as the policy says where the plan does not name it
            planned = {component.name: component for component in self._memory.components}
            ways = {name: self._way(parts[name], planned.get(name)) for name in parts}
            # 3. Their masters: in large pieces of host memory, pinned where the device wants that
            for name, part in parts.items():
                self._prepare_masters(part, moves=ways[name] != "stay")
            # 4. The device: what stays and what streams, then those that take turns in what is left; and the gates
            self._place({name: part for name, part in parts.items() if ways[name] != "turn"}, ways, planned)
            self._take_turns({name: part for name, part in parts.items() if ways[name] == "turn"})
        except BaseException:
            self.reset()
            raise

    def _undo(self) -> None:
        if self._turns is not None:
            self._turns.reset()
            self._turns = None
        self._streaming = []
        while self._layers:
            self._layers.pop().reset()

    def _way(self, parts: Parts, planned: ComponentMemory | None) -> Way:
        if planned is not None and planned.place == "device":
            return "stay"
        if self.policy == "component" if planned is None else planned.place.endswith("in turn"):
            return "turn"
        return "stream" if parts.blocks else "stay"

    def _prepare_masters(self, parts: Parts, *, moves: bool) -> None:
        groups = [*parts.block_parameters, parts.rest]
        everything = [parameter for group in groups for parameter in group]
        regions = regions_of(everything)
        copied_from = moves and not self._from_disk
        if copied_from and ((self.engine.pins and regions is None) or any(map(is_scattered, groups))):
            regions = [pack(groups)]
        for region in regions or []:
            self._regions[id(region)] = region
            if self.engine.pins and copied_from:
                region.pin()

    def _place(self, parts: dict[str, Parts], ways: dict[str, Way], planned: dict[str, ComponentMemory]) -> None:
        given = parse_bytes(self._spec.resident) if self._spec.resident else 0
        # Without a plan's numbers the largest get it: denoisers, which are called most.
        for name, part in sorted(parts.items(), key=lambda item: -item[1].block_bytes):
            streams = ways[name] == "stream"
            layers = LayerwiseComponent(
                name,
                part,
                self.engine,
                given if streams else None,
                self._spec.ahead,
                device_bytes=planned[name].device_bytes if streams and name in planned else None,
                staged=streams and self._from_disk,
            )
            self._layers.append(layers)
            if streams:
                self._streaming.append(layers)
                given -= layers.streamer.resident_bytes

    def _take_turns(self, parts: dict[str, Parts]) -> None:
        if not parts:
            return
        seats: list[Seat] = []
        try:
            seats.extend(Seat(name, part, self.engine, staged=self._from_disk) for name, part in parts.items())
            self._turns = Turns(self.engine, seats, self.free_bytes, self._order)
        except BaseException:
            for seat in seats:
                seat.reset()
            raise


def apply_offload(
    components: dict[str, nn.Module],
    memory: MemoryPlan,
    device: str,
    spec: OffloadSpec,
    engine: CopyEngine | None = None,
    order: Sequence[str] = (),
) -> Offload:
    """Put the policy of `memory` on plain CPU modules, each in the place that it names; `none` does nothing at all.

    `order`: names of components in the order in which the pipeline uses them, where it is known. Without an `engine`,
    one for `device` is made. Raises UsageError when the host lacks memory, torch.OutOfMemoryError when the
    device does; the components are plain CPU modules then.
    """
    if memory.policy == "none":
        return Offload(components, memory, spec, engine or HostEngine(), order)
    offload = Offload(components, memory, spec, engine or engine_for(device), order)
    offload._do()
    return offload


def _leave_shared_to_first(parts: dict[str, Parts]) -> None:
    """Leave each parameter that components share to the first of them, which puts it on the device for all."""
    taken: set[int] = set()
    for part in parts.values():
        part.shared[:] = [parameter for parameter in part.shared if id(parameter) not in taken]
        taken |= {id(parameter) for parameter in part.shared}


def _roots(components: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The components that do not lie inside another, each module once."""
    roots: dict[str, nn.Module] = {}
    for name, module in components.items():
        inside = any(module in other.modules() for other in components.values() if other is not module)
        if not inside and all(module is not other for other in roots.values()):
            roots[name] = module
    return roots
