"""Small modules to put policies on, and what all tests do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from omni.memory import MemoryPlan
from omni.spec import OffloadSpec
from stages.memory.engine import HostEngine
from stages.policies.offload.apply import Offload, apply_offload

POLICIES = ("component", "layerwise", "disk")


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x)) * self.scale


class Denoiser(nn.Module):
    def __init__(self, num_layers: int = 6, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(num_layers)])
        self.table = nn.Parameter(torch.randn(width))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        self.calls += 1
        x = self.embed(x) + self.table
        for block in self.blocks[:1] if skip else self.blocks:
            x = block(x)
        return x


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.bias = nn.Parameter(torch.randn(8))
        self.bn = nn.BatchNorm1d(8)

    @property
    def decoded(self) -> int:
        return 1

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x) + self.bias

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.bias


def put(modules: dict[str, nn.Module], policy: str, spec: dict[str, Any] | None = None, **plan: Any) -> Offload:
    order = plan.pop("order", ())
    memory = MemoryPlan(policy=policy, **plan)
    return apply_offload(modules, memory, "cpu", OffloadSpec(policy=policy, **(spec or {})), HostEngine(), order)


def same(run: Callable[[], torch.Tensor], components: dict[str, nn.Module], policy: str, **plan: Any) -> Offload:
    """Check that `run` gives the same with the policy as without, before, during and after; returns the policy."""
    with torch.no_grad():
        expected = run()
        offload = put(components, policy, **plan)
        for _ in range(2):
            assert torch.equal(run(), expected)
        assert offload.counters.num_copies_out == 0
        offload.reset()
        assert torch.equal(run(), expected)
    assert offload.device_bytes == 0
    return offload


X = torch.arange(16.0).view(2, 8) / 16
