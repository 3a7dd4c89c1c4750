"""A plan that requests correct: what they take is played, what stays on the device follows."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from omni import memory_layouts, memory_planner
from omni.checkpoint import CheckpointFacts
from omni.component_facts import BlockList, ComponentFacts
from omni.memory import MemoryPlan, Room
from omni.memory_planner import plan_memory
from omni.spec import DiffusionSpec, OffloadSpec
from stages.memory.engine import HostEngine
from stages.policies.offload.apply import Offload, apply_offload
from stages.policies.offload.correction import MARGIN, Correction
from tests.stages.policies.offload.small import Denoiser, Vae, X

BLOCK, NUM_BLOCKS, WIDTH = (64 * 64 + 64) * 4, 8, 64
WIDE = torch.arange(128, dtype=torch.float32).view(2, 64) / 64


class Small(HostEngine):
    """A device of `room` bytes, in which a request takes `activation_bytes`."""

    room = 1 << 40

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        if self.device_bytes + num_bytes > self.room:
            raise torch.OutOfMemoryError("no room")
        return super()._allocate(num_bytes)

    def take(self) -> None:
        if self.device_bytes + self.activation_bytes > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")


class Bench:
    """A denoiser of eight blocks and a VAE under a plan, and requests that take what a test says."""

    def __init__(self, budget: int, planned: int, **offload: object) -> None:
        self.denoiser, self.vae = Denoiser(NUM_BLOCKS, WIDTH).eval(), Vae().eval()
        with torch.no_grad():
            self.expected = self.denoiser(WIDE), self.vae.decode(X)
        sizes = {
            name: sum(p.numel() * 4 for p in m.parameters())
            for name, m in (("transformer", self.denoiser), ("vae", self.vae))
        }
        blocks = (BlockList("blocks", ({"F32": BLOCK},) * NUM_BLOCKS),)
        rest = {"F32": sizes["transformer"] - NUM_BLOCKS * BLOCK}
        self.facts = CheckpointFacts(
            sizes,
            parts={
                "transformer": ComponentFacts({"F32": sizes["transformer"]}, rest, blocks),
                "vae": ComponentFacts({"F32": sizes["vae"]}, {"F32": sizes["vae"]}, ()),
            },
        )
        self.spec = DiffusionSpec(model="m", dtype="float32", offload=OffloadSpec(**{"ahead": 1, **offload}))  # type: ignore[arg-type]
        self.plan = plan_memory(self.spec, self.facts, Room(device_bytes=budget), activation_bytes=planned)
        self.engine = Small(poison=True)
        modules: dict[str, torch.nn.Module] = {"transformer": self.denoiser, "vae": self.vae}
        self.offload: Offload = apply_offload(modules, self.plan, "cpu", self.spec.offload, self.engine)
        correction = Correction.of("draw", self.offload, self.plan, self.spec, self.facts)
        assert correction is not None
        self.correction = correction
        self.num_tries = 0

    @property
    def num_resident(self) -> int:
        (layers,) = self.offload._streaming
        return len(layers.streamer.resident)

    def draw(self) -> None:
        self.num_tries += 1
        with torch.no_grad():
            assert torch.equal(self.denoiser(WIDE), self.expected[0])
            self.engine.take()
            assert torch.equal(self.vae.decode(X), self.expected[1])

    def request(self, activation_bytes: int) -> None:
        self.engine.activation_bytes = activation_bytes
        self.correction.run(self.draw, lambda error: isinstance(error, torch.OutOfMemoryError))


@pytest.fixture(autouse=True)
def _small_context(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory_layouts, memory_planner):
        monkeypatch.setattr(module, "CONTEXT_BYTES", 0)


def bench(num_kept: int, planned: int, **offload: object) -> Bench:
    """With room for so many blocks beside two slots, all else and `planned` bytes."""
    weights = sum(p.numel() * 4 for m in (Denoiser(0, WIDTH), Vae()) for p in m.parameters())
    made = Bench(weights + (num_kept + 2) * BLOCK + planned, planned, **offload)
    assert made.num_resident == num_kept
    return made


def test_a_first_request_that_takes_less_lets_more_stay(caplog: pytest.LogCaptureFixture) -> None:
    one = bench(1, 3 * BLOCK)
    with caplog.at_level(logging.INFO):
        one.request(BLOCK)
    assert one.num_resident == 2  # the margin takes the rest of the third
    assert one.correction.memory.activation_bytes == int(BLOCK * MARGIN)
    assert "a request took 16.2 KiB beside the weights, 48.8 KiB were planned" in caplog.text
    assert one.correction.memory.budget_bytes == one.plan.budget_bytes
    caplog.clear()
    copies = one.engine.counters.num_copies_in
    one.request(BLOCK // 2)
    assert one.num_resident == 2, "the largest counts"
    assert one.engine.counters.num_copies_in - copies <= NUM_BLOCKS - 1
    assert not caplog.records
    one.offload.reset()


def test_a_larger_request_lets_less_stay() -> None:
    one = bench(4, BLOCK)
    for taken, kept in ((BLOCK // 2, 4), (2 * BLOCK, 2), (BLOCK, 2), (30 * BLOCK, 0), (BLOCK, 0)):
        one.request(taken)
        assert one.num_resident == kept
    assert one.num_tries == 5
    one.offload.reset()


def test_places_stay_although_others_would_be_better() -> None:
    one = bench(1, 40 * BLOCK)
    assert {part.name: part.place for part in one.plan.components} == {"transformer": "host, streamed", "vae": "device"}
    one.request(1)
    assert plan_memory(one.spec, one.facts, one.plan.room, activation_bytes=1).policy == "none"
    assert [part.place for part in one.correction.memory.components] == [part.place for part in one.plan.components]
    assert one.num_resident == NUM_BLOCKS
    copies = one.engine.counters.num_copies_in
    one.request(1)
    assert one.engine.counters.num_copies_in == copies
    one.offload.reset()


def test_who_asked_for_the_least_gets_no_more() -> None:
    one = Bench(1 << 20, 3 * BLOCK, policy="layerwise")
    one.request(1)
    assert one.num_resident == 0
    fixed = Bench(1 << 20, 3 * BLOCK, policy="layerwise", resident=f"{2 * BLOCK}B")
    fixed.request(1)
    assert fixed.num_resident == 2


def test_a_request_without_memory_runs_again_with_the_least(caplog: pytest.LogCaptureFixture) -> None:
    one = bench(4, BLOCK)
    one.engine.room = one.engine.device_bytes + BLOCK
    one.request(2 * BLOCK)
    assert one.num_tries == 2
    assert "CUDA out of memory; the request runs once more" in caplog.text
    assert one.num_resident == 2
    one.request(2 * BLOCK)
    assert one.num_tries == 3, "the plan has learnt it"
    one.request(BLOCK)
    assert one.num_resident == 2
    with pytest.raises(torch.OutOfMemoryError):
        one.request(30 * BLOCK)
    assert one.num_tries == 6, "one more and no further"
    one.request(BLOCK)
    assert one.num_tries == 7
    one.offload.reset()


def test_other_errors_are_not_tried_again() -> None:
    one = bench(2, BLOCK)

    def fail() -> None:
        one.num_tries += 1
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        one.correction.run(fail, lambda error: isinstance(error, torch.OutOfMemoryError))
    assert (one.num_tries, one.num_resident) == (1, 2)


def test_nothing_changes_in_the_middle_of_another_request() -> None:
    one = bench(1, 3 * BLOCK)
    one.engine.activation_bytes = BLOCK
    begun, done = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert done.wait(timeout=60)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(one.correction.run, wait, lambda error: False)
        assert begun.wait(timeout=60)
        one.request(BLOCK)
        assert one.num_resident == 1
        done.set()
        other.result(timeout=60)
    assert one.num_resident == 2
    one.offload.reset()


def test_growth_that_finds_no_room_ends_with_the_least() -> None:
    one = bench(2, 3 * BLOCK)
    one.engine.room = one.engine.device_bytes
    one.request(0)
    one.engine.activation_bytes = 1
    one.correction.run(lambda: None, lambda error: False)
    assert one.num_resident == 0
    with torch.no_grad():
        assert torch.equal(one.denoiser(WIDE), one.expected[0])
    one.offload.reset()


def test_turns_get_the_room_that_a_request_leaves() -> None:
    weights = sum(p.numel() * 4 for p in Denoiser(NUM_BLOCKS, WIDTH).parameters())
    one = Bench(1 << 20, (1 << 20) - weights, policy="component")
    turns = one.offload._turns
    assert turns is not None
    assert turns.arena_bytes == turns.least_bytes
    one.request(1000)
    assert turns.arena_bytes == sum(seat.num_bytes for seat in turns.seats)
    copies = one.engine.counters.num_copies_in
    one.request(1000)
    one.request(1000)
    assert one.engine.counters.num_copies_in - copies <= 2
    one.request((1 << 20) - weights)
    assert turns.arena_bytes == turns.least_bytes
    one.offload.reset()


def test_who_cannot_do_a_request_twice_only_lets_less_stay() -> None:
    one = bench(4, 2 * BLOCK)
    for taken, kept in ((1, 4), (2 * BLOCK, 3), (BLOCK, 3), (30 * BLOCK, 0), (1, 0)):
        one.engine.activation_bytes = taken
        one.correction.observe()
        assert one.num_resident == kept
    one.offload.reset()


def test_no_plan_no_correction() -> None:
    one = bench(1, BLOCK)
    assert Correction.of("draw", None, one.plan, one.spec, one.facts) is None
    assert Correction.of("draw", one.offload, None, one.spec, one.facts) is None
    assert Correction.of("draw", one.offload, MemoryPlan(policy="disk"), one.spec, one.facts) is None
