"""`omni bench offload` on a tiny denoiser: structure, equal outputs, counts, targets and exit codes, not times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni.bench import offload, turns
from omni.bench.fresh import Memory
from omni.bench.offload import ROWS, floor_seconds, host_bytes
from omni.bench.offload_rows import Offloaded, Steps
from omni.bench.report import Report
from omni.cli.main import build_parser, main
from omni.errors import UsageError
from omni.models.random_model import RandomModel, write_model
from tests.bench import offload_double
from tests.bench.rows import run_here

SIZES = ("--sizes", "64x64,128x64", "--steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser alone."""
    folder = tmp_path_factory.mktemp("model") / "qwen"
    write_model(RandomModel(config="qwen-image", scale="tiny"), folder)
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run in this process, with the double in place of the policies."""
    monkeypatch.setattr(turns, "run_fresh", run_here)
    monkeypatch.setattr(offload, "OFFLOAD_POLICY", offload_double.__name__)


def run(*arguments: object) -> Report:
    return offload.measure(build_parser().parse_args(["bench", "offload", *map(str, arguments)]))


def test_all_rows_take_the_same_steps(model: Path) -> None:
    report = run(model, *SIZES)
    assert report.correct
    assert report.settings["denoiser"] == "QwenImageTransformer2DModel"
    ours = ["resident", "Omni, layerwise", "Omni, layerwise, half resident", "Omni, component"]
    assert [section.title for section in report.sections] == [
        "one denoise step, 64x64",
        "one denoise step, 128x64",
        "all weights to the device, and away again",
    ]
    assert [[row.name for row in section.rows] for section in report.sections] == [ours, ours, ["Omni, component"]]
    assert all(row.num_runs == 2 for section in report.sections[:2] for row in section.rows)
    assert [(target.name, target.met) for target in report.targets] == [("weights copied back by component", True)]
    assert report.notes[:3] == (
        "outputs equal, 64x64: yes",
        "outputs equal, 128x64: yes",
        "no GPU: host memory plays one, and times and memory say nothing",
    )
    assert "diffusers, model CPU offload: left out, it needs a GPU" in report.notes
    steps, memory = report.tables
    full, half = (steps.rows[f"Omni, layerwise{more}, 64x64"][1] for more in ("", ", half resident"))
    assert full is not None
    assert half == pytest.approx(full / 2, rel=1e-3)
    assert set(memory.rows) == set(ours)


def test_other_outputs_are_a_failure(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offload_double, "apply_offload", offload_double.build_wrongly)
    assert main(["bench", "offload", str(model), *SIZES, "--only", "resident,half", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["correct"] is False
    assert report["notes"][0] == "outputs equal, 64x64: NO: Omni, layerwise, half resident"


def test_a_pipelines_denoiser_is_found(tmp_path: Path) -> None:
    write_model(RandomModel(config="wan2.2", component="all", scale="tiny"), tmp_path)
    report = run(tmp_path, "--sizes", "32x32x5", "--steps", "1", "--device", "cpu", "--only", "resident,full")
    assert report.correct
    assert report.settings["denoiser"] == "WanTransformer3DModel"
    assert report.sections[0].title == "one denoise step, 32x32x5"


def row(seconds: float, *, bytes_in: float | None = None, swap: tuple[float, ...] = ()) -> Offloaded:
    steps = Steps(
        first_seconds=seconds, seconds=(seconds,), bytes_in=bytes_in, copies_in=1, digest="same", is_sound=True
    )
    return Offloaded(
        load_seconds=2.0,
        setup_seconds=0.1,
        weight_bytes=100,
        steps=(steps,),
        swap_seconds=swap,
        bytes_out=0,
        memory=Memory(110, 90, 5, 12),
    )


def test_targets_on_a_gpu() -> None:
    rows = {
        "resident": row(1.0),
        "full": row(4.1, bytes_in=400.0),
        "half": row(1.1, bytes_in=50.0),
        "component": row(1.0, bytes_in=0.0, swap=(1.05, 1.0, 1.1)),
    }
    assert floor_seconds(rows, 0, "full", link=100.0) == 4.0
    assert floor_seconds(rows, 0, "half", link=100.0) == 1.0
    assert floor_seconds({"full": rows["full"]}, 0, "full", link=100.0) is None
    targets = {target.name: (target.value, target.met) for target in offload._targets(rows, ["64x64"], 100.0, True)}
    assert targets["Omni, layerwise, step over floor, 64x64"] == (pytest.approx(1.025), True)
    assert targets["Omni, layerwise, half resident, step over floor, 64x64"] == (pytest.approx(1.1), False)
    assert targets["Omni, layerwise, load and set-up over load"] == (pytest.approx(1.05), True)
    assert targets["component's swap over link"] == (pytest.approx(1 / 1.05), True)
    assert targets["Omni, component, host memory"] == (pytest.approx(1.02), True)
    assert targets["weights copied back by component"] == (0.0, True)


def test_host_memory_is_what_the_process_or_torchs_allocator_holds() -> None:
    assert host_bytes(row(1.0)) == 102
    assert host_bytes(Offloaded(memory=Memory(110, 90, 5, None), pinned_bytes=160)) == 160
    assert host_bytes(Offloaded(memory=Memory(110, None, None, None))) == 110
    assert host_bytes(Offloaded()) is None


def test_a_failed_row_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "OFFLOAD_POLICY", "tests.bench.rows")

    def run_or_fail(target: str, job: offload.Any, environment: object) -> object:
        if job.way == "layerwise":
            raise UsageError("broke")
        return run_here(target, job)

    monkeypatch.setattr(turns, "run_fresh", run_or_fail)
    report = run(model, *SIZES, "--only", "resident,full")
    assert not report.correct
    assert "Omni, layerwise: FAILED: broke" in report.notes
    with pytest.raises(UsageError, match="no row could be measured: Omni, layerwise: broke"):
        run(model, *SIZES, "--only", "full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps and --threads must be at least 1"),
        (["--sizes", "big"], "--sizes big: write width and height, such as 1024x1024"),
        (["--only", "swap"], "--only swap: no such row"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
    ],
)
def test_settings_that_cannot_be_are_told(model: Path, options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(model, *options)


def test_models_without_a_denoiser_are_told(tmp_path: Path) -> None:
    write_model(RandomModel(config="flux", component="text_encoder", scale="tiny"), tmp_path)
    with pytest.raises(UsageError, match="holds CLIPTextModel, and no denoiser of the classes QwenImage"):
        run(tmp_path, *SIZES)


def test_every_row_has_a_name() -> None:
    assert len({row.name for row in ROWS.values()}) == len(ROWS)
