"""Puts an offload policy on the components of a model, in numbered steps, and takes it off again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from omni.memory import ComponentMemory, MemoryPlan
from omni.sizes import parse_bytes
from omni.spec import OffloadSpec
from stages.memory.engine import CopyEngine, Counters, HostEngine, engine_for
from stages.memory.host import HostMemory
from stages.policies.offload.component import Seat, Turns
from stages.policies.offload.layerwise import LayerwiseComponent
from stages.policies.offload.units import Parts, is_scattered, pack, regions_of, shared_parameters, take_apart


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
        self._layers: list[LayerwiseComponent] = []
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

    def set_resident(self, num_bytes: int) -> None:
        """Keep weights of that size on the device at most, beside what always stays; waits for running calls.

        Streamed components get it in order of how often they were called so far. Under `component`, it is the room in
        which components take turns. Raises torch.OutOfMemoryError; the policy then goes on with the least it needs.
        """
        if self._turns is not None:
            self._turns.resize(num_bytes)
        shares: list[tuple[LayerwiseComponent, int]] = []
        for layers in sorted(self._layers, key=lambda layers: -layers.lock.num_calls):
            shares.append((layers, min(num_bytes, layers.block_bytes)))
            num_bytes -= shares[-1][1]
        # Those that shrink go first: they make the room.
        for layers, share in sorted(shares, key=lambda item: item[1] - item[0].streamer.resident_bytes):
            layers.set_resident(share)

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
            # 2. Which of them move; the others are on the device for good
            planned = {component.name: component for component in self._memory.components}
            moving = {name for name in parts if self._moves(parts[name], planned.get(name))}
            # 3. Their masters: in large pieces of host memory, pinned where the device wants that
            for name, part in parts.items():
                self._prepare_masters(part, moves=name in moving)
            # 4. The device: what stays, slots or arena, and the gates
            if self.policy == "component":
                self._take_turns(parts, moving)
            else:
                self._stream(parts, moving, planned)
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        if self._turns is not None:
            self._turns.reset()
            self._turns = None
        while self._layers:
            self._layers.pop().reset()

    def _moves(self, parts: Parts, planned: ComponentMemory | None) -> bool:
        if self.policy == "component":
            return planned is None or planned.device_bytes < planned.weight_bytes
        return bool(parts.blocks) and (planned is None or planned.streamed_bytes > 0)

    def _prepare_masters(self, parts: Parts, *, moves: bool) -> None:
        groups = [*parts.block_parameters, parts.rest]
        everything = [parameter for group in groups for parameter in group]
        regions = regions_of(everything)
        copied_from = moves and self.policy != "disk"
        if copied_from and ((self.engine.pins and regions is None) or any(map(is_scattered, groups))):
            regions = [pack(groups)]
        for region in regions or []:
            self._regions[id(region)] = region
            if self.engine.pins and copied_from:
                region.pin()

    def _take_turns(self, parts: dict[str, Parts], moving: set[str]) -> None:
        seats: list[Seat] = []
        try:
            for name, part in parts.items():
                if name in moving:
                    seats.append(Seat(name, part, self.engine))
                else:
                    self._layers.append(LayerwiseComponent(name, part, self.engine, None, self._spec.ahead))
            room = self._memory.budget_bytes - self._memory.activation_bytes - self.engine.device_bytes
            self._turns = Turns(self.engine, seats, room, self._order)
        except BaseException:
            for seat in seats:
                seat.reset()
            raise

    def _stream(self, parts: dict[str, Parts], moving: set[str], planned: dict[str, ComponentMemory]) -> None:
        given = parse_bytes(self._spec.resident) if self._spec.resident else 0
        # Without a plan's numbers the largest get it: denoisers, which are called most.
        for name, part in sorted(parts.items(), key=lambda item: -item[1].block_bytes):
            resident: int | None = None
            if name in moving:
                rest = sum(p.numel() * p.element_size() for p in (*part.rest, *part.shared))
                resident = max(0, planned[name].device_bytes - rest) if name in planned else given
            staged = self.policy == "disk" and name in moving
            layers = LayerwiseComponent(name, part, self.engine, resident, self._spec.ahead, staged=staged)
            self._layers.append(layers)
            given -= layers.streamer.resident_bytes if name in moving else 0


def apply_offload(
    components: dict[str, nn.Module],
    memory: MemoryPlan,
    device: str,
    spec: OffloadSpec,
    engine: CopyEngine | None = None,
    order: Sequence[str] = (),
) -> Offload:
    """Put the policy that `memory` names on plain CPU modules; `none` does nothing at all.

    `order`: names of components in the order in which the pipeline uses them, where it is known. Without an `engine`,
    one for `device` is made. Raises UsageError when the host lacks memory, torch.OutOfMemoryError when the
    device does; the components are plain CPU modules then.
    """
    if memory.policy == "none":
        return Offload(components, memory, spec, engine or HostEngine(), order)
    offload = Offload(components, memory, spec, engine or engine_for(device), order)
    offload._do()
    return offload


def _roots(components: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The components that do not lie inside another, each module once."""
    roots: dict[str, nn.Module] = {}
    for name, module in components.items():
        inside = any(module in other.modules() for other in components.values() if other is not module)
        if not inside and all(module is not other for other in roots.values()):
            roots[name] = module
    return roots
