"""Where weights live: a table of (weights, GPU memory) -> policy, refusals, and properties of random models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni import registry
from omni.checkpoint import UNKNOWN, CheckpointFacts
from omni.component_facts import BlockList, ComponentFacts
from omni.errors import PlanError
from omni.memory import ComponentUse, Links, MemoryPlan, Room
from omni.memory_layouts import CONTEXT_BYTES, PROCESS_BYTES
from omni.memory_planner import budget_of, memory_needs, plan_memory
from omni.registry import CheckpointRef, Ports, StageKind
from omni.sizes import GIB
from omni.spec import LoadSpec, OffloadSpec, StageSpec

USES = {
    "transformer": ComponentUse(num_runs=20, activation_bytes=2 * GIB),
    "text_encoder": ComponentUse(activation_bytes=GIB // 2),
    "vae": ComponentUse(activation_bytes=3 * GIB, may_stream=False),
}


class ModelSpec(StageSpec, frozen=True, kw_only=True, tag="weighed"):
    """A stage that can offload."""

    offload: OffloadSpec = OffloadSpec()
    load: LoadSpec = LoadSpec()
    dtype: str = "bfloat16"


KIND = StageKind(
    name="weighed",
    spec_type=ModelSpec,
    stage="nowhere:Stage",
    ports=lambda spec, base_dir: Ports({}, {}),
    checkpoint=lambda spec: CheckpointRef("model"),
    uses=lambda spec, facts: USES,
)


@pytest.fixture(autouse=True, scope="module")
def kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILT_IN, "weighed", f"{__name__}:KIND")
        yield
    registry.find_kind.cache_clear()


def facts_of(**parts: tuple[int, list[int]]) -> CheckpointFacts:
    """Component -> bytes outside of blocks, and of each block."""
    found = {
        name: ComponentFacts(
            {"BF16": outside + sum(blocks)},
            {"BF16": outside},
            (BlockList("blocks", tuple({"BF16": size} for size in blocks)),) if blocks else (),
        )
        for name, (outside, blocks) in parts.items()
    }
    return CheckpointFacts({name: part.total_bytes for name, part in found.items()}, parts=found)


PAINTER = facts_of(transformer=(GIB, [GIB] * 30), text_encoder=(2 * GIB, [GIB] * 14), vae=(GIB, []))
"""48 GiB: a denoiser of 31, a text encoder of 16, a VAE."""


BIG_BLOCKS = facts_of(transformer=(GIB, [GIB] * 20), text_encoder=(0, [4 * GIB] * 3), other=(10 * GIB, []))
TWO_PLAIN = facts_of(text_encoder=(15 * GIB, []), vae=(7 * GIB, []))
ONE = facts_of(model=(0, [GIB] * 4))


def plan(gpu_gib: float, facts: CheckpointFacts = PAINTER, host_gib: float = 512, **offload: Any) -> MemoryPlan:
    spec = ModelSpec(offload=OffloadSpec(**offload))
    links = Links(h2d_bytes_per_second=GIB * 50, disk_bytes_per_second=GIB * 2)
    return plan_memory(spec, facts, Room(device_bytes=int(gpu_gib * GIB), host_bytes=int(host_gib * GIB), links=links))


def summary(found: MemoryPlan) -> dict[str, tuple[str, float]]:
    """Component -> where it lives, and GiB that are copied each time."""
    return {part.name: (part.place, part.streamed_bytes / GIB) for part in found.components}


STAY = ("device", 0.0)
CHOSEN = [
    ("all fits", 52.0, {}, "none", {"transformer": STAY, "text_encoder": STAY, "vae": STAY},
     "48.0 GiB of weights and 3.0 GiB of activations fit in 52.0 GiB"),
    ("unknown memory", 0, {}, "none", {"transformer": STAY, "text_encoder": STAY, "vae": STAY},
     "48.0 GiB of weights and 3.0 GiB of activations; the GPU's memory is not known, so all of it stays there"),
    ("a byte too little: the encoder streams, once a request", 52 - 1 / GIB, {}, "layerwise",
     {"transformer": STAY, "text_encoder": ("host, streamed", 4.0), "vae": STAY},
     "48.0 GiB of weights and 3.0 GiB of activations do not fit in 52.0 GiB; 4.0 GiB of text_encoder stream once: "
     "0.1 s a request (components in turn: 0.3 s)"),
    ("the denoiser takes a turn rather than streaming every step", 38, {}, "component",
     {"transformer": ("host, in turn", 31.0), "text_encoder": ("host, in turn", 16.0), "vae": STAY},
     "48.0 GiB of weights and 3.0 GiB of activations do not fit in 38.0 GiB; transformer and text_encoder take turns: "
     "0.9 s a request (streaming: 2.7 s)"),
    ("the denoiser streams when it is too large for its turn", 24, {}, "layerwise",
     {"transformer": ("host, streamed", 20.0), "text_encoder": ("host, streamed", 14.0), "vae": STAY},
     "48.0 GiB of weights and 3.0 GiB of activations do not fit in 24.0 GiB; 20.0 GiB of transformer stream 20 times, "
     "14.0 GiB of text_encoder stream once: 8.3 s a request (components in turn would need 35.0 GiB)"),
    ("the text encoder takes turns when its blocks are large", 19, {"facts": BIG_BLOCKS}, "layerwise",
     {"transformer": ("host, streamed", 20.0), "text_encoder": ("host, in turn", 12.0),
      "other": ("host, in turn", 10.0)},
     "43.0 GiB of weights and 2.0 GiB of activations do not fit in 19.0 GiB; 20.0 GiB of transformer stream 20 times, "
     "text_encoder and other take turns: 8.4 s a request (components in turn would need 24.0 GiB)"),
    ("whole components when nothing can stream", 24, {"facts": TWO_PLAIN}, "component",
     {"text_encoder": ("host, in turn", 15.0), "vae": ("host, in turn", 7.0)}, ""),
    ("from the checkpoint when the host has too little memory", 24, {"host_gib": 24}, "disk",
     {"transformer": ("disk, streamed", 20.0), "text_encoder": ("disk, streamed", 14.0), "vae": STAY},
     "48.0 GiB of weights and 3.0 GiB of activations do not fit in 24.0 GiB; 20.0 GiB of transformer stream 20 times, "
     "14.0 GiB of text_encoder stream once from the checkpoint, since host memory is short: 207.0 s a request"),
    ("vram: instead of the GPU's memory", 80, {"vram": "52GiB"}, "none",
     {"transformer": STAY, "text_encoder": STAY, "vae": STAY}, ""),
    ("asked: component", 80, {"policy": "component"}, "component",
     {"transformer": ("host, in turn", 31.0), "text_encoder": ("host, in turn", 16.0), "vae": ("host, in turn", 1.0)},
     "as offload.policy says; transformer, text_encoder and vae take turns: 1.0 s a request"),
    ("asked: layerwise, without a budget", 80, {"policy": "layerwise"}, "layerwise",
     {"transformer": ("host, streamed", 30.0), "text_encoder": ("host, streamed", 14.0), "vae": STAY},
     "as offload.policy says; 30.0 GiB of transformer stream 20 times, 14.0 GiB of text_encoder stream once: "
     "12.3 s a request"),
    ("asked: layerwise, with a budget", 80, {"policy": "layerwise", "vram": "40GiB"}, "layerwise",
     {"transformer": ("host, streamed", 4.0), "text_encoder": ("host, streamed", 14.0), "vae": STAY}, ""),
    ("asked: resident", 80, {"policy": "layerwise", "resident": "12GiB"}, "layerwise",
     {"transformer": ("host, streamed", 18.0), "text_encoder": STAY, "vae": STAY}, ""),
    ("asked: disk", 80, {"policy": "disk"}, "disk",
     {"transformer": ("disk, streamed", 30.0), "text_encoder": ("disk, streamed", 14.0), "vae": STAY}, ""),
    ("asked: none", 80, {"policy": "none"}, "none", {"transformer": STAY, "text_encoder": STAY, "vae": STAY},
     "as offload.policy says; 48.0 GiB of weights and 3.0 GiB of activations fit in 80.0 GiB"),
]  # fmt: skip


@pytest.mark.parametrize(("gpu", "options", "policy", "places", "reason"), [row[1:] for row in CHOSEN],
                         ids=[row[0] for row in CHOSEN])  # fmt: skip
def test_chosen(gpu: float, options: dict[str, Any], policy: str, places: dict[str, Any], reason: str) -> None:
    found = plan(gpu, **options)
    assert (found.policy, summary(found)) == (policy, places)
    assert found.reason == reason or not reason
    assert not found.budget_bytes or found.peak_device_bytes + CONTEXT_BYTES <= found.budget_bytes


REFUSED = [
    ("none", 48, {"policy": "none"}, "offload.policy: none does not fit: 48.0 GiB of weights and 3.0 GiB of "
     "activations need at least 52.0 GiB of GPU memory, the CUDA context included, and there are 48.0 GiB: say "
     "offload.policy: auto, or raise offload.vram, use"),
    ("component", 30, {"policy": "component"}, "need at least 35.0 GiB of GPU memory"),
    ("layerwise", 8, {"policy": "layerwise"}, "need at least 14.0 GiB of GPU memory"),
    ("auto", 7, {}, "48.0 GiB of weights and 3.0 GiB of activations need at least 14.0 GiB"),
    ("resident", 24, {"policy": "layerwise", "resident": "20GiB"}, "20.0 GiB of resident blocks (offload.resident) "
     "are too many beside 14.0 GiB for all else in 24.0 GiB: lower offload.resident"),
    ("host", 24, {"policy": "layerwise", "host_gib": 16}, "takes 50.0 GiB of host memory, and there are 16.0 GiB: "
     "say offload.policy: disk"),
    ("one component", 24, {"policy": "component", "facts": ONE}, "needs several components, and this model is one"),
    ("no blocks", 24, {"policy": "layerwise", "facts": TWO_PLAIN}, "needs repeated blocks, and the model has none"),
]  # fmt: skip


@pytest.mark.parametrize(("gpu", "options", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(gpu: float, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan(gpu, **options)
    assert message in str(caught.value)


def test_many_components_are_planned_quickly_and_small_ones_do_the_same() -> None:
    many = facts_of(**{f"encoder_{index}": (0, [GIB // 4] * 40) for index in range(9)})
    found = plan(24, many)
    assert found.peak_device_bytes + CONTEXT_BYTES <= 24 * GIB
    assert {part.place for part in found.components[6:]} == {"host, in turn"}
    assert plan(95, many).policy == "none"


def test_numbers_of_a_streamed_plan() -> None:
    found = plan(80, policy="layerwise")
    assert found.peak_device_bytes == (1 + 3 + 2 + 3 + 1 + 3) * GIB  # outside and slots twice, VAE, its activations
    assert found.peak_host_bytes == PROCESS_BYTES["cuda"] + 47 * GIB + 4 * 16 * 1024**2
    assert found.step_seconds == pytest.approx(30 / 50)
    assert found.copy_seconds == pytest.approx((20 * 30 + 14) / 50)
    assert found.load_seconds == pytest.approx(48 * GIB / 16e9)
    assert found.cold_load_seconds == pytest.approx(24)


def test_load_that_the_libraries_do() -> None:
    spec = ModelSpec(load=LoadSpec(enabled=False))
    found = plan_memory(spec, PAINTER, Room(device_bytes=80 * GIB))
    assert found.load_seconds == pytest.approx(48 * GIB / 6e9)
    assert found.peak_host_bytes == PROCESS_BYTES["cuda"] + 48 * GIB


def test_a_measured_peak_replaces_the_estimates() -> None:
    room = Room(device_bytes=52 * GIB)
    assert plan_memory(ModelSpec(), PAINTER, room, activation_bytes=GIB).peak_device_bytes == 49 * GIB
    assert plan_memory(ModelSpec(), PAINTER, room, activation_bytes=4 * GIB).policy == "layerwise"


def test_on_a_cpu_nothing_is_offloaded() -> None:
    for policy in ("auto", "layerwise"):
        found = plan_memory(ModelSpec(offload=OffloadSpec(policy=policy)), PAINTER, Room(device="cpu"))
        assert (found.policy, found.peak_device_bytes) == ("none", 0)
        assert found.peak_host_bytes == 51 * GIB + PROCESS_BYTES["cpu"]


@pytest.mark.parametrize("policy", ["auto", "layerwise"])
def test_unknown_checkpoint_is_planned_later(policy: Any) -> None:
    room = Room(device_bytes=24 * GIB)
    found = plan_memory(ModelSpec(offload=OffloadSpec(policy=policy, vram="8GiB")), UNKNOWN, room)
    assert (found.components, found.budget_bytes, found.room) == ((), 8 * GIB, room)
    assert found.policy == {"auto": "none"}.get(policy, policy)


def test_kind_that_cannot_offload() -> None:
    spec = StageSpecWithoutOffload()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILT_IN, "stubborn", f"{__name__}:STUBBORN")
        assert memory_needs(spec, PAINTER, Room()) is None
        assert plan_memory(spec, PAINTER, Room(device_bytes=49 * GIB)).policy == "none"
        with pytest.raises(PlanError, match=r"need at least 49\.0 GiB of GPU memory"):
            plan_memory(spec, PAINTER, Room(device_bytes=48 * GIB))


class StageSpecWithoutOffload(StageSpec, frozen=True, kw_only=True, tag="stubborn"):
    """A stage of a kind that has no offload."""


STUBBORN = StageKind("stubborn", StageSpecWithoutOffload, "nowhere:Stage", lambda spec, base_dir: Ports({}, {}))


@pytest.mark.parametrize(
    ("offload", "wanted", "least"),
    [
        ({}, 52, 14),
        ({"vram": "24GiB"}, 24, 14),
        ({"policy": "none"}, 52, 52),
        ({"policy": "layerwise"}, 14, 14),
        ({"policy": "component"}, 35, 35),
    ],
)
def test_needs(offload: dict[str, Any], wanted: int, least: int) -> None:
    found = memory_needs(ModelSpec(offload=OffloadSpec(**offload)), PAINTER, Room(host_bytes=512 * GIB))
    assert found == (wanted * GIB, least * GIB)


def test_budget_is_the_lesser() -> None:
    spec = ModelSpec(offload=OffloadSpec(vram="24GiB"))
    assert [budget_of(spec, Room(device_bytes=size * GIB)) for size in (80, 16, 0)] == [24 * GIB, 16 * GIB, 24 * GIB]
    assert budget_of(ModelSpec(), Room()) == 0


# Properties -----------------------------------------------------------------------------------------------------

part = st.tuples(st.integers(0, 40), st.lists(st.integers(1, 12), max_size=6))
models = st.fixed_dictionaries({"transformer": part}, optional={"text_encoder": part, "vae": part, "other": part})
policies = st.sampled_from(["auto", "auto", "none", "component", "layerwise", "disk"])


def plan_random(model: dict[str, tuple[int, list[int]]], gpu: int, host: int, **offload: Any) -> MemoryPlan | None:
    sizes = {name: (outside * GIB, [size * GIB for size in blocks]) for name, (outside, blocks) in model.items()}
    try:
        return plan(gpu, facts_of(**sizes), host, **offload)
    except PlanError:
        return None


@settings(max_examples=300)
@given(models, st.integers(1, 200), st.integers(1, 300), policies, st.integers(1, 4), st.none() | st.integers(0, 30))
def test_every_plan_holds(
    model: dict[str, Any], gpu: int, host: int, policy: Any, ahead: int, resident: int | None
) -> None:
    options: dict[str, Any] = {"policy": policy, "ahead": ahead}
    if resident is not None:
        options["resident"] = f"{resident}GiB"
    found = plan_random(model, gpu, host, **options)
    if found is None:
        return
    assert found == plan_random(model, gpu, host, **options)
    assert found.peak_device_bytes + CONTEXT_BYTES <= gpu * GIB
    on_host = sum(part.weight_bytes for part in found.components if part.place.startswith("host"))
    assert not on_host or on_host + PROCESS_BYTES["cuda"] <= host * GIB
    assert policy in ("auto", found.policy)
    taken = 0
    for part in found.components:
        outside, blocks = model[part.name]
        assert part.weight_bytes == (outside + sum(blocks)) * GIB
        assert part.device_bytes + part.streamed_bytes == part.weight_bytes
        taken += part.device_bytes + (part.slot_bytes if part.place.endswith("streamed") else 0)
    assert taken <= found.peak_device_bytes
    needs = sum(outside + sum(blocks) for outside, blocks in model.values()) + 1
    needs += max(USES[name].activation_bytes for name in model if name in USES) // GIB
    if policy == "auto":
        assert (found.policy == "none") == (needs <= gpu)


@settings(max_examples=200)
@given(models, st.integers(1, 150), st.integers(1, 40), st.integers(1, 300), st.integers(1, 3))
def test_more_memory_never_copies_longer(model: dict[str, Any], gpu: int, more: int, host: int, ahead: int) -> None:
    small, large = (plan_random(model, size, host, ahead=ahead) for size in (gpu, gpu + more))
    assert small is None or (large is not None and large.copy_seconds <= small.copy_seconds + 1e-9)
    if small is not None and large is not None and {"disk"}.isdisjoint({small.policy, large.policy}):
        copied = [sum(part.streamed_bytes * part.num_copies for part in one.components) for one in (small, large)]
        assert copied[1] <= copied[0]


@given(models, st.integers(1, 300))
def test_least_is_enough_and_less_is_not(model: dict[str, Any], host: int) -> None:
    sizes = {name: (outside * GIB, [size * GIB for size in blocks]) for name, (outside, blocks) in model.items()}
    needs = memory_needs(ModelSpec(), facts_of(**sizes), Room(host_bytes=host * GIB))
    assert needs is not None
    wanted, least = (-(-size // GIB) for size in needs)
    assert least <= wanted
    assert plan_random(model, least, host) is not None
    assert plan_random(model, least - 1, host) is None or least == 1
