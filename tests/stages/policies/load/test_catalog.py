"""The catalog of a folder: what it finds, and what it says about damaged checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from omni.errors import UsageError
from stages.policies.load.catalog import Entry, UnknownDtype, read_catalog
from tests.stages.policies.load.safetensors_files import entry, write_raw

FILE = "diffusion_pytorch_model.safetensors"


def test_a_single_file(tmp_path: Path) -> None:
    tensors = {"a": entry("BF16", [2, 3], 4, 16), "b": entry("F32", [], 0, 4), "none": entry("F32", [0, 5], 16, 16)}
    file = str(write_raw(tmp_path / FILE, tensors, bytes(16)))
    start = os.path.getsize(file) - 16
    catalog = read_catalog(tmp_path)
    assert catalog["a"] == Entry("a", file, start + 4, 12, "BF16", (2, 3))
    assert catalog["b"] == Entry("b", file, start, 4, "F32", ())
    assert (catalog["none"].num_bytes, catalog["a"].item_bytes) == (0, 2)
    assert len(catalog) == 3


@pytest.mark.parametrize(
    "names",
    [
        ("diffusion_pytorch_model-1.safetensors", "diffusion_pytorch_model-2.safetensors", f"{FILE}.index.json"),
        ("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"),
        ("consolidated.safetensors", "more.safetensors", None),
    ],
)
def test_several_files(names: tuple[str, str, str | None], tmp_path: Path) -> None:
    for name, tensor in zip(names[:2], "ab", strict=True):
        write_raw(tmp_path / name, {tensor: entry("U8", [1], 0, 1)}, b"x")
    if names[2]:
        (tmp_path / names[2]).write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert {key: Path(found.file).name for key, found in read_catalog(tmp_path).items()} == {
        "a": names[0],
        "b": names[1],
    }


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (f"{FILE}.index.fp16.json", "diffusion_pytorch_model.fp16-1.safetensors"),
        (f"{FILE}.fp16.index.json", "diffusion_pytorch_model.fp16-1.safetensors"),
        (None, "diffusion_pytorch_model.fp16.safetensors"),
    ],
)
def test_variants(index: str | None, shard: str, tmp_path: Path) -> None:
    write_raw(tmp_path / FILE, {"plain": entry("F32", [1], 0, 4)}, bytes(4))
    write_raw(tmp_path / shard, {"half": entry("F16", [1], 0, 2)}, bytes(2))
    if index:
        (tmp_path / index).write_text(json.dumps({"weight_map": {"half": shard}}))
    assert set(read_catalog(tmp_path, "fp16")) == {"half"}
    assert set(read_catalog(tmp_path)) == {"plain"}
    assert set(read_catalog(tmp_path, "other")) == {"plain"}


@pytest.mark.parametrize(
    ("tensors", "data", "message"),
    [
        (
            {"w": entry("F32", [4], 0, 16)},
            bytes(15),
            "cut short, its header promises 16 B of data for tensor 'w', and 15 B",
        ),
        (
            {"w": entry("F32", [4], 0, 12)},
            bytes(16),
            "tensor 'w' of F32 and shape [4] takes 16 B, its header gives it 12 B",
        ),
        ({"w": entry("F32", [-4], 0, 16)}, bytes(16), "tensor 'w' of F32 and shape [-4] takes"),
        (
            {"v": entry("U8", [8], 0, 8), "w": entry("U8", [8], 4, 12)},
            bytes(12),
            "tensors 'v' and 'w' overlap: fetch the file again",
        ),
        ({"w": {"dtype": "F32", "shape": [1]}}, bytes(4), "its safetensors header is broken (Object missing required"),
    ],
)
def test_damaged_files(tensors: dict[str, Any], data: bytes, message: str, tmp_path: Path) -> None:
    file = write_raw(tmp_path / FILE, tensors, data)
    with pytest.raises(UsageError) as caught:
        read_catalog(tmp_path)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_header_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes((4).to_bytes(8, "little") + b"{\xff\xff}")
    with pytest.raises(UsageError, match="header is broken"):
        read_catalog(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pickled weights can run code and are not loaded: convert them to safetensors"),
        ("model.ckpt", "pickled weights can run code and are not loaded: convert them to safetensors"),
    ],
)
def test_pickled_weights(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UsageError) as caught:
        read_catalog(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {message}")
    assert "save_pretrained" in str(caught.value)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no safetensors weights"):
        read_catalog(tmp_path)


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))
    with pytest.raises(UsageError, match=r"gone\.safetensors: .* names this file, but it is not there"):
        read_catalog(tmp_path)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_raw(tmp_path / FILE, {"w": entry("U8", [1], 0, 1)}, b"x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, whatever a file's mode says
    with pytest.raises(UsageError) as caught:
        read_catalog(tmp_path)
    assert str(caught.value) == f"{file}: cannot be read: Permission denied"


def test_a_dtype_that_is_not_known(tmp_path: Path) -> None:
    write_raw(tmp_path / FILE, {"w": entry("F4", [2], 0, 1)}, b"x")
    with pytest.raises(UnknownDtype, match="tensor 'w' has dtype F4"):
        read_catalog(tmp_path)
