"""Loaded components equal what their libraries load, wherever the weights go and however they are read."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from omni.errors import UsageError
from omni.spec import LoadSpec
from stages.memory import limits
from stages.memory.host import HostMemory
from stages.policies.load import ComponentRequest, components, load_components
from tests.stages.diffusion import tiny
from tests.stages.policies.load import models

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

WAYS = [
    ("device", "auto"),
    ("device", "buffered"),
    ("host", "auto"),
    ("host", "direct"),
    ("host", "mmap"),
]
SMALL = LoadSpec(chunk="64KiB", threads=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def flux(root: Path, tmp_path: Path) -> Path:
    """A copy of FLUX's tiny transformer, to be damaged."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    for file in (tiny.save("flux", root) / "transformer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def requests_of(pipeline: Path, **changes: Any) -> list[ComponentRequest]:
    """A request for each component of a saved pipeline that has weights."""
    found = []
    for name, value in json.loads((pipeline / "model_index.json").read_text()).items():
        if isinstance(value, list) and any((pipeline / name).glob("*.safetensors")):
            library, class_name = value
            stock = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
            model_class = getattr(importlib.import_module(stock), class_name)
            library = "transformers" if library == "transformers" else "diffusers"
            request = {"name": name, "model_class": model_class, "folder": pipeline / name, "library": library}
            found.append(ComponentRequest(**{"dtype": torch.float32, **request, **changes}))
    return found


def request_of(folder: Path, **changes: Any) -> ComponentRequest:
    import diffusers

    request = {"name": "part", "model_class": diffusers.FluxTransformer2DModel, "folder": folder}
    return ComponentRequest(**{**request, "library": "diffusers", "dtype": torch.float32, **changes})


def load(*requests: ComponentRequest, spec: LoadSpec = SMALL) -> Any:
    """The module of the first request."""
    return load_components(requests, spec, lambda *_: None)[requests[0].name]


# The same as the libraries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_components_of_pipelines(family: str, dtype: torch.dtype, root: Path) -> None:
    pipeline = tiny.save(family, root)
    stock = {r.name: r.model_class.from_pretrained(str(r.folder), dtype=dtype) for r in requests_of(pipeline)}
    for module in stock.values():
        module.requires_grad_(False)
    for target, reader in WAYS:
        told: dict[str, tuple[int, int]] = {}
        loaded = load_components(
            requests_of(pipeline, dtype=dtype, target=target),
            LoadSpec(reader=reader, chunk="64KiB"),
            lambda name, done, total, told=told: told.update({name: (done, total)}),
        )
        assert list(loaded) == list(stock)
        for name, module in loaded.items():
            models.assert_same(module, stock[name])
            assert dict(module.config) == dict(stock[name].config) if hasattr(module.config, "keys") else True
        assert all(done == total > 0 for done, total in told.values())
        assert told.keys() == stock.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", models.MODELS)
def test_transformers_models(name: str, dtype: torch.dtype, root: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = models.save(name, root)
    own_class = type(models.MODELS[name]())
    for model_class in [own_class] + ([AutoModelForCausalLM] if "CausalLM" in own_class.__name__ else []):
        stock = model_class.from_pretrained(str(folder), dtype=dtype).requires_grad_(False)
        for target, reader in WAYS:
            request = request_of(folder, model_class=model_class, library="transformers", dtype=dtype, target=target)
            loaded = load(request, spec=LoadSpec(reader=reader, chunk="64KiB"))
            models.assert_same(loaded, stock)
            assert loaded.config.to_dict() == stock.config.to_dict()
            assert loaded.config.name_or_path == stock.config.name_or_path == str(folder)
            if stock.can_generate():
                assert loaded.generation_config.to_dict() == stock.generation_config.to_dict()
            assert list(map(str, loaded._weight_conversions)) == list(map(str, stock._weight_conversions))


def test_a_stage_can_save_what_it_loaded(root: Path, tmp_path: Path) -> None:
    """Merged experts come apart again."""
    folder = models.save("experts_merged", root)
    model_class = type(models.MODELS["experts_merged"]())
    load(request_of(folder, model_class=model_class, library="transformers")).save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_and_variants(flux: Path, tmp_path: Path) -> None:
    import diffusers

    stock = diffusers.FluxTransformer2DModel.from_pretrained(str(flux))
    stock.half().save_pretrained(tmp_path / "shards", max_shard_size="20KB", variant="fp16")
    assert len(list((tmp_path / "shards").glob("*.fp16*.safetensors"))) > 1
    loaded = load(request_of(tmp_path / "shards", variant="fp16", dtype=torch.float16))
    models.assert_same(loaded, stock.requires_grad_(False))


def test_modules_that_stay_in_float32(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "_keep_in_fp32_modules", ["x_embedder"])
    loaded = load(request_of(flux, dtype=torch.bfloat16))
    assert {loaded.x_embedder.weight.dtype, loaded.proj_out.weight.dtype} == {torch.float32, torch.bfloat16}
    stock = diffusers.FluxTransformer2DModel.from_pretrained(str(flux), torch_dtype=torch.bfloat16)
    models.assert_same(loaded, stock.requires_grad_(False))


def test_tensors_that_are_not_aligned_in_their_file(flux: Path) -> None:
    (file,) = flux.glob("*.safetensors")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    expected = {name: tensor.clone() for name, tensor in load(request_of(flux)).state_dict().items()}
    file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    for target, reader in WAYS:
        for dtype in (torch.float32, torch.bfloat16):
            loaded = load(request_of(flux, target=target, dtype=dtype), spec=LoadSpec(reader=reader))
            assert all(torch.equal(loaded.state_dict()[name], tensor.to(dtype)) for name, tensor in expected.items())


# Where the weights are ---------------------------------------------------------------------------------------------


def test_what_is_written_in_place_does_not_reach_the_file(flux: Path) -> None:
    (file,) = flux.glob("*.safetensors")
    before = file.read_bytes()
    loaded = load(request_of(flux))
    with torch.no_grad():
        loaded.x_embedder.weight.fill_(3)
    assert file.read_bytes() == before
    assert not torch.equal(load(request_of(flux)).x_embedder.weight, loaded.x_embedder.weight)


def test_the_host_master_is_one_region_in_the_order_of_the_module(flux: Path) -> None:
    state = load(request_of(flux, target="host")).state_dict()
    places = [tensor.data_ptr() for tensor in state.values()]
    assert places == sorted(places)
    assert all(place % 256 == 0 for place in places)
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == 1
    weights = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert next(iter(state.values())).untyped_storage().nbytes() <= weights + 256 * len(state)


def test_nothing_is_read_twice_into_memory(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place: no region is made, and every parameter lies in a mapped file."""

    def refuse(*_: object) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr("stages.policies.load.places.HostMemory", refuse)
    loaded = load(request_of(flux))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(flux) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for parameter in loaded.parameters():
        assert any(begin <= parameter.data_ptr() < end for begin, end in ranges)


@pytest.mark.parametrize(
    ("target", "available", "populated"), [("device", 1 << 40, True), ("device", 1000, False), ("host", 1 << 40, False)]
)
def test_mapped_files_are_read_where_that_helps(
    target: str, available: int, populated: bool, flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(components, "available_bytes", lambda: available)
    monkeypatch.setattr("stages.policies.load.files.Files.populate", lambda self, chunk: seen.append(chunk.num_bytes))
    told: list[tuple[str, int, int]] = []
    request = request_of(flux, target=target)
    load_components([request], LoadSpec(reader="mmap"), lambda *report: told.append(report))
    assert bool(seen) == populated
    assert told[-1][1] == told[-1][2] > 0


def test_merged_experts_lie_in_the_region_too(root: Path) -> None:
    folder = models.save("experts_merged", root)
    request = request_of(
        folder, model_class=type(models.MODELS["experts_merged"]()), library="transformers", target="host"
    )
    parameters = list(load(request).parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1


# What does not fit -------------------------------------------------------------------------------------------------


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["x_embeder.weight"] = tensors.pop("x_embedder.weight")


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.bias"] = torch.zeros(3)


def _drop_many(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("transformer_blocks")]:
        del tensors[name]


FAULTS = [
    (
        _rename,
        "lacks 'x_embedder.weight', did you mean 'x_embeder.weight'?; it holds 'x_embeder.weight', which "
        "FluxTransformer2DModel does not have: ",
    ),
    (_widen, "has shape [3] for 'proj_out.bias' in diffusion_pytorch_model.safetensors, where [16] belongs: "),
    (_drop_many, "lacks 'transformer_blocks.0.attn.add_k_proj.bias', 'transformer_blocks.0.attn.add_k_proj.weight', "),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_keys_and_shapes(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_weights(flux, change)
    monkeypatch.setattr(components, "Load", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(UsageError) as caught:
        load(request_of(flux))
    assert str(caught.value).startswith(f"{flux}: does not fit FluxTransformer2DModel: it {message}")
    assert "load: {enabled: false}" in str(caught.value)


def _drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]


def _drop_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.9.mlp.gate.weight"] = torch.zeros(1)


def _flatten(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_norm, "lacks 'model.norm.weight'"),
        (_add, "holds 'model.layers.9.mlp.gate.weight', which Qwen3MoeForCausalLM does not have"),
        (_flatten, "has shape [5, 32] for 'lm_head.weight' in model.safetensors, where [64, 32] belongs"),
        (_drop_expert, "cannot make 'model.layers.1.mlp.experts.gate_up_proj'"),
    ],
)
def test_keys_and_shapes_of_transformers(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, root: Path, tmp_path: Path
) -> None:
    folder = models.save("experts_merged", root)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    change_weights(tmp_path, change)
    request = request_of(tmp_path, model_class=type(models.MODELS["experts_merged"]()), library="transformers")
    with pytest.raises(UsageError) as caught:
        load(request)
    assert str(caught.value).startswith(str(tmp_path))
    assert message in str(caught.value)


def test_a_failure_frees_the_memory(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regions: list[weakref.ref[torch.Tensor]] = []

    def allocate(num_bytes: int, **options: Any) -> HostMemory:
        memory = HostMemory(num_bytes, **options)
        regions.append(weakref.ref(memory))
        return memory

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("stages.policies.load.places.HostMemory", allocate)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UsageError, match=r"tensor '.*' cannot be read: Input/output error"):
        load(request_of(flux, target="host"), spec=LoadSpec(reader="buffered"))
    gc.collect()
    assert [region() for region in regions] == [None]


# Left to the library -----------------------------------------------------------------------------------------------


def test_enabled_false_loads_as_the_library_does(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "plan", lambda _: pytest.fail("planned"))
    told: list[tuple[str, int, int]] = []
    spec = LoadSpec(enabled=False)
    loaded = load_components([request_of(flux)], spec, lambda *report: told.append(report))["part"]
    models.assert_same(loaded, request_of(flux).model_class.from_pretrained(str(flux)).requires_grad_(False))
    size = sum(file.stat().st_size for file in flux.glob("*.safetensors"))
    assert told == [("part", 0, size), ("part", size, size)]


def test_classes_with_a_way_of_their_own(flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    import diffusers

    class Own(diffusers.FluxTransformer2DModel):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return diffusers.FluxTransformer2DModel.from_pretrained(*args, **kwargs)

    with caplog.at_level(logging.WARNING):
        loaded = load(request_of(flux, model_class=Own))
    assert "component 'part' is loaded by diffusers itself: Own has a way of loading of its own" in caplog.text
    assert type(loaded) is diffusers.FluxTransformer2DModel


def test_two_libraries_at_once(flux: Path, root: Path) -> None:
    text = request_of(
        models.save("t5_encoder", root),
        name="text",
        model_class=type(models.MODELS["t5_encoder"]()),
        library="transformers",
    )
    told: list[tuple[str, int, int]] = []
    loaded = load_components([request_of(flux), text], SMALL, lambda *report: told.append(report))
    assert list(loaded) == ["part", "text"]
    last = {name: (done, total) for name, done, total in told}
    assert all(done == total > 0 for done, total in last.values())


def test_components_that_fit_one_by_one_but_not_together_are_refused(
    flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [msgspec.structs.replace(request_of(flux, target="host"), name=name) for name in ("one", "two")]
    size = sum(p.nbytes for p in load_components(requests[:1], LoadSpec(), lambda *_: None)["one"].parameters())
    room = limits.Room(int(1.5 * size), "a test")
    monkeypatch.setattr(components, "CHECK_BYTES", 1)
    monkeypatch.setattr(limits, "host_room", lambda: room)
    load_components(requests[:1], LoadSpec(), lambda *_: None)
    with pytest.raises(UsageError, match=r"needs .* of host memory, and .* are available \(a test\)"):
        load_components(requests, LoadSpec(), lambda *_: None)
