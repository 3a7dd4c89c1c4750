"""What stays on the device for as long as the policy lasts: parameters outside of blocks, buffers, special tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stages.memory.engine import CopyEngine
from stages.policies.offload.units import Parts, Unit


class Placed:
    """Parameters, buffers and tensor subclasses of one component, on the device until `restore`.

    Buffers live there because code may write them, and pipelines read them outside of any call (a VAE's statistics).
    """

    def __init__(self, name: str, engine: CopyEngine, parts: Parts, parameters: Sequence[nn.Parameter]) -> None:
        """`parameters`: the plain ones that shall stay. Raises torch.OutOfMemoryError."""
        self._engine = engine
        self._unit = Unit(name, parameters)
        self._memory = engine.allocate(self._unit.num_bytes)
        for ready in self._unit.copy_in(engine, self._memory):
            engine.wait(ready)
        self._unit.bind(self._memory)
        self._buffers: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        """Buffer, its master, and its version when it came."""
        self._fixed: list[tuple[nn.Module, str, torch.Tensor]] = []
        for buffer in parts.buffers:
            master = buffer.data
            buffer.data = master.to(engine.device, copy=True)
            self._buffers.append((buffer, master, buffer._version))
        for owner, key in parts.fixed:
            table = owner._parameters if key in owner._parameters else owner._buffers
            before = table[key]
            assert before is not None
            if before.device != engine.device:
                moved = before.detach().to(engine.device)
                table[key] = nn.Parameter(moved, requires_grad=False) if isinstance(before, nn.Parameter) else moved
                self._fixed.append((owner, key, before))

    @property
    def num_bytes(self) -> int:
        """Bytes of its parameters on the device."""
        return self._unit.num_bytes

    def restore(self) -> None:
        """Show the masters again; buffers that were written keep what was written."""
        for buffer, master, version in self._buffers:
            if buffer._version != version and buffer.shape == master.shape:
                self._engine.copy_out(master, buffer.data)
            buffer.data = master
        for owner, key, before in self._fixed:
            (owner._parameters if key in owner._parameters else owner._buffers)[key] = before
        self._unit.restore()
        self._engine.free(self._memory)
        self._buffers, self._fixed = [], []
