"""Step batching above an offload policy: a joined call streams the blocks once for all its requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omni.memory import MemoryPlan
from omni.spec import OffloadSpec
from stages.diffusion.stage import DiffusionStage
from stages.memory.engine import HostEngine
from stages.policies.offload.apply import apply_offload
from tests.stages.diffusion.batching.conftest import run_at_once
from tests.stages.diffusion.batching.support import TOLERANCE
from tests.stages.diffusion.batching.test_families import alone, drawn, levels, requests_of

# Libraries below us, on classes they keep for old checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def test_joined_calls_stream_blocks_once(
    batched: Callable[..., DiffusionStage], checkpoint: Callable[[str], Path]
) -> None:
    stage, requests = batched("sd3"), requests_of("sd3")
    assert stage.built is not None
    assert stage.built.meeting is not None
    seam, batches = stage.built.seams[0], stage.built.meeting.batches
    serial = [alone(stage, "sd3", inputs, seed) for seed, inputs in enumerate(requests)]
    run_at_once(stage, requests)  # tries joined calls
    num_forwards = batches.num_forwards
    seam.remove()
    engine = HostEngine()
    transformer: torch.nn.Module = seam.denoiser
    offload = apply_offload(
        {"transformer": transformer}, MemoryPlan(policy="layerwise"), "cpu", OffloadSpec(policy="layerwise"), engine
    )
    seam._forward, transformer.forward = transformer.forward, seam
    before = offload.counters.num_copies_in
    results = run_at_once(stage, requests)
    copies, forwards = offload.counters.num_copies_in - before, batches.num_forwards - num_forwards
    for expected, items in zip(serial, results, strict=True):
        assert levels(expected, drawn("sd3", items)) <= TOLERANCE
    assert forwards < sum(request["num_inference_steps"] for request in requests)
    assert copies <= 2 * (forwards + 1)  # two blocks for each forward, whoever is in it
    seam.remove()
    offload.reset()
    transformer.forward = seam  # unloading takes it off
