"""Building the pipeline: dtypes, custom classes, and checkpoints that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omni.errors import StageSetupError
from omni.spec import DiffusionSpec, LoadSpec
from omni.stage import StageCall, StageContext, Work
from stages.diffusion.build import build_pipeline, choose_dtype
from stages.diffusion.stage import DiffusionStage
from tests.stages.diffusion import tiny
from tests.stages.diffusion.conftest import build_stage

OWN_PIPELINE = """
from diffusers import FluxPipeline


class OwnPipeline(FluxPipeline):
    def __call__(self, brightness: float = 1.0, **kwargs):
        return super().__call__(guidance_scale=brightness, **kwargs)
"""


@pytest.fixture
def flux_copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint("flux"), tmp_path / "copy")


def load(spec: DiffusionSpec, base_dir: Path) -> None:
    build_pipeline(StageContext("draw", spec, str(base_dir)), lambda _: None)


@pytest.mark.parametrize(
    ("dtype", "device", "chosen"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("auto", "cuda:1", torch.bfloat16),
        ("float16", "cuda", torch.float16),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_dtype(dtype: str, device: str, chosen: torch.dtype) -> None:
    assert choose_dtype(DiffusionSpec(model="m", dtype=dtype), device) == chosen


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_bfloat16_from_end_to_end(family: str, checkpoint: Callable[[str], Path]) -> None:
    stage = build_stage(family, checkpoint(family), dtype="bfloat16")
    assert {seam.denoiser.dtype for seam in stage.built.seams} == {torch.bfloat16}
    inputs = tiny.FAMILIES[family].inputs(0)
    assert stage.compute(StageCall("request", inputs, 0), Work("request", lambda item: None))
    stage.unload()


def test_relative_folder(flux_copy: Path) -> None:
    load(DiffusionSpec(model=flux_copy.name), flux_copy.parent)


def test_missing_folder_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(StageSetupError, match="does not exist") as caught:
        load(DiffusionSpec(model="./nothing"), tmp_path)
    assert caught.value.remedy == "change stages.draw"


def test_hub_model_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StageSetupError) as caught:
        load(DiffusionSpec(model="no-such-owner/no-such-model"), tmp_path)
    assert "no-such-owner/no-such-model is a whole checkpoint" in caught.value.remedy


def test_weights_cut_short(flux_copy: Path) -> None:
    weights = next((flux_copy / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StageSetupError, match=r"cut short"):
        load(DiffusionSpec(model=str(flux_copy)), flux_copy)


@pytest.fixture
def other_shapes(flux_copy: Path) -> Path:
    config = flux_copy / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "joint_attention_dim": 48}))
    return flux_copy


def test_weights_of_other_shapes(other_shapes: Path) -> None:
    fault = (
        r"transformer: does not fit FluxTransformer2DModel: it has shape \[32, 32\] for 'context_embedder.weight' in "
    )
    with pytest.raises(StageSetupError, match=fault) as caught:
        load(DiffusionSpec(model=str(other_shapes)), other_shapes)
    assert "load: {enabled: false}" in str(caught.value)


def test_weights_of_other_shapes_loaded_by_the_library(other_shapes: Path) -> None:
    with pytest.raises(StageSetupError) as caught:
        load(DiffusionSpec(model=str(other_shapes), load=LoadSpec(enabled=False)), other_shapes)
    assert caught.value.remedy
    assert "Traceback" in caught.value.details


def test_pickled_weights_are_never_read(flux_copy: Path) -> None:
    weights = next((flux_copy / "vae").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(StageSetupError, match="only pickled weights"):
        load(DiffusionSpec(model=str(flux_copy)), flux_copy)


def test_pipeline_class_of_another_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(StageSetupError) as caught:
        load(DiffusionSpec(model=str(checkpoint("flux")), pipeline="WanPipeline"), tmp_path)
    assert "another pipeline class" in caught.value.remedy


def test_call_is_checked_once_more(flux_copy: Path) -> None:
    with pytest.raises(StageSetupError, match=r"call\.heigth: FluxPipeline takes no 'heigth', did you mean 'height'"):
        load(DiffusionSpec(model=str(flux_copy), call={"heigth": 8}), flux_copy)


def own_code(folder: Path) -> Path:
    """Make the checkpoint's pipeline a class that comes with it."""
    (folder / "own_pipeline.py").write_text(OWN_PIPELINE)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": ["own_pipeline", "OwnPipeline"]}))
    return folder


def test_code_in_the_checkpoint_needs_trust(flux_copy: Path) -> None:
    with pytest.raises(StageSetupError, match="trust_remote_code"):
        load(DiffusionSpec(model=str(own_code(flux_copy))), flux_copy)


def test_trusted_code_in_the_checkpoint(
    flux_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("code")))
    spec = DiffusionSpec(model=str(own_code(flux_copy)), trust_remote_code=True, call={"brightness": 2.0})
    stage = DiffusionStage(StageContext("draw", spec, "."))
    stage.load(lambda _: None)
    assert list(stage.built.signature.parameters) == ["brightness"]
    stage.unload()
