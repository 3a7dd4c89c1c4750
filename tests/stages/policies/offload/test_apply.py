"""Policies on single modules: odd ways to enter them, tied and shared weights, buffers, adapters, failures, threads."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import nn

from omni.errors import UsageError
from omni.memory import ComponentMemory, MemoryPlan
from omni.spec import OffloadSpec
from stages.memory import limits
from stages.memory.engine import HostEngine
from stages.memory.host import CHECK_BYTES
from stages.memory.limits import Room
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


@pytest.mark.parametrize("policy", POLICIES)
def test_methods_and_modules_called_directly_find_their_weights(policy: str) -> None:
    vae, denoiser = Vae().eval(), Denoiser().eval()

    def run() -> torch.Tensor:
        x = vae.encode(X)
        x = denoiser.embed(x) + denoiser.blocks[3](x)
        return vae.decoder(x) + vae.decode(x) + vae.bn.running_mean

    offload = same(run, {"vae": vae, "transformer": denoiser}, policy)
    assert offload.policy == policy


@pytest.mark.parametrize("policy", POLICIES)
def test_a_text_encoder_with_tied_weights_generates(policy: str) -> None:
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3, 4]])

    def run() -> torch.Tensor:
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        hidden = model.model(tokens).last_hidden_state
        return torch.cat([tokens.flatten().float(), hidden.flatten(), model.lm_head(hidden).flatten()])

    same(run, {"model": model}, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_encoder_with_shared_embeddings_and_parts_called_alone(policy: str) -> None:
    config = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=4, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    ids = torch.tensor([[1, 2, 3, 4]])

    def run() -> torch.Tensor:
        assert model.dtype == torch.float32
        assert model.device.type == "cpu"
        states = model(ids).last_hidden_state + model.encoder(ids).last_hidden_state
        return states + model.get_input_embeddings()(ids)

    same(run, {"text_encoder": model}, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_unet_whose_blocks_do_not_come_in_order(policy: str) -> None:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=2,
    ).eval()
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    same(lambda: unet(sample, 3, states).sample, {"unet": unet}, policy, spec={"ahead": 1})


@pytest.mark.parametrize("policy", POLICIES)
def test_skipped_blocks(policy: str) -> None:
    denoiser = Denoiser().eval()
    same(lambda: denoiser(X, skip=True) + denoiser(X) + denoiser(X, skip=True), {"transformer": denoiser}, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_components_inside_one_another_and_shared_weights(policy: str) -> None:
    first, second = Denoiser().eval(), Denoiser().eval()
    second.blocks[2].linear.weight = first.blocks[4].linear.weight
    second.table = first.table
    components: dict[str, nn.Module] = {"a": first, "b": second, "again": first, "part": first.blocks[1]}
    same(lambda: first(X) + second(X) + first.blocks[1](X) + second(X), components, policy)


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


@pytest.mark.parametrize("policy", POLICIES)
def test_pipelines_read_signatures_dtypes_and_devices(policy: str) -> None:
    denoiser = Denoiser().to(torch.bfloat16).eval()
    before = inspect.signature(denoiser.forward)
    offload = put({"transformer": denoiser}, policy)
    assert inspect.signature(denoiser.forward) == before
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert denoiser.to("cpu") is denoiser
    assert denoiser.to(torch.bfloat16) is denoiser
    with pytest.raises(UsageError, match=r"transformer cannot be converted to torch.float32 .*offload.policy: none"):
        denoiser.to(torch.float32)
    offload.reset()
    assert "forward" not in vars(denoiser)
    assert "_apply" not in vars(denoiser)
    assert denoiser.float().table.dtype == torch.float32


def test_none_does_nothing() -> None:
    denoiser = Denoiser()
    before = [parameter.data_ptr() for parameter in denoiser.parameters()]
    offload = put({"transformer": denoiser}, "none")
    assert [parameter.data_ptr() for parameter in denoiser.parameters()] == before
    assert "forward" not in vars(denoiser)
    assert offload.device_bytes == offload.counters.num_copies_in == 0
    offload.reset()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_next_request_works_after_a_failed_one(policy: str) -> None:
    denoiser, other = Denoiser().eval(), Denoiser().eval()
    with torch.no_grad():
        expected = denoiser(X) + other(X)
        offload = put({"a": denoiser, "b": other}, policy)
        for wrong in (torch.zeros(2, 3), torch.zeros(2, 8, dtype=torch.int64)):
            with pytest.raises(RuntimeError):
                denoiser(wrong)
        broken = denoiser.blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            denoiser(X)
        broken.remove()
        assert torch.equal(denoiser(X) + other(X), expected)
        offload.reset()


@pytest.mark.parametrize("policy", POLICIES)
def test_many_threads(policy: str) -> None:
    components: dict[str, nn.Module] = {name: Denoiser().eval() for name in "abc"}
    barrier = threading.Barrier(4)

    def work(number: int) -> torch.Tensor:
        barrier.wait(timeout=60)
        x = X + number
        with torch.no_grad():
            for step in range(12):
                x = components["abc"[(step + number) % 3]](x)
        return x

    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(work, range(4)))
        offload = put(components, policy)
        for drawn, value in zip(pool.map(work, range(4)), expected, strict=True):
            assert torch.equal(drawn, value)
        offload.reset()


def test_a_component_inside_a_call_of_another_needs_room_beside_it() -> None:
    outer, inner = Denoiser().eval(), Denoiser().eval()
    outer.embed.register_forward_hook(lambda module, arguments, output: inner(output))
    offload = put({"outer": outer, "inner": inner}, "component")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"'inner' is called from within outer .*offload.policy: layerwise"):
            outer(X)
        offload.set_resident(1 << 20)
        outer(X)
    offload.reset()


def test_the_next_component_is_fetched_while_one_computes() -> None:
    components: dict[str, nn.Module] = {name: Denoiser().eval() for name in "abc"}
    size = 4096
    offload = put(components, "component", budget_bytes=2 * size, order=("b", "c", "a"))
    turns = offload._turns
    assert turns is not None
    inside: list[list[str]] = []
    for module in components.values():
        module.embed.register_forward_hook(
            lambda *_: inside.append(sorted(seat.name for seat in turns.seats if seat.begin is not None))
        )
    with torch.no_grad():
        for name in "bcabca":
            components[name](X)
        assert inside == [["b", "c"], ["a", "c"], ["a", "b"]] * 2
        inside.clear()
        for name in "bacbac":  # another order, learnt in its first round
            components[name](X)
        assert inside[3:] == [["a", "b"], ["a", "c"], ["b", "c"]]
    offload.reset()


def test_the_plan_says_what_stays() -> None:
    components: dict[str, nn.Module] = {"transformer": Denoiser().eval(), "vae": Vae().eval()}
    weights = sum(p.numel() * 4 for p in components["transformer"].parameters())
    block = 2 * 256  # a weight of 256 bytes and a bias of 32, each at a multiple of 256
    rest = sum(p.numel() * 4 for p in [*components["transformer"].embed.parameters(), components["transformer"].table])
    planned = (
        ComponentMemory(
            name="transformer", weight_bytes=weights, device_bytes=rest + 4 * block, streamed_bytes=weights // 2
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
