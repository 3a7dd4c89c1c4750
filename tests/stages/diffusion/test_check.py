"""What `validate` says about a diffusion stage: ports, mistakes of the model and the call, and no heavy import."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni.registry import CheckpointRef, find_kind
from omni.spec import DiffusionSpec
from stages.diffusion.check import check, checkpoint, ports
from stages.diffusion.signature import ANY_OUTPUTS


def fake_checkpoint(folder: Path, pipeline: str = "FluxPipeline", weights: str = "model.safetensors") -> Path:
    """A folder that looks like a checkpoint: an index and one component with an empty weight file."""
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / weights).touch()
    index = {"_class_name": pipeline, "_diffusers_version": "0.42.1", "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None], "scale": [1, 2]}))
    return folder


def mistakes(spec: DiffusionSpec, base_dir: Path) -> list[tuple[str, str]]:
    return [(mistake.path, mistake.message) for mistake in check(spec, str(base_dir))]


def test_good_folder(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path / "flux")
    spec = DiffusionSpec(model="./flux", call={"num_inference_steps": 4, "guidance_scale": 3.5, "prompt": "a cat"})
    assert mistakes(spec, tmp_path) == []
    found = ports(spec, str(tmp_path))
    assert not found.open_inputs
    assert list(found.outputs) == ["images"]
    assert found.outputs["images"].type == "list[image]"
    assert not found.inputs["prompt"].required
    assert found.inputs["negative_prompt"].type == "text"


@pytest.mark.parametrize(
    ("changes", "required"),
    [
        ({}, True),
        ({"call": {"prompt": "a cat"}}, False),
        ({"inputs": {"prompt_embeds": "encode.embeds"}}, False),
        ({"inputs": {"prompt": "rewrite.text"}}, True),
    ],
)
def test_prompt_is_needed(changes: dict[str, Any], required: bool, tmp_path: Path) -> None:
    spec = DiffusionSpec(model=str(fake_checkpoint(tmp_path / "flux")), **changes)
    assert ports(spec, "").inputs["prompt"].required is required


def test_image_is_needed_where_the_class_says_so(tmp_path: Path) -> None:
    spec = DiffusionSpec(model=str(fake_checkpoint(tmp_path / "wan", "WanImageToVideoPipeline")))
    found = ports(spec, "")
    assert found.inputs["image"].required
    assert found.inputs["image"].many
    assert list(found.outputs) == ["video"]


def test_model_elsewhere_leaves_the_ports_open(tmp_path: Path) -> None:
    spec = DiffusionSpec(model="owner/name", call={"anything": 1})
    found = ports(spec, str(tmp_path))
    assert found.open_inputs
    assert found.outputs == ANY_OUTPUTS
    assert mistakes(spec, tmp_path) == []


def test_named_pipeline_closes_the_ports(tmp_path: Path) -> None:
    spec = DiffusionSpec(model="owner/name", pipeline="LTX2Pipeline", call={"num_frame": 9})
    assert list(ports(spec, str(tmp_path)).outputs) == ["video", "audio"]
    assert mistakes(spec, tmp_path)[0][1].startswith("LTX2Pipeline takes no 'num_frame', did you mean 'num_frames'?")


def test_model_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    entry = tmp_path / "models--owner--name"
    fake_checkpoint(entry / "snapshots" / "0123abcd", "QwenImagePipeline")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123abcd")
    for revision in (None, "main", "0123abcd"):
        spec = DiffusionSpec(model="owner/name", revision=revision)
        assert "true_cfg_scale" in ports(spec, "").inputs
    assert ports(DiffusionSpec(model="owner/name", revision="other"), "").open_inputs
    shutil.rmtree(entry / "snapshots" / "0123abcd" / "vae")
    cut_short = DiffusionSpec(model="owner/name")
    assert ports(cut_short, "").open_inputs
    assert mistakes(cut_short, tmp_path) == []


@pytest.mark.parametrize(
    ("call", "path", "message"),
    [
        ({"guidance_scal": 1}, "call.guidance_scal", "FluxPipeline takes no 'guidance_scal', did you mean 'guidance_"),
        ({"zzz": 1}, "call.zzz", "FluxPipeline takes no 'zzz' (it takes: guidance_scale, height, "),
        ({"generator": 1}, "call.generator", "cannot be set: Omni makes it from the request's seed"),
        ({"output_type": "np"}, "call.output_type", "cannot be set: Omni chooses the type that its output ports need"),
        ({"callback_on_step_end": 1}, "call.callback_on_step_end", "cannot be set: Omni reports progress and aborts"),
        ({"height": "512px"}, "call.height", "must be int, not '512px'"),
        ({"latents": [1]}, "call.latents", "a graph file cannot hold this tensor; send it with the request"),
    ],
)
def test_call_mistakes(call: dict[str, Any], path: str, message: str, tmp_path: Path) -> None:
    fake_checkpoint(tmp_path / "flux")
    found = mistakes(DiffusionSpec(model="flux", call=call), tmp_path)
    assert len(found) == 1
    assert found[0][0] == path
    assert found[0][1].startswith(message)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path / "flux", weights="model.bin")
    spec = DiffusionSpec(model="flux", variant="fp16", call={"return_dict": False, "heigth": 8})
    assert [path for path, _ in mistakes(spec, tmp_path)] == ["model", "variant", "call.return_dict", "call.heigth"]


def test_unknown_pipeline(tmp_path: Path) -> None:
    ((path, message),) = mistakes(DiffusionSpec(model="owner/name", pipeline="FluxPipline", call={"x": 1}), tmp_path)
    assert path == "pipeline"
    assert message.startswith("diffusers has no pipeline class 'FluxPipline', did you mean 'FluxPipeline'?; take a ")


def test_pipeline_that_comes_with_the_model(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path / "own", "OwnPipeline")
    ((path, message),) = mistakes(DiffusionSpec(model="own"), tmp_path)
    assert path == "model"
    assert "no pipeline class 'OwnPipeline' (named in its model_index.json)" in message
    assert "trust_remote_code: true" in message
    trusted = DiffusionSpec(model="own", trust_remote_code=True)
    assert mistakes(trusted, tmp_path) == []
    assert ports(trusted, str(tmp_path)).open_inputs


@pytest.mark.parametrize("model", ["./flx", "../x/flx", "/nowhere/flx", "a/b/flx", "~/no/such/flx"])
def test_missing_folder(model: str, tmp_path: Path) -> None:
    (tmp_path / "flux").mkdir()
    ((path, message),) = mistakes(DiffusionSpec(model=model), tmp_path)
    assert path == "model"
    assert "flx does not exist" in message
    assert ("did you mean 'flux'?" in message) == (model == "./flx")
    assert "hub id" in message


def test_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "flux.safetensors").touch()
    ((_, message),) = mistakes(DiffusionSpec(model="./flux.safetensors"), tmp_path)
    assert "is a file, name its folder" in message


def test_no_index(tmp_path: Path) -> None:
    ((_, message),) = mistakes(DiffusionSpec(model="."), tmp_path)
    assert message == f"{tmp_path} holds no model_index.json: it is not a diffusers pipeline folder"
    (tmp_path / "modular_model_index.json").touch()
    ((_, message),) = mistakes(DiffusionSpec(model="."), tmp_path)
    assert "modular pipeline" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_broken_index(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    ((_, message),) = mistakes(DiffusionSpec(model="."), tmp_path)
    assert message.endswith("names no pipeline class (_class_name)")
    assert ports(DiffusionSpec(model="."), str(tmp_path)).open_inputs


def test_pickled_weights(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path / "flux", weights="diffusion_pytorch_model.bin")
    ((path, message),) = mistakes(DiffusionSpec(model="flux"), tmp_path)
    assert path == "model"
    assert "has only pickled weights (diffusion_pytorch_model.bin)" in message
    assert "save_pretrained" in message


def test_missing_component(tmp_path: Path) -> None:
    folder = fake_checkpoint(tmp_path / "flux")
    (folder / "vae" / "model.safetensors").unlink()
    (folder / "vae").rmdir()
    ((_, message),) = mistakes(DiffusionSpec(model="flux"), tmp_path)
    assert "lacks the folder of its component 'vae'" in message


def test_variant(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path / "flux", weights="model.fp16.safetensors")
    assert mistakes(DiffusionSpec(model="flux", variant="fp16"), tmp_path) == []
    ((path, message),) = mistakes(DiffusionSpec(model="flux", variant="fp61"), tmp_path)
    assert path == "variant"
    assert message == "the checkpoint has no 'fp61', did you mean 'fp16'? (fp16)"


def test_kind_is_registered() -> None:
    kind = find_kind("diffusion")
    spec = DiffusionSpec(model="owner/name", revision="v1", variant="fp16")
    assert kind.checkpoint(spec) == checkpoint(spec) == CheckpointRef("owner/name", "v1", "fp16")
    assert kind.stage == "stages.diffusion.stage:DiffusionStage"


def test_nothing_heavy_is_imported(checkpoint: Callable[[str], Path]) -> None:
    program = """
import sys
from omni.registry import find_kind
from omni.spec import DiffusionSpec
kind, spec = find_kind("diffusion"), DiffusionSpec(model=sys.argv[1], call={"height": "x"})
assert kind.ports(spec, ".").inputs["true_cfg_scale"].type == "json"
assert len(kind.check(spec, ".")) == 1
heavy = {"torch", "diffusers", "transformers", "ray", "numpy", "huggingface_hub", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program, str(checkpoint("qwen"))], check=True, timeout=60)
