"""Threads that work for a stage have its GPU as their current one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from omni.errors import StageError
from omni.spec import DiffusionSpec
from omni.stage import StageCall, StageContext, Work
from stages.device import use_device
from stages.diffusion import stage as diffusion


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that were made current."""
    devices: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    return devices


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda", []), ("cuda:1", ["cuda:1"])])
def test_device_of_a_thread(device: str, expected: list[str], chosen: list[str]) -> None:
    use_device(device)
    assert chosen == expected


def test_diffusion_loads_and_computes_on_its_device(chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise diffusion.ArgumentFault(f"after {len(chosen)}")

    built = {"signature": SimpleNamespace(outputs={})}
    for name in ("signature", "device", "dtype", "pipeline", "correction", "meeting", "denoiser", "offload"):
        monkeypatch.setattr(refuse, name, built.get(name), raising=False)
    monkeypatch.setattr(diffusion, "build_pipeline", lambda *args: refuse)
    stage = diffusion.DiffusionStage(StageContext("draw", DiffusionSpec(model="m"), "", device="cuda:1"))
    stage.load(lambda progress: None)
    assert chosen == ["cuda:1"]
    monkeypatch.setattr(diffusion, "build_arguments", refuse)
    with pytest.raises(StageError, match="after 2"):
        stage.compute(StageCall("r", {}, 0), Work("r", lambda item: None))
