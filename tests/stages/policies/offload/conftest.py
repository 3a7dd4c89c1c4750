"""Deep tiny pipelines and what they draw when all their weights are where they compute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from omni.errors import RequestAborted
from omni.memory import MemoryPlan
from omni.spec import OffloadSpec
from omni.stage import Work
from stages.diffusion.denoiser import DenoiseRun
from stages.memory.engine import CopyEngine, HostEngine
from stages.policies.offload.apply import Offload, apply_offload
from tests.stages.diffusion import tiny, tiny_images, tiny_media
from tests.stages.memory.conftest import driver

__all__ = ["driver"]

NUM_LAYERS = 5
BUILDERS: dict[str, Callable[[int], Any]] = {
    "flux": tiny_images.flux,
    "qwen": tiny_images.qwen,
    "sd3": tiny_images.sd3,
    "wan": tiny_media.wan,
    "z_image": tiny_images.z_image,
    "ltx2": tiny_media.ltx2,
}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "component": ("component", {}),
    "layerwise": ("layerwise", {}),
    "layerwise, some resident": ("layerwise", {"resident": "200KB", "ahead": 1}),
    "disk": ("disk", {}),
}


@pytest.fixture(scope="session", autouse=True)
def _one_kernel_thread() -> None:
    """The models are so small that threads only cost."""
    torch.set_num_threads(1)


class Painter:
    """A deep tiny pipeline, run as the diffusion stage runs it: a fork for each request."""

    def __init__(self, family: str) -> None:
        self.recipe = tiny.FAMILIES[family]
        self.pipeline = BUILDERS[family](NUM_LAYERS)
        self.components = {
            name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)
        }
        self.denoisers = {name: part for name, part in self.components.items() if name.startswith("transformer")}
        self.resident = {seed: self.draw(seed) for seed in (1, 2)}

    def draw(self, seed: int, *, abort_after: int | None = None) -> torch.Tensor:
        """What the pipeline makes for `seed`; raises RequestAborted inside the forward after so many blocks."""
        run = DenoiseRun(Work("request", lambda item: None))
        blocks = 0

        def count(module: torch.nn.Module, arguments: Any) -> None:
            nonlocal blocks
            blocks += 1
            if blocks == abort_after:
                raise RequestAborted("request")

        handles = []
        if abort_after is not None:
            for denoiser in self.denoisers.values():
                handles += [
                    m.register_forward_pre_hook(count) for m in denoiser.modules() if "Attention" in str(type(m))
                ]
        try:
            with run.active(), torch.no_grad():
                result = run.fork(self.pipeline)(
                    **self.recipe.inputs(seed),
                    **self.recipe.call,
                    num_inference_steps=4,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    output_type="pt",
                )
        finally:
            for handle in handles:
                handle.remove()
        made = next(
            value for key in ("images", "frames", "audios") if (value := getattr(result, key, None)) is not None
        )
        return torch.as_tensor(made[0] if isinstance(made, list) else made)

    def draw_together(self, seeds: list[int]) -> list[torch.Tensor]:
        """Several requests at once, each in a thread."""
        barrier = threading.Barrier(len(seeds))

        def draw(seed: int) -> torch.Tensor:
            barrier.wait(timeout=60)
            return self.draw(seed)

        with ThreadPoolExecutor(len(seeds)) as pool:
            return list(pool.map(draw, seeds))

    def offload(
        self,
        policy: str,
        engine: CopyEngine | None = None,
        only: dict[str, torch.nn.Module] | None = None,
        **changes: Any,
    ) -> Offload:
        """Put one of POLICIES on the components, or on `only` these; `changes` to the plan and the spec."""
        name, spec = POLICIES[policy]
        plan = MemoryPlan(policy=name, **{key: changes.pop(key) for key in list(changes) if key in PLAN_KEYS})
        order = (self.pipeline.model_cpu_offload_seq or "").split("->")
        spec = OffloadSpec(policy=name, **{**spec, **changes})
        return apply_offload(only or self.components, plan, "cpu", spec, engine or HostEngine(), order)


PLAN_KEYS = ("components", "budget_bytes", "activation_bytes", "context_bytes")


@pytest.fixture(scope="session")
def painters() -> Callable[[str], Painter]:
    """Family -> its painter, made once; tests leave it without a policy."""
    made: dict[str, Painter] = {}

    def get(family: str) -> Painter:
        if family not in made:
            made[family] = Painter(family)
        return made[family]

    return get
