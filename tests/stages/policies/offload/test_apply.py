"""Putting a policy on and taking it off: shares, tied weights, buffers, masters, adapters, lack of room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from omni.errors import UsageError
from omni.memory import ComponentMemory, MemoryPlan
from omni.spec import OffloadSpec
from stages.memory import limits
from stages.memory.engine import HostEngine, Ready
from stages.memory.host import CHECK_BYTES
from stages.memory.limits import Room
from stages.policies.offload.apply import apply_offload
from stages.policies.offload.units import pack
from tests.stages.memory.conftest import Driver
from tests.stages.policies.offload.small import POLICIES, Denoiser, Vae, X, put, same


@pytest.mark.parametrize("policy", POLICIES)
def test_components_inside_one_another_and_shared_weights(policy: str) -> None:
    first, second = Denoiser().eval(), Denoiser().eval()
    second.blocks[2].linear.weight = first.blocks[4].linear.weight
    second.table = first.table
    components: dict[str, nn.Module] = {"a": first, "b": second, "again": first, "part": first.blocks[1]}
    same(lambda: first(X) + second(X) + first.blocks[1](X) + second(X), components, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_shared_parameter_is_on_the_device_once(policy: str) -> None:
    first, second = Denoiser().eval(), Denoiser().eval()
    alone = put({"a": first, "b": second}, policy)
    apart = alone.counters.bytes_in
    alone.reset()
    second.table = first.table
    master = first.table.data_ptr()
    offload = put({"a": first, "b": second}, policy)
    if policy != "component":  # whose components are copied whole, and when they are called
        assert offload.counters.bytes_in <= apart - first.table.nbytes
    assert first.table.data_ptr() != master
    offload.reset()
    assert first.table.data_ptr() == second.table.data_ptr() == master


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_written_to_buffers_is_kept(policy: str) -> None:
    denoiser = Denoiser().eval()
    with torch.no_grad():
        denoiser(X)
        offload = put({"transformer": denoiser}, policy)
        denoiser(X)
        denoiser(X)
        assert float(denoiser.calls) == 3
        assert offload.counters.num_copies_out == 0
        offload.reset()
        denoiser(X)
    assert float(denoiser.calls) == 4


def test_none_does_nothing() -> None:
    denoiser = Denoiser()
    before = [parameter.data_ptr() for parameter in denoiser.parameters()]
    offload = put({"transformer": denoiser}, "none")
    assert [parameter.data_ptr() for parameter in denoiser.parameters()] == before
    assert "forward" not in vars(denoiser)
    assert offload.device_bytes == offload.counters.num_copies_in == 0
    offload.reset()


def test_the_plan_says_what_stays() -> None:
    components: dict[str, nn.Module] = {"transformer": Denoiser().eval(), "vae": Vae().eval()}
    weights = sum(p.numel() * 4 for p in components["transformer"].parameters())
    block = (8 * 8 + 8) * 4
    rest = sum(p.numel() * 4 for p in [*components["transformer"].embed.parameters(), components["transformer"].table])
    planned = (
        ComponentMemory(
            name="transformer",
            weight_bytes=weights,
            device_bytes=rest + 4 * block,
            streamed_bytes=weights // 2,
            place="host, streamed",
        ),
        ComponentMemory(name="vae", weight_bytes=1000, device_bytes=1000),
    )
    offload = put(components, "layerwise", components=planned, spec={"ahead": 1})
    resident = {layers.name: len(layers.streamer.resident) for layers in offload._layers}
    assert resident == {"transformer": 4, "vae": 0}
    assert {layers.name: layers.streamer.num_slots for layers in offload._layers} == {"transformer": 2, "vae": 0}
    before = offload.counters
    with torch.no_grad():
        for _ in range(4):
            components["transformer"](X)
            components["vae"].decode(X)
    assert offload.counters.num_copies_in - before.num_copies_in == 2  # the two streamed ones have a slot each
    offload.reset()


def test_residency_is_corrected_at_run_time() -> None:
    denoiser, encoder = Denoiser().eval(), Denoiser().eval()
    with torch.no_grad():
        expected = denoiser(X) + encoder(X)
        offload = put({"encoder": encoder, "transformer": denoiser}, "layerwise", spec={"ahead": 1})
        least = offload.device_bytes
        for resident_bytes in (0, 2000, 1 << 20, 500, 0):
            offload.set_resident(resident_bytes)
            for _ in range(2):
                assert torch.equal(denoiser(X) + encoder(X), expected)
                denoiser(X)
            assert offload.device_bytes <= least + resident_bytes
        offload.set_resident(2000)
        kept = {layers.name: layers.streamer.resident_bytes for layers in offload._layers}
        assert kept["transformer"] > kept["encoder"], "what is called more often comes first"
        offload.reset()


def test_layers_injected_later_work_and_are_found() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.extra = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + x @ self.extra

    denoiser = Denoiser().eval()
    offload = put({"transformer": denoiser}, "layerwise")
    for block in denoiser.blocks:
        block.linear = Adapted(block.linear)
    with torch.no_grad():
        adapted = [denoiser(X), denoiser(X)]
        offload.refresh()
        adapted += [denoiser(X), denoiser(X)]
        offload.reset()
        adapted.append(denoiser(X))
    assert all(torch.equal(drawn, adapted[0]) for drawn in adapted)


@pytest.mark.parametrize("policy", ["component", "layerwise"])
def test_a_device_without_room_leaves_plain_modules(policy: str) -> None:
    components: dict[str, nn.Module] = {"a": Denoiser().eval(), "b": Vae().eval()}

    class Small(HostEngine):
        def _allocate(self, num_bytes: int) -> torch.Tensor:
            if self.device_bytes + num_bytes > 2000:
                raise torch.OutOfMemoryError("no room")
            return super()._allocate(num_bytes)

    engine = Small()
    with torch.no_grad():
        expected = components["a"](X)
        with pytest.raises(torch.OutOfMemoryError):
            apply_offload(components, MemoryPlan(policy=policy), "cpu", OffloadSpec(), engine)
        assert engine.device_bytes == 0
        assert "forward" not in vars(components["a"])
        assert torch.equal(components["a"](X), expected)


def test_a_host_without_room_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.empty(CHECK_BYTES, dtype=torch.uint8)
            self.parts = nn.ParameterList([nn.Parameter(weight[i::2], requires_grad=False) for i in (0, 1)])

    monkeypatch.setattr(limits, "host_room", lambda: Room(1 << 20, "a small machine"))
    with pytest.raises(UsageError, match=r"64.0 MiB .* 1.0 MiB .*a small machine"):
        put({"a": Wide()}, "component")


class Pinning(HostEngine):
    """Wants pinned memory, as a GPU does."""

    pins = True

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Any = (), *, staged: bool = False) -> Ready:
        self.pins = False
        try:
            return super().copy_in(target, source, after, staged=staged)
        finally:
            self.pins = True


@pytest.mark.parametrize("policy", ["component", "layerwise"])
def test_masters_that_the_loader_laid_out_are_pinned_where_they_are(policy: str, driver: Driver) -> None:
    denoiser = Denoiser().eval()
    groups = [list(denoiser.embed.parameters()), [denoiser.table], *(list(b.parameters()) for b in denoiser.blocks)]
    region = pack(groups)
    masters = [parameter.data_ptr() for parameter in denoiser.parameters()]
    engine, memory = Pinning(), MemoryPlan(policy=policy)
    with torch.no_grad():
        expected = denoiser(X)
        offload = apply_offload({"transformer": denoiser}, memory, "cpu", OffloadSpec(ahead=1), engine)
        assert region.is_pinned
        assert offload.host_bytes == region.num_bytes
        before = engine.counters.num_copies_in
        for _ in range(3):
            assert torch.equal(denoiser(X), expected)
        copies = engine.counters.num_copies_in - before
        assert copies == (3 * 6 + 1 if policy == "layerwise" else 0), "one for each block and round, in one piece"
        offload.reset()
    assert driver.registered == {}
    assert [parameter.data_ptr() for parameter in denoiser.parameters()] == masters


def test_masters_elsewhere_are_packed_into_pinned_memory_once(driver: Driver) -> None:
    denoiser = Denoiser().eval()
    engine = Pinning()
    offload = apply_offload(
        {"transformer": denoiser}, MemoryPlan(policy="layerwise"), "cpu", OffloadSpec(ahead=1), engine
    )
    pinned = dict(driver.registered)
    assert sum(pinned.values()) == offload.host_bytes > 0
    offload.refresh()
    assert driver.registered == pinned
    offload.reset()
    assert driver.registered == {}


def test_from_disk_nothing_is_pinned_or_packed(driver: Driver) -> None:
    denoiser = Denoiser().eval()
    masters = [parameter.data_ptr() for parameter in denoiser.parameters()]
    offload = apply_offload({"t": denoiser}, MemoryPlan(policy="disk"), "cpu", OffloadSpec(ahead=1), Pinning())
    assert offload.host_bytes == 0
    assert driver.registered == {}
    offload.reset()
    assert [parameter.data_ptr() for parameter in denoiser.parameters()] == masters
