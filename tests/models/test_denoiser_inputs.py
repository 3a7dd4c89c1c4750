"""Inputs of a denoise step: every stock denoiser takes them, and no numbers are lost on the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

from omni.errors import UsageError
from omni.models.denoiser_inputs import build_inputs
from omni.models.random_model import RandomModel, write_model
from omni.models.stock import STOCK


@pytest.mark.parametrize("config", STOCK)
def test_every_denoiser_takes_them(config: str, tmp_path: Path) -> None:
    write_model(RandomModel(config=config, scale="tiny", dtype="bfloat16"), tmp_path)
    model_class = getattr(diffusers, STOCK[config].parts["transformer"].class_name)
    denoiser = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)

    def step(seed: int, width: int = 64, num_frames: int = 1) -> torch.Tensor:
        inputs = build_inputs(denoiser, 64, width, num_frames, device="cpu", dtype=torch.bfloat16, seed=seed)
        with torch.no_grad():
            output = denoiser(**inputs)[0]
        return output[0] if isinstance(output, list) else output

    first = step(0)
    assert first.isfinite().all()
    assert first.float().std() > 0
    assert torch.equal(first, step(0))
    assert not torch.equal(first, step(1))
    assert step(0, width=128).numel() == 2 * first.numel()
    if config in ("wan2.2", "ltx-2"):
        assert step(0, num_frames=9).numel() > first.numel()


def test_a_step_is_whole_patches_of_a_known_class() -> None:
    class FluxTransformer2DModel(SimpleNamespace): ...

    with pytest.raises(UsageError, match="SimpleNamespace: no inputs are known for this class; there are QwenImage"):
        build_inputs(SimpleNamespace(), 64, 64, device="cpu", dtype=torch.float32)
    with pytest.raises(UsageError, match="64x72: FluxTransformer2DModel takes multiples of 16 pixels"):
        build_inputs(FluxTransformer2DModel(), 72, 64, device="cpu", dtype=torch.float32)
