"""Sizes from safetensors headers: folders, shards, variants, the hub cache, and files that are broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from omni.checkpoint import CheckpointFacts, find_checkpoint, gather_facts, read_facts
from omni.errors import UsageError
from omni.graph import resolve
from omni.model_paths import cached_snapshot
from omni.registry import CheckpointRef
from omni.spec import GraphSpec
from omni.testing import DoubleSpec, doubles

SIZES = {"F32": 4, "BF16": 2, "I64": 8}


def header(tensors: dict[str, tuple[str, int]]) -> tuple[bytes, int]:
    """The head of a safetensors file with these tensors (dtype, count), and the bytes of its data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, count) in tensors.items():
        end = offset + count * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": [count], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, offset


def write(file: Path, **tensors: tuple[str, int]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    head, size = header(tensors)
    file.write_bytes(head + bytes(size))
    return file


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def read(folder: Path, variant: str | None = None) -> CheckpointFacts:
    return read_facts(CheckpointRef(folder.name, variant=variant), str(folder.parent))


def make_pipeline(folder: Path) -> Path:
    """A diffusers folder: a sharded transformer, a VAE in two dtypes, a tokenizer and an optional part left out."""
    index = {
        "_class_name": "SomePipeline",
        "_diffusers_version": "0.42.1",
        "force_zeros": True,
        "scale": [1, 2],
        "transformer": ["diffusers", "SomeTransformer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "SomeTokenizer"],
        "image_encoder": [None, None],
    }
    write_json(folder / "model_index.json", index)
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    write(folder / "transformer" / shards[0], a=("BF16", 100))
    write(folder / "transformer" / shards[1], b=("BF16", 50))
    weight_map = {"a": shards[0], "b": shards[1]}
    index_file = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    write_json(index_file, {"metadata": {}, "weight_map": weight_map})
    write(folder / "vae" / "diffusion_pytorch_model.safetensors", w=("F32", 10), n=("I64", 1))
    write_json(folder / "tokenizer" / "tokenizer.json", {})
    return folder


def test_diffusers_folder(tmp_path: Path) -> None:
    facts = read(make_pipeline(tmp_path / "pipe"))
    assert facts.components == {"transformer": 300, "vae": 48}
    assert facts.dtypes == {"BF16": 300, "F32": 40, "I64": 8}
    assert facts.total_bytes == 348
    assert facts.known


@pytest.mark.parametrize(
    ("dtype", "device", "size"),
    [
        ("bfloat16", "cpu", 300 + 20 + 8),
        ("float32", "cuda", 600 + 40 + 8),
        ("auto", "cpu", 600 + 40 + 8),
        ("auto", "cuda:1", 300 + 20 + 8),
        (None, "cpu", 348),
    ],
)
def test_bytes_once_loaded(dtype: str | None, device: str, size: int) -> None:
    facts = CheckpointFacts({"transformer": 300, "vae": 48}, {"BF16": 300, "F32": 40, "I64": 8})
    assert facts.loaded_bytes(dtype, device) == size


def test_transformers_folder(tmp_path: Path) -> None:
    write(tmp_path / "llm" / "model.safetensors", w=("BF16", 7))
    facts = read(tmp_path / "llm")
    assert (facts.components, facts.dtypes, facts.known) == ({"model": 14}, {"BF16": 14}, True)


def test_file_of_the_safetensors_library(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    arrays = {"w": np.zeros((3, 5), np.float32), "h": np.zeros(7, np.float16), "empty": np.zeros((0, 4), np.float32)}
    save_file(arrays, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    assert read(tmp_path / "llm").dtypes == {"F32": 60, "F16": 14}


def test_any_other_name_counts(tmp_path: Path) -> None:
    write(tmp_path / "llm" / "consolidated.safetensors", w=("BF16", 7))
    assert read(tmp_path / "llm").total_bytes == 14


def test_variant_where_there_is_one(tmp_path: Path) -> None:
    pipe = make_pipeline(tmp_path / "pipe")
    write(pipe / "vae" / "diffusion_pytorch_model.fp16.safetensors", w=("BF16", 10))
    assert read(pipe, "fp16").components == {"transformer": 300, "vae": 20}
    assert read(pipe).components == {"transformer": 300, "vae": 48}


def test_sharded_variant(tmp_path: Path) -> None:
    write(tmp_path / "llm" / "model.safetensors", w=("F32", 9))
    write(tmp_path / "llm" / "model.fp16-00001-of-00001.safetensors", w=("BF16", 9))
    index = {"weight_map": {"w": "model.fp16-00001-of-00001.safetensors"}}
    write_json(tmp_path / "llm" / "model.safetensors.index.fp16.json", index)
    assert read(tmp_path / "llm", "fp16").total_bytes == 18


# The hub cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; returns the folder of owner/name in it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--owner--name"


def test_cached_checkpoint(cache: Path, tmp_path: Path) -> None:
    write(cache / "snapshots" / "abc" / "model.safetensors", w=("BF16", 4))
    write(cache / "snapshots" / "def" / "model.safetensors", w=("BF16", 5))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert read_facts(CheckpointRef("owner/name"), str(tmp_path)).total_bytes == 8
    assert read_facts(CheckpointRef("owner/name", revision="def"), str(tmp_path)).total_bytes == 10
    assert cached_snapshot("owner/name") == cache / "snapshots" / "abc"
    assert not read_facts(CheckpointRef("owner/name", revision="v2"), str(tmp_path)).known
    assert not read_facts(CheckpointRef("owner/other"), str(tmp_path)).known


@pytest.mark.parametrize(
    "lacking",
    [
        "model_index.json",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "vae",
        "tokenizer",
    ],
)
def test_half_a_download_is_not_there_yet(lacking: str, cache: Path, tmp_path: Path) -> None:
    pipe, ref = make_pipeline(cache / "snapshots" / "main"), CheckpointRef("owner/name")
    for config in ("vae/config.json", "tokenizer/config.json"):
        write_json(pipe / config, {})
    assert find_checkpoint(ref, str(tmp_path)) == pipe
    part = pipe / lacking
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink()
    assert find_checkpoint(ref, str(tmp_path)) is None
    assert not read_facts(ref, str(tmp_path)).known


def test_a_download_that_is_of_no_use_is_there(cache: Path, tmp_path: Path) -> None:
    snapshot = cache / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.bin").touch()
    assert find_checkpoint(CheckpointRef("owner/name"), str(tmp_path)) == snapshot


@pytest.mark.parametrize("variable", ["HF_HOME", "XDG_CACHE_HOME"])
def test_cache_moves_with_its_variables(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    home = tmp_path if variable == "HF_HOME" else tmp_path / "huggingface"
    snapshot = home / "hub" / "models--gpt2" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    assert cached_snapshot("gpt2") == snapshot


# What is broken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not a safetensors file, or cut short (0 B)"),
        (b"\x08\x00\x00", "not a safetensors file, or cut short (3 B)"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "not a safetensors file, or cut short (10 B)"),
        ((9).to_bytes(8, "little") + b"not json!", "its safetensors header is broken"),
        ((2).to_bytes(8, "little") + b"[]", "its safetensors header is broken"),
        ((4).to_bytes(8, "little") + b'"\xff\xfe"', "its safetensors header is broken"),
        ((12).to_bytes(8, "little") + b'{"w": "F32"}', "its safetensors header is broken"),
        (header({"w": ("F32", 10)})[0] + bytes(39), "cut short, its header promises 40 B of data"),
    ],
)
def test_broken_file(tmp_path: Path, content: bytes, fault: str) -> None:
    file = tmp_path / "llm" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(file.parent)
    assert str(caught.value).startswith(f"{file}: {fault}")
    assert str(caught.value).endswith("fetch it again")


def test_header_of_more_than_the_bound_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "llm" / "model.safetensors"
    file.parent.mkdir()
    with file.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    with pytest.raises(UsageError, match="not a safetensors file"):
        read(file.parent)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin: pickled weights can run code .* convert them to safe"):
        read(tmp_path / "llm")


def test_missing_shard(tmp_path: Path) -> None:
    pipe = make_pipeline(tmp_path / "pipe")
    (pipe / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"00002-of-00002.* names this file, but it is not there: the check"):
        read(pipe)


def test_missing_component(tmp_path: Path) -> None:
    pipe = make_pipeline(tmp_path / "pipe")
    (pipe / "tokenizer" / "tokenizer.json").unlink()
    (pipe / "tokenizer").rmdir()
    with pytest.raises(UsageError, match=r"tokenizer: model_index\.json names this folder, but it is not there"):
        read(pipe)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    with pytest.raises(UsageError, match="holds no safetensors weights"):
        read(tmp_path / "llm")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / "other.safetensors", w=("F32", 1))
    write_json(tmp_path / "llm" / "model.safetensors.index.json", {"weight_map": {"w": name}})
    with pytest.raises(UsageError, match="names a file outside its folder"):
        read(tmp_path / "llm")


@pytest.mark.parametrize("file", ["model_index.json", "model.safetensors.index.json"])
def test_broken_index(tmp_path: Path, file: str) -> None:
    write_json(tmp_path / "llm" / file, [1])
    with pytest.raises(UsageError, match=f"{file}: not the JSON that belongs there"):
        read(tmp_path / "llm")


@pytest.mark.parametrize("model", ["./gone", "../gone", "a/b/c", "~/gone", ""])
def test_no_such_folder(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "base"
    if model:
        with pytest.raises(UsageError, match=r"no such folder in .*, and no hub id either"):
            read_facts(CheckpointRef(model), str(folder))
    else:  # the folder of the graph itself, which has no weights
        folder.mkdir()
        with pytest.raises(UsageError, match="holds no safetensors weights"):
            read_facts(CheckpointRef(model), str(folder))


@given(st.binary(max_size=200))
def test_any_bytes_give_facts_or_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("random")
    length = min(len(content), 100)
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content)
    try:
        facts = read(folder)
    except UsageError as error:
        message = str(error)
    else:
        message = str(folder)
        assert facts.total_bytes <= len(content)
    assert message.startswith(str(folder))


# A whole graph --------------------------------------------------------------------------------------------------


def test_gather_facts_asks_stages_with_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "double" / "model.safetensors", w=("F32", 3))
    with doubles():
        graph = resolve(GraphSpec(stages={"a": DoubleSpec(), "b": DoubleSpec(model=False)}), str(tmp_path))
        assert {name: facts.components for name, facts in gather_facts(graph).items()} == {"a": {"model": 12}}
        (tmp_path / "double" / "model.safetensors").write_bytes(b"")
        with pytest.raises(UsageError, match=r"stage 'a': .*model\.safetensors: not a safetensors file"):
            gather_facts(graph)
