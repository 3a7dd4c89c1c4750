"""Weights on their way to a CUDA GPU. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni.spec import LoadSpec
from stages.policies.load import load_components
from tests.stages.diffusion import tiny
from tests.stages.policies.load import models
from tests.stages.policies.load.test_components import load, request_of, requests_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reader", ["buffered", "direct"])
@pytest.mark.parametrize("family", ["flux", "wan", "z_image"])
def test_weights_arrive(family: str, reader: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pipeline = tiny.save(family, tmp_path)
    requests = requests_of(pipeline, dtype=dtype, device="cuda:0")
    spec = LoadSpec(reader=reader, chunk="64KiB", threads=8)
    for name, module in load_components(requests, spec, lambda *_: None).items():
        stock = next(r for r in requests if r.name == name).model_class.from_pretrained(pipeline / name, dtype=dtype)
        assert {tensor.device for tensor in module.state_dict().values()} == {torch.device("cuda:0")}
        assert all(parameter.data_ptr() % 256 == 0 for parameter in module.parameters())
        models.assert_same(module.cpu(), stock)


@pytest.mark.parametrize("name", ["qwen2_tied", "experts_merged", "vision_language"])
def test_transformers_models_arrive(name: str, tmp_path: Path) -> None:
    folder, model_class = models.save(name, tmp_path), type(models.MODELS[name]())
    stock = model_class.from_pretrained(str(folder), dtype=torch.bfloat16)
    request = request_of(folder, model_class=model_class, library="transformers", dtype=torch.bfloat16, device="cuda:0")
    module = load(request)
    assert {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]} == {"cuda"}
    models.assert_same(module.cpu(), stock)


def test_the_host_master_is_pinned(tmp_path: Path) -> None:
    requests = requests_of(tiny.save("flux", tmp_path), target="host", device="cuda:0")
    for module in load_components(requests, LoadSpec(), lambda *_: None).values():
        assert all(parameter.is_pinned() for parameter in module.parameters())
