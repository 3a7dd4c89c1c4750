"""Offload policies on a CUDA GPU: the same bits as with all weights there, and copies that hide behind computing."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from omni.checkpoint import CheckpointFacts
from omni.component_facts import BlockList, ComponentFacts
from omni.memory import MemoryPlan, Policy, Room
from omni.memory_layouts import CONTEXT_BYTES
from omni.memory_planner import plan_memory
from omni.spec import DiffusionSpec, OffloadSpec
from stages.policies.offload.apply import Offload, apply_offload
from stages.policies.offload.correction import Correction

pytestmark = pytest.mark.gpu

WIDTH, NUM_LAYERS = 4096, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)))) * self.scale


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(NUM_LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """3.3 GB of random bfloat16 weights on the CPU."""
    torch.manual_seed(0)
    return Denoiser().to(torch.bfloat16).eval()


def test_requests_correct_the_plan_on_a_gpu(denoiser: Denoiser) -> None:
    """A first request lets all blocks stay; one that finds no memory runs again with the least, and less stays."""
    block = sum(p.numel() * 2 for p in denoiser.blocks[0].parameters())
    total = sum(p.numel() * 2 for p in denoiser.parameters())
    lists = (BlockList("blocks", ({"BF16": block},) * NUM_LAYERS),)
    part = ComponentFacts({"BF16": total}, {"BF16": total - NUM_LAYERS * block}, lists)
    facts = CheckpointFacts({"transformer": total}, parts={"transformer": part})
    spec = DiffusionSpec(model="m", dtype="bfloat16", offload=OffloadSpec(ahead=1))
    room = Room(device_bytes=total + CONTEXT_BYTES + block)
    plan = plan_memory(spec, facts, room, activation_bytes=4 * block)
    offload = apply_offload({"transformer": denoiser}, plan, "cuda", spec.offload)
    correction = Correction.of("draw", offload, plan, spec, facts)
    assert correction is not None
    x, tries = tokens(16), 0

    def request(taken: int, fails: bool = False) -> torch.Tensor:
        def work() -> torch.Tensor:
            nonlocal tries
            tries += 1
            held = torch.empty(taken, dtype=torch.uint8, device="cuda")
            if fails and tries == 1:
                torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
            with torch.no_grad():
                return denoiser(x) + held[0] * 0

        tries = 0
        return correction.run(work, lambda error: isinstance(error, torch.OutOfMemoryError)).cpu()

    try:
        first, planned = request(block // 4), plan.components[0].device_bytes
        assert block // 4 <= correction.memory.activation_bytes < block
        assert offload.resident_bytes > planned
        assert torch.equal(request(block // 4), first)
        assert torch.equal(request(3 * block, fails=True), first)
        assert tries == 2
        assert correction.memory.activation_bytes >= 3 * block
        assert offload.device_bytes + 3 * block <= plan.budget_bytes - CONTEXT_BYTES
        assert torch.equal(request(block // 4), first)
    finally:
        offload.reset()


def put(modules: dict[str, nn.Module], policy: Policy, **spec: Any) -> Offload:
    return apply_offload(modules, MemoryPlan(policy=policy), "cuda", OffloadSpec(policy=policy, **spec))


def tokens(number: int) -> torch.Tensor:
    return torch.randn(
        number, WIDTH, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(1)
    )


def step_seconds(module: nn.Module, x: torch.Tensor, num_steps: int = 5) -> float:
    """Median seconds of a step after two that warm up."""
    seconds = []
    with torch.no_grad():
        for _ in range(num_steps + 2):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            module(x)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds[2:])[num_steps // 2]


@torch.no_grad()
def test_every_policy_gives_the_bits_of_a_resident_run(denoiser: Denoiser) -> None:
    x = tokens(512)
    denoiser.cuda()
    expected = denoiser(x)
    denoiser.cpu()
    policies: list[tuple[Policy, dict[str, Any]]] = [
        ("component", {}),
        ("layerwise", {}),
        ("layerwise", {"resident": "1500MB", "ahead": 1}),
        ("disk", {}),
    ]
    for policy, spec in policies:
        offload = put({"transformer": denoiser}, policy, **spec)
        before = offload.counters
        for _ in range(4):
            assert torch.equal(denoiser(x), expected), policy
        assert {parameter.device.type for parameter in denoiser.parameters()} == {"cuda"}
        assert offload.counters.num_copies_out == 0
        if policy == "layerwise":
            streamed = len(offload._layers[0].streamer.streamed)
            ahead = spec.get("ahead", 2)
            assert offload.counters.num_copies_in - before.num_copies_in == 4 * streamed + ahead
        offload.reset()
        assert {parameter.device.type for parameter in denoiser.parameters()} == {"cpu"}


@torch.no_grad()
def test_components_take_turns_in_less_memory_than_both_need(denoiser: Denoiser) -> None:
    other = Denoiser().to(torch.bfloat16).eval()
    x = tokens(256)
    expected = []
    for module in (denoiser, other):
        expected.append(module.cuda()(x))
        module.cpu()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    offload = put({"text_encoder": other, "transformer": denoiser}, "component")
    weights = sum(parameter.numel() * 2 for parameter in denoiser.parameters())
    for _ in range(2):
        assert torch.equal(other(x), expected[1])
        assert torch.equal(denoiser(x), expected[0])
    assert torch.cuda.max_memory_allocated() - start < 1.3 * weights
    assert offload.counters.num_copies_out == 0
    assert 0 < offload.measured_activation_bytes < weights
    offload.reset()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= start + (1 << 20)


def test_copies_hide_behind_computing(denoiser: Denoiser) -> None:
    """With enough tokens a step takes as long as its kernels, with few as long as its copies."""
    denoiser.cuda()
    computing = {number: step_seconds(denoiser, tokens(number)) for number in (64, 32768)}
    denoiser.cpu()
    offload = put({"transformer": denoiser}, "layerwise")
    copying = step_seconds(denoiser, tokens(64))
    both = step_seconds(denoiser, tokens(32768))
    offload.reset()
    assert copying > 2 * computing[64]
    assert both < 1.2 * max(copying, computing[32768])
