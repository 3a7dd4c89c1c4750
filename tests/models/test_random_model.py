"""Random models of every stock configuration: they load with the stock classes, and vary where they must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from omni.cli.models import CONFIGS
from omni.cli.models import SCALES as CLI_SCALES
from omni.errors import OmniError, UsageError
from omni.models import random_model
from omni.models.random_model import RandomModel, build_empty, write_model
from omni.models.random_values import PIECE_VALUES, RandomValues
from omni.models.stock import SCALES, STOCK, part_config

FULL_BILLIONS = {"qwen-image": 20.43, "flux": 11.90, "sd3.5": 8.06, "z-image": 6.15, "wan2.2": 14.29, "ltx-2": 18.88}
"""Parameters of the released denoisers."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny pipeline of a configuration, in several files for each component; made once."""
    root = tmp_path_factory.mktemp("models")

    def write(config: str) -> Path:
        folder = root / config
        if not folder.exists():
            write_model(RandomModel(config=config, component="all", scale="tiny", shard_bytes=200_000, seed=3), folder)
        return folder

    return write


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file below `folder`, by component and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("config", STOCK)
def test_a_pipeline_loads_as_any_other(config: str, written: Callable[[str], Path]) -> None:
    folder = written(config)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(pipeline).__name__ == STOCK[config].pipeline
    tensors = all_tensors(folder)
    for name, part in STOCK[config].parts.items():
        module: Any = getattr(pipeline, name)
        assert type(module).__name__ == part.class_name.rpartition(".")[2]
        place = {"output_loading_info": True, "dtype": torch.bfloat16}
        info = type(module).from_pretrained(folder / name, **place)[1]
        assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        for key, value in module.state_dict().items():
            if (saved := tensors.get(f"{name}/{key}")) is not None:
                assert torch.equal(value, saved), key
                assert value.dtype == saved.dtype, key


@pytest.mark.parametrize("config", STOCK)
def test_a_pipeline_takes_a_prompt(config: str, written: Callable[[str], Path]) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(written(config), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 128, "width": 128, "num_frames": 9} if config == "ltx-2" else {"height": 32, "width": 32}
    frames = {"num_frames": 5} if config == "wan2.2" else {}
    output = pipeline("a red circle", num_inference_steps=1, output_type="pt", **size, **frames)
    assert torch.isfinite(next(iter(output.values()))).all()


@pytest.mark.parametrize("config", STOCK)
def test_no_tensor_is_constant(config: str, written: Callable[[str], Path]) -> None:
    for name, tensor in all_tensors(written(config)).items():
        if tensor.is_floating_point() and tensor.numel() > 1:
            assert tensor.float().std() > 0, name
            assert tensor.isfinite().all(), name


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    model = RandomModel(config="qwen-image", scale="tiny", layers=1, seed=1)
    write_model(model, tmp_path / "a")
    write_model(RandomModel(config="qwen-image", scale="tiny", layers=1, seed=1, shard_bytes=100_000), tmp_path / "b")
    write_model(RandomModel(config="qwen-image", scale="tiny", layers=1, seed=2), tmp_path / "c")
    first, same, other = (
        {name.partition("/")[2]: tensor for name, tensor in all_tensors(tmp_path / folder).items()} for folder in "abc"
    )
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert list(first) == sorted(same) == sorted(other)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("config", STOCK)
def test_full_size_is_that_of_the_released_model(config: str) -> None:
    module = build_empty(STOCK[config].parts["transformer"], "full")
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(FULL_BILLIONS[config], abs=0.006)


def test_layers_keep_the_proportion_of_stacks() -> None:
    config = part_config(STOCK["flux"].parts["transformer"], "full", layers=3)
    assert (config["num_layers"], config["num_single_layers"]) == (3, 6)


def test_dtype_is_that_of_every_number(tmp_path: Path) -> None:
    write_model(RandomModel(config="wan2.2", scale="tiny", dtype="float16"), tmp_path)
    dtypes = {name: tensor.dtype for name, tensor in all_tensors(tmp_path).items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {
        name for name in dtypes if "time_embedder" in name or "scale_shift_table" in name or "norm2" in name
    }
    assert set(dtypes.values()) == {torch.float16, torch.float32}


def test_long_tensors_do_not_repeat() -> None:
    values = torch.empty(3 * PIECE_VALUES)
    RandomValues(0, torch.float32).fill(values, "a", spread=0.5, centre=1.0)
    first, second, third = values.view(3, -1)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert values.mean().item() == pytest.approx(1.0, abs=0.01)
    assert values.std().item() == pytest.approx(0.5, abs=0.01)


def test_a_folder_with_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = RandomModel(config="z-image", scale="tiny", shard_bytes=100_000)
    with pytest.raises(UsageError, match=r"not empty; name another folder, or write over it with --force"):
        write_model(model, tmp_path)
    write_model(model, tmp_path, force=True)
    write_model(RandomModel(config="z-image", scale="tiny"), tmp_path, force=True)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_disk_without_space_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model.shutil, "disk_usage", lambda place: random_model.shutil._ntuple_diskusage(2, 1, 1))
    with pytest.raises(UsageError, match=r"the model takes 38\.1 GiB, and 1 B are free there; take fewer --layers"):
        write_model(RandomModel(config="qwen-image"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        write_model(RandomModel(config="z-image", scale="tiny"), tmp_path / "file")
    with pytest.raises(OmniError, match="cannot be written"):
        write_model(RandomModel(config="z-image", scale="tiny"), tmp_path, force=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (RandomModel(config="dall-e"), "config 'dall-e': there is none of that name, take one of qwen-image, flux"),
        (RandomModel(config="flux", component="unet"), "component 'unet': flux has text_encoder, text_encoder_2, "),
    ],
)
def test_unknown_names_are_told(tmp_path: Path, model: RandomModel, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_model(model, tmp_path / "new")


def test_the_command_line_knows_all_names() -> None:
    assert tuple(STOCK) == CONFIGS
    assert SCALES == CLI_SCALES
