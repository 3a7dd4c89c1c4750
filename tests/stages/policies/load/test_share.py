"""One host copy of a component for all who load the same: two real processes, two loads in one, loads that fail."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from omni.spec import LoadSpec
from stages.memory import shared
from stages.memory.host import region_of
from stages.policies.load import ComponentRequest, load_components
from stages.policies.load import components as loading
from tests.stages.diffusion.tiny_images import flux2_klein
from tests.stages.diffusion.tiny_parts import kl_vae

PROGRAM = textwrap.dedent("""
    import gc, sys
    from pathlib import Path

    import diffusers
    import torch

    from omni.spec import LoadSpec
    from stages.memory import shared
    from stages.policies.load import ComponentRequest, components, load_components

    num_read, read_all = [], components.read_all

    def count(jobs, *args):
        num_read.append(sum(job.chunk.num_bytes for job in jobs))
        read_all(jobs, *args)

    components.read_all = count
    shared.SHARED_FOLDER = Path(sys.argv[1])
    request = ComponentRequest(
        name="vae", model_class=diffusers.AutoencoderKL, folder=Path(sys.argv[2]), library="diffusers",
        dtype=torch.float32, target="host", shares=True,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "load":
            module = load_components([request], LoadSpec(reader="buffered"), lambda *_: None)["vae"]
            total = sum(float(p.double().abs().sum()) for p in module.parameters())
            print(num_read[-1], total, flush=True)
        elif word == "drop":
            del module
            gc.collect()
            print("ok", flush=True)
""")


class Loader:
    """A process that loads when it is told to."""

    def __init__(self, root: Path, shared_folder: Path, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(shared_folder), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=root,
        )

    def ask(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def hear(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


@pytest.fixture
def shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where regions are shared, for this test alone."""
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setattr(shared, "SHARED_FOLDER", folder)
    yield folder
    gc.collect()
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    kl_vae(4).save_pretrained(folder)
    return folder


@pytest.fixture
def num_jobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks that each load reads."""
    counts: list[int] = []
    read_all = loading.read_all

    def count(jobs: list[Any], *args: Any) -> None:
        counts.append(len(jobs))
        read_all(jobs, *args)

    monkeypatch.setattr(loading, "read_all", count)
    return counts


def load(folder: Path, model_class: Any = diffusers.AutoencoderKL, **changes: Any) -> torch.nn.Module:
    request = {
        "name": "vae",
        "model_class": model_class,
        "folder": folder,
        "library": "diffusers",
        "dtype": torch.float32,
        "target": "host",
        "shares": True,
        **changes,
    }
    done: list[tuple[str, int, int]] = []
    spec = LoadSpec(reader="buffered", threads=2)
    module = load_components([ComponentRequest(**request)], spec, lambda *news: done.append(news))["vae"]
    assert done[-1][1] == done[-1][2] > 0
    return module


def test_of_two_processes_only_one_reads(tmp_path: Path, vae: Path, root: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    size = (vae / "diffusion_pytorch_model.safetensors").stat().st_size
    loaders = [Loader(root, folder, vae) for _ in range(2)]
    try:
        assert [loader.hear() for loader in loaders] == [["ready"]] * 2
        for loader in loaders:
            loader.ask("load")
        news = [loader.hear() for loader in loaders]
        few, many = sorted(int(read) for read, _ in news)
        assert 0.8 * size < many < size, "all but the header"
        assert few == 0
        assert news[0][1] == news[1][1]
        assert len(list(folder.iterdir())) == 1
        for loader, left in ((loaders[0], 1), (loaders[1], 0)):
            loader.ask("drop")
            assert loader.hear() == ["ok"]
            assert len(list(folder.iterdir())) == left
    finally:
        for loader in loaders:
            loader.end()


def test_two_stages_of_one_process(vae: Path, shared_folder: Path, num_jobs: list[int]) -> None:
    first, second = load(vae), load(vae)
    assert num_jobs[0] > 0
    assert num_jobs[1] == 0
    for (name, one), (_, two) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.data_ptr() != two.data_ptr()
    with torch.no_grad():
        next(first.parameters()).fill_(3.0)
    assert float(next(second.parameters()).flatten()[0]) == 3.0, "not the same pages"
    del first
    gc.collect()
    assert len(list(shared_folder.iterdir())) == 1


def test_what_differs_is_not_shared(vae: Path, shared_folder: Path, num_jobs: list[int]) -> None:
    kept = [load(vae), load(vae, dtype=torch.bfloat16), load(vae, shares=False), load(vae, target="device")]
    file = vae / "diffusion_pytorch_model.safetensors"
    os.utime(file, ns=(1, 1))
    kept.append(load(vae))
    assert 0 not in num_jobs
    assert len(list(shared_folder.iterdir())) == 3
    assert [sum(region_of(p) is not None for p in module.parameters()) > 0 for module in kept[:3]] == [True] * 3


def test_a_load_that_fails_leaves_nothing_behind(
    vae: Path, shared_folder: Path, num_jobs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loading, "read_all", lambda *_: (_ for _ in ()).throw(OSError("broken disk")))
        with pytest.raises(OSError, match="broken disk"):
            load(vae)
    assert list(shared_folder.iterdir()) == []
    module = load(vae)
    assert num_jobs[0] > 0
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_buffers_belong_to_each(tmp_path: Path, shared_folder: Path) -> None:
    flux2_klein().vae.save_pretrained(tmp_path / "vae")
    first, second = (load(tmp_path / "vae", diffusers.AutoencoderKLFlux2) for _ in range(2))
    with torch.no_grad():
        first.bn.running_mean.fill_(7.0)
    assert not bool((second.bn.running_mean == 7.0).any())


def test_without_room_each_has_its_own(
    vae: Path, shared_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        shared.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    module = load(vae)
    assert "'vae' is not shared with others: " in caplog.text
    assert list(shared_folder.iterdir()) == []
    assert region_of(next(module.parameters())) is not None
