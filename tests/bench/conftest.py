"""A painter that nobody has trained, for benches that draw."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def painter(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph file with an untrained painter of the tiny scale beside it."""
    import torch
    from diffusers import ZImagePipeline

    where = importlib.util.spec_from_file_location("painter_parts", root / "configs/models/shapes/models.py")
    assert where is not None
    assert where.loader is not None
    parts = importlib.util.module_from_spec(where)
    sys.modules["painter_parts"] = parts
    where.loader.exec_module(parts)
    torch.manual_seed(0)
    scale = parts.SCALES["tiny"]
    tokenizer = parts.build_tokenizer(["a small blue circle on a white background"], scale.vocab_size)
    folder = tmp_path_factory.mktemp("painter")
    ZImagePipeline(
        scheduler=parts.build_noise_scheduler(1.0),
        vae=parts.build_vae(scale),
        text_encoder=parts.build_text_encoder(scale, len(tokenizer)),
        tokenizer=tokenizer,
        transformer=parts.build_transformer(scale),
    ).save_pretrained(folder / "model")
    call = "{num_inference_steps: 2, height: 32, width: 32, guidance_scale: 2.0}"
    (folder / "draw.yaml").write_text(f"stages: {{draw: {{kind: diffusion, model: model, call: {call}}}}}")
    return folder / "draw.yaml"
