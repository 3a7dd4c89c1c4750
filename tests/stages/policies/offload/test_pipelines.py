"""Stock pipelines under every policy: what they make is bit-identical to a run with all weights in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from omni.errors import RequestAborted
from tests.stages.policies.offload.conftest import BUILDERS, NUM_LAYERS, POLICIES, Painter

# Libraries below us, on classes they keep for old checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

Painters = Callable[[str], Painter]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", BUILDERS)
def test_requests_are_bit_identical(family: str, policy: str, painters: Painters) -> None:
    painter = painters(family)
    masters = {id(p): p.data for module in painter.components.values() for p in module.parameters()}
    before = {key: master.clone() for key, master in masters.items()}
    offload = painter.offload(policy)
    try:
        for seed in (1, 2, 1):
            assert torch.equal(painter.draw(seed), painter.resident[seed])
        with pytest.raises(RequestAborted):
            painter.draw(2, abort_after=7)
        assert torch.equal(painter.draw(1), painter.resident[1])
        assert offload.counters.num_copies_out == 0
        assert offload.device_bytes > 0
    finally:
        offload.reset()
    assert offload.device_bytes == 0
    for module in painter.components.values():
        for parameter in module.parameters():
            assert torch.equal(parameter.data, before[id(parameter)])
    assert torch.equal(painter.draw(2), painter.resident[2])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", BUILDERS)
def test_requests_at_once_are_bit_identical(family: str, policy: str, painters: Painters) -> None:
    painter = painters(family)
    offload = painter.offload(policy)
    try:
        for drawn, seed in zip(painter.draw_together([1, 2, 1]), [1, 2, 1], strict=True):
            assert torch.equal(drawn, painter.resident[seed])
    finally:
        offload.reset()


@pytest.mark.parametrize("family", BUILDERS)
def test_components_are_copied_once_a_turn(family: str, painters: Painters) -> None:
    """Room for the largest component only: each comes when its turn does, and is never copied back."""
    painter = painters(family)
    offload = painter.offload("component")
    try:
        turns = offload._turns
        assert turns is not None
        came: list[str] = []
        bring = turns._bring

        def watch(seat: object, keep: object) -> bool:
            was_in = seat.begin is not None  # type: ignore[attr-defined]
            is_in = bring(seat, keep)  # type: ignore[arg-type]
            if is_in and not was_in:
                came.append(seat.name)  # type: ignore[attr-defined]
            return is_in

        turns._bring = watch  # type: ignore[method-assign, assignment]
        painter.draw(1)
        before = offload.counters
        came.clear()
        painter.draw(2)
        copied = offload.counters.num_copies_in - before.num_copies_in
        assert copied == sum(len(seat.unit.spans) for name in came for seat in turns.seats if seat.name == name)
        assert len(came) <= len(turns.seats)
        assert len(set(came)) == len(came)
        assert offload.counters.num_copies_out == 0
    finally:
        offload.reset()


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_step_cache_skips_is_not_copied(policy: str, painters: Painters) -> None:
    painter = painters("qwen")
    (denoiser,) = painter.denoisers.values()
    config = FirstBlockCacheConfig(threshold=5.0)  # so high that all steps but the first are skipped
    denoiser.enable_cache(config)
    expected = painter.draw(1)
    denoiser.disable_cache()
    assert not torch.equal(expected, painter.resident[1])
    offload = painter.offload(policy, only=painter.denoisers, ahead=1)
    copies = []
    try:
        for cached in (False, True):
            if cached:
                denoiser.enable_cache(config)
            painter.draw(1)
            before = offload.counters.num_copies_in
            drawn = painter.draw(1)
            copies.append(offload.counters.num_copies_in - before)
            assert torch.equal(drawn, expected if cached else painter.resident[1])
        assert copies == [0, 0] if policy == "component" else copies[1] <= copies[0] / 3
    finally:
        denoiser.disable_cache()
        offload.reset()


@pytest.mark.parametrize("family", BUILDERS)
def test_with_room_for_all_nothing_is_copied_twice(family: str, painters: Painters) -> None:
    painter = painters(family)
    offload = painter.offload("component", budget_bytes=1 << 30)
    try:
        painter.draw(1)
        before = offload.counters
        assert torch.equal(painter.draw(2), painter.resident[2])
        assert offload.counters == before
    finally:
        offload.reset()


@pytest.mark.parametrize("family", BUILDERS)
def test_layerwise_copies_each_streamed_block_once_a_call_in_one_piece(family: str, painters: Painters) -> None:
    painter = painters(family)
    offload = painter.offload("layerwise", only=painter.denoisers, ahead=1)
    try:
        painter.draw(1)  # from now on the order of the blocks is known
        before = [layers.lock.num_calls for layers in offload._layers]
        copied = offload.counters.num_copies_in
        painter.draw(2)
        calls = [layers.lock.num_calls - earlier for layers, earlier in zip(offload._layers, before, strict=True)]
        assert sum(calls) >= 4
        assert {len(layers.streamer.streamed) for layers in offload._layers} <= {NUM_LAYERS, 2 * NUM_LAYERS}
        due = sum(n * len(layers.streamer.streamed) for n, layers in zip(calls, offload._layers, strict=True))
        assert offload.counters.num_copies_in - copied == due
    finally:
        offload.reset()
