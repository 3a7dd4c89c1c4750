"""In place of the offload policies: counts copies as they would, and moves nothing."""

from __future__ import annotations

from typing import Any

from omni.memory import MemoryPlan
from omni.sizes import parse_bytes
from omni.spec import OffloadSpec


class Counters:
    """Copies and bytes so far."""

    def __init__(self) -> None:
        self.num_copies_in = self.bytes_in = self.num_copies_out = self.bytes_out = 0


class Offload:
    """Every call of the denoiser copies what is not resident."""

    def __init__(self, components: dict[str, Any], streamed_bytes: int) -> None:
        self.counters = Counters()
        self.device_bytes = 1000
        denoiser = next(iter(components.values()))
        denoiser.register_forward_pre_hook(lambda *_: self._copy(streamed_bytes))

    def _copy(self, num_bytes: int) -> None:
        now = Counters()
        now.bytes_in = self.counters.bytes_in + num_bytes
        now.num_copies_in = self.counters.num_copies_in + 1
        self.counters = now


def build(components: dict[str, Any], memory: MemoryPlan, device: str, spec: OffloadSpec) -> Offload:
    """A policy that streams what is not resident, or none."""
    assert memory.policy == spec.policy
    size = sum(parameter.nbytes for parameter in next(iter(components.values())).parameters())
    return Offload(components, size - parse_bytes(spec.resident or 0) if memory.policy == "layerwise" else 0)


def build_wrongly(components: dict[str, Any], memory: MemoryPlan, device: str, spec: OffloadSpec) -> Offload:
    """The same with a weight of the denoiser changed."""
    next(iter(components.values())).norm_out.linear.weight[0] += 1
    return build(components, memory, device, spec)


apply_offload = build
"""As stages.policies.offload.apply has it."""
