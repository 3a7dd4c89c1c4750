"""Plans that mix places: what stays, streams and takes turns, in one pipeline, within one budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from omni import memory_layouts, memory_planner
from omni.checkpoint import CheckpointFacts, read_facts
from omni.errors import PlanError
from omni.memory import ComponentMemory, MemoryPlan, Place, Room
from omni.memory_planner import plan_memory
from omni.registry import CheckpointRef
from omni.spec import DiffusionSpec, OffloadSpec
from omni.stage import Work
from stages.diffusion.denoiser import DenoiseRun
from stages.memory.engine import HostEngine
from stages.policies.offload.apply import Offload, apply_offload
from stages.policies.offload.units import ALIGN_BYTES, take_apart
from tests.stages.diffusion import tiny, tiny_images
from tests.stages.diffusion.tiny_parts import redraw

# Libraries below us, on classes they keep for old checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

STEPS = 4
CALLS = {"qwen": 2, "flux": 1}
"""Runs of the denoiser in a step."""


class Scene:
    """A tiny pipeline whose text encoder is there too, and works first."""

    def __init__(self, family: str, folder: Path) -> None:
        self.recipe = tiny.FAMILIES[family]
        width = {"qwen": 16, "flux": 32}[family]
        config = transformers.T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=64, num_layers=4, num_heads=2)
        self.encoder = redraw(transformers.T5EncoderModel(config))
        self.pipeline = {"qwen": tiny_images.qwen, "flux": tiny_images.flux}[family](5)
        name = "text_encoder" if family == "qwen" else "text_encoder_2"
        self.pipeline.register_modules(**{name: self.encoder})
        self.encoder_name = name
        self.pipeline.save_pretrained(folder / family)
        self.calls = CALLS[family]
        self.call = {**self.recipe.call, "num_inference_steps": STEPS}
        self.spec = DiffusionSpec(model=str(folder / family), dtype="float32", call=self.call)
        self.facts: CheckpointFacts = read_facts(CheckpointRef(self.spec.model), "")
        self.components = {n: m for n, m in self.pipeline.components.items() if isinstance(m, torch.nn.Module)}
        self.expected = {seed: self.draw(seed) for seed in (1, 2)}

    def draw(self, seed: int) -> torch.Tensor:
        """The picture of a request."""
        run = DenoiseRun(Work("request", lambda item: None))
        with run.active(), torch.no_grad():
            inputs = self.recipe.inputs(seed)
            ids = torch.arange(8)[None] + seed
            inputs["prompt_embeds"] = inputs["prompt_embeds"] + self.encoder(ids).last_hidden_state
            result = run.fork(self.pipeline)(
                **inputs, **self.call, generator=torch.Generator("cpu").manual_seed(seed), output_type="pt"
            )
        return torch.as_tensor(result.images)

    def apply(self, memory: MemoryPlan, ahead: int = 1) -> Offload:
        order = (self.encoder_name, "transformer", "vae")
        return apply_offload(self.components, memory, "cpu", OffloadSpec(ahead=ahead), HostEngine(poison=True), order)

    def weight_bytes(self, name: str) -> int:
        return sum(p.numel() * p.element_size() for p in self.components[name].parameters())

    def placed(self, name: str, place: Place, kept: int = 0) -> ComponentMemory:
        """A component in its place; `kept`: blocks that stay of one that streams."""
        weights = self.weight_bytes(name)
        if place == "device":
            return ComponentMemory(name=name, weight_bytes=weights, device_bytes=weights)
        if place.endswith("in turn"):
            return ComponentMemory(
                name=name, weight_bytes=weights, device_bytes=0, slot_bytes=weights, streamed_bytes=weights, place=place
            )
        blocks = take_apart(self.components[name], set()).block_parameters
        sizes = [sum(p.numel() * 4 for p in parameters) for parameters in blocks]
        device = weights - sum(sizes) + kept * max(sizes)
        return ComponentMemory(
            name=name, weight_bytes=weights, device_bytes=device, streamed_bytes=weights - device, place=place
        )

    @property
    def padding_bytes(self) -> int:
        """What aligning every tensor may add to all weights."""
        sizes = [p.numel() * p.element_size() for module in self.components.values() for p in module.parameters()]
        return sum(-size % ALIGN_BYTES for size in sizes)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    """Family -> its scene, made once."""
    made: dict[str, Scene] = {}
    folder = tmp_path_factory.mktemp("scenes")

    def get(family: str) -> Scene:
        if family not in made:
            made[family] = Scene(family, folder)
        return made[family]

    return get


def copied(offload: Offload, draw: Callable[[], torch.Tensor], expected: torch.Tensor) -> tuple[int, int]:
    """(copies, bytes) of one request that draws what it should."""
    before = offload.counters
    assert torch.equal(draw(), expected)
    after = offload.counters
    assert after.num_copies_out == 0
    return after.num_copies_in - before.num_copies_in, after.bytes_in - before.bytes_in


@pytest.mark.parametrize("source", ["host", "disk"])
@pytest.mark.parametrize("family", CALLS)
def test_a_denoiser_in_turn_is_copied_once_a_request(family: str, source: Any, scenes: Callable[[str], Scene]) -> None:
    """Beside a text encoder that streams, in the room that is left."""
    scene = scenes(family)
    parts = (
        scene.placed("transformer", f"{source}, in turn"),  # type: ignore[arg-type]
        scene.placed("vae", f"{source}, in turn"),  # type: ignore[arg-type]
        scene.placed(scene.encoder_name, f"{source}, streamed", kept=1),  # type: ignore[arg-type]
    )
    policy: Any = "disk" if source == "disk" else "layerwise"
    offload = scene.apply(MemoryPlan(policy=policy, components=parts, budget_bytes=1 << 10))
    try:
        turns = offload._turns
        assert turns is not None
        assert {seat.name for seat in turns.seats} == {"transformer", "vae"}
        assert turns.arena_bytes == max(seat.num_bytes for seat in turns.seats)
        (encoder,) = offload._streaming
        assert (encoder.name, len(encoder.streamer.resident), encoder.streamer.num_slots) == (scene.encoder_name, 1, 2)
        assert torch.equal(scene.draw(1), scene.expected[1])
        copies, num_bytes = copied(offload, lambda: scene.draw(2), scene.expected[2])
        spans = sum(len(seat.unit.spans) for seat in turns.seats)
        streamed = [unit for number, unit in enumerate(encoder._units) if number in encoder.streamer.streamed]
        assert copies <= spans + sum(len(unit.spans) for unit in streamed)
        assert num_bytes >= scene.weight_bytes("transformer") + scene.weight_bytes("vae")
        assert copied(offload, lambda: scene.draw(1), scene.expected[1])[1] <= num_bytes
    finally:
        offload.reset()
    assert offload.device_bytes == 0
    assert torch.equal(scene.draw(2), scene.expected[2])


@pytest.mark.parametrize("family", CALLS)
def test_the_turn_that_comes_next_is_fetched_when_the_budget_has_room(
    family: str, scenes: Callable[[str], Scene]
) -> None:
    scene = scenes(family)
    parts = (
        scene.placed("transformer", "host, in turn"),
        scene.placed("vae", "host, in turn"),
        scene.placed(scene.encoder_name, "device"),
    )
    weights = sum(map(scene.weight_bytes, ("transformer", "vae", scene.encoder_name)))
    budget = weights + scene.padding_bytes + 3000
    plan = MemoryPlan(
        policy="layerwise", components=parts, budget_bytes=budget, activation_bytes=1000, context_bytes=2000
    )
    offload = scene.apply(plan)
    try:
        assert offload.device_bytes <= budget - 3000
        assert torch.equal(scene.draw(1), scene.expected[1])
        assert copied(offload, lambda: scene.draw(2), scene.expected[2]) == (0, 0)
    finally:
        offload.reset()


def test_what_is_on_the_device_already_counts(scenes: Callable[[str], Scene]) -> None:
    """A component that the plan leaves on the device is loaded there, and never comes to the policy."""
    scene = scenes("qwen")
    here = ComponentMemory(name="elsewhere", weight_bytes=1 << 20, device_bytes=1 << 20)
    parts = (scene.placed("transformer", "host, in turn"), scene.placed("vae", "host, in turn"), here)
    offload = scene.apply(MemoryPlan(policy="component", components=parts, budget_bytes=1 << 20))
    try:
        assert offload.free_bytes < 0
        assert offload._turns is not None
        assert offload._turns.arena_bytes == offload._turns.least_bytes
    finally:
        offload.reset()


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.1])
@pytest.mark.parametrize("host_bytes", [1 << 40, 1], ids=["host", "disk"])
@pytest.mark.parametrize("family", CALLS)
def test_plans_of_any_budget_are_kept(
    family: str, host_bytes: int, share: float, scenes: Callable[[str], Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real planner for a share of what all would take; without a context, which is a thousand times the model."""
    for module in (memory_layouts, memory_planner):
        monkeypatch.setattr(module, "CONTEXT_BYTES", 0)
    scene = scenes(family)
    room = Room(device_bytes=0, host_bytes=host_bytes)
    whole = plan_memory(scene.spec, scene.facts, room, activation_bytes=4096)
    room = Room(device_bytes=int(whole.peak_device_bytes * share), host_bytes=host_bytes)
    try:
        plan = plan_memory(scene.spec, scene.facts, room, activation_bytes=4096)
    except PlanError:
        assert share < 0.7
        return
    offload = scene.apply(plan, ahead=scene.spec.offload.ahead)
    try:
        assert plan.policy == "none" if share > 1 else plan.policy in ("layerwise", "component", "disk")
        assert offload.device_bytes <= plan.budget_bytes - plan.activation_bytes + scene.padding_bytes
        assert torch.equal(scene.draw(1), scene.expected[1])
        _, num_bytes = copied(offload, lambda: scene.draw(2), scene.expected[2])
        planned = {part.name: part for part in plan.components}
        for seat in offload._turns.seats if offload._turns else ():
            assert planned[seat.name].place.endswith("in turn")
        for layers in offload._streaming:
            assert planned[layers.name].place.endswith("streamed")
        most = sum(part.streamed_bytes * part.num_copies for part in plan.components)
        runs = max(part.num_copies for part in plan.components)
        # Blocks of several sizes are spread evenly, so that one of them less may have found room.
        largest = max((unit.num_bytes for layers in offload._streaming for unit in layers._units), default=0)
        assert num_bytes <= most + runs * (scene.padding_bytes + largest)
        assert offload.device_bytes <= plan.budget_bytes - plan.activation_bytes + scene.padding_bytes
    finally:
        offload.reset()
