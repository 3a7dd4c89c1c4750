"""Layerwise: a component's blocks stream through slots of device memory, all else of it stays on the device."""

from __future__ import annotations

import torch

from stages.memory.engine import CopyEngine
from stages.policies.offload.gates import CallLock, Gate, conversions_refused, entries, scoped
from stages.policies.offload.placed import Placed
from stages.policies.offload.streamer import Streamer, choose_resident
from stages.policies.offload.units import Parts, Unit


class LayerwiseComponent:
    """One component under the policy. With `staged`, its blocks come from mapped files (policy disk)."""

    def __init__(
        self,
        name: str,
        parts: Parts,
        engine: CopyEngine,
        resident_bytes: int | None,
        ahead: int,
        *,
        device_bytes: int | None = None,
        staged: bool = False,
    ) -> None:
        """`resident_bytes`: blocks that stay on the device, None for all; or `device_bytes` says it as a plan does.

        Raises torch.OutOfMemoryError.
        """
        self.name = name
        self.lock = CallLock(name)
        self._module, self._engine, self._ahead, self._staged = parts.module, engine, ahead, staged
        self._placed = Placed(name, engine, parts, [*parts.rest, *parts.shared])
        self._units = [
            Unit(f"{name}.{block}", parameters)
            for (block, _), parameters in zip(parts.blocks, parts.block_parameters, strict=True)
        ]
        self.block_bytes = sum(unit.num_bytes for unit in self._units)
        """What the blocks take on the device when all are resident."""
        self._rest_bytes = sum(p.numel() * p.element_size() for p in (*parts.rest, *parts.shared))
        if device_bytes is not None:
            resident_bytes = self.resident_for(device_bytes)
        try:
            self.streamer = self._stream(self.block_bytes if resident_bytes is None else resident_bytes)
        except BaseException:
            for unit in self._units:
                unit.restore()
            self._placed.restore()
            raise
        self._gates = [Gate(parts.module, entry, scoped(self.lock)) for entry in entries(parts.module)]
        self._gates.append(Gate(parts.module, "_apply", conversions_refused(name, parts.module, engine.device)))
        for number, (_, block) in enumerate(parts.blocks):
            self._gates.append(Gate(block, "forward", scoped(_BlockScope(self, number))))

    def resident_for(self, device_bytes: int) -> int:
        """Bytes of the blocks that stay when `device_bytes` of its weights do; with what aligning adds to them."""
        chosen = choose_resident([unit.weight_bytes for unit in self._units], device_bytes - self._rest_bytes)
        return sum(self._units[number].num_bytes for number in chosen)

    def set_resident(self, resident_bytes: int) -> None:
        """Keep other blocks on the device, `resident_bytes` at most; waits for the call that is under way.

        Raises torch.OutOfMemoryError, after which all blocks stream.
        """
        with self.lock:
            sizes = [unit.num_bytes for unit in self._units]
            if choose_resident(sizes, resident_bytes) == self.streamer.resident:
                return
            self.streamer.close()
            try:
                self.streamer = self._stream(resident_bytes)
            except torch.OutOfMemoryError:
                self.streamer = self._stream(0)
                raise

    def reset(self) -> None:
        """Back to a plain CPU module."""
        with self.lock:
            for gate in reversed(self._gates):
                gate.remove()
            self.streamer.close()
            for unit in self._units:
                unit.restore()
            self._placed.restore()

    def _stream(self, resident_bytes: int) -> Streamer:
        resident = choose_resident([unit.num_bytes for unit in self._units], resident_bytes)
        return Streamer(self._engine, self._units, resident, self._ahead, staged=self._staged)


class _BlockScope:
    """One call of one block, with the component to itself."""

    __slots__ = ("_component", "_number")

    def __init__(self, component: LayerwiseComponent, number: int) -> None:
        self._component, self._number = component, number

    def __enter__(self) -> None:
        component = self._component
        component.lock.__enter__()
        if self._number not in component.streamer.resident:
            try:
                component.streamer.enter(self._number)
            except BaseException:
                component.lock.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        component = self._component
        try:
            if self._number not in component.streamer.resident:
                component.streamer.leave(self._number)
        finally:
            component.lock.__exit__()
