"""`omni bench load` on tiny models: structure, equal weights, targets and exit codes, not times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from omni.bench import load, turns
from omni.bench.checkpoints import consolidated, main_dtype, read_components
from omni.bench.load_ways import build_bounds, build_groups, judge
from omni.bench.report import Report
from omni.cli.main import build_parser, main
from omni.errors import UsageError
from omni.models.random_model import RandomModel, write_model
from tests.bench.rows import run_here


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two text encoders, a denoiser and a VAE, in several files each."""
    folder = tmp_path_factory.mktemp("pipeline") / "flux"
    write_model(RandomModel(config="flux", component="all", scale="tiny", shard_bytes=300_000), folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser alone, in float32."""
    folder = tmp_path_factory.mktemp("model") / "qwen"
    write_model(RandomModel(config="qwen-image", scale="tiny", dtype="float32", shard_bytes=500_000), folder)
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run in this process."""
    monkeypatch.setattr(turns, "run_fresh", run_here)


def run(*arguments: object) -> Report:
    return load.measure(build_parser().parse_args(["bench", "load", *map(str, arguments)]))


@pytest.mark.usefixtures("here")
def test_all_rows_load_the_same_pipeline(pipeline: Path) -> None:
    report = run(pipeline, "--repeat", "1", "--device", "cpu")
    assert report.correct
    assert report.notes[0] == "weights equal: yes"
    assert (report.settings["components"], report.settings["dtype"]) == (4, "bfloat16")
    titles = [section.title for section in report.sections]
    assert titles == [
        "in place, every page touched, warm",
        "in place, every page touched, cold",
        "into a host master, warm",
        "into a host master, cold",
        "converted from bfloat16 to float32, warm",
        "one file against several, warm",
    ]
    assert [section.reference for section in report.sections[::2]] == [
        "diffusers",
        "preads into fresh memory, 4 threads",
        "diffusers, to float32",
    ]
    assert all(row.num_runs == 1 and row.min_ms > 0 for section in report.sections for row in section.rows)
    assert [target.name.rpartition(",")[0] for target in report.targets[:8]] == [
        *["first output over diffusers'"] * 2,
        *["host master over preads into fresh memory"] * 2,
        *["host master over diffusers and a copy"] * 2,
        "diffusers over Omni, to float32",
        "one file over several",
    ]
    assert [target.limit for target in report.targets] == [1.0, 1.0, 1.3, 1.3, 1.0, 1.0, 2.0, 1.1, *[1.05] * 4]
    assert set(report.tables[0].rows) == {
        f"{way.name} ({way.key})"
        for group in build_groups("cpu", "bfloat16", ("float32",), 4, True)
        for way in group.ways
    }
    assert not list(pipeline.parent.glob("omni-bench-*"))


@pytest.mark.usefixtures("here")
def test_rows_can_be_chosen(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--repeat", "2", "--device", "cpu", "--cache", "warm", "--only", "omni,to-bfloat16", "--json"]
    assert main(["bench", "load", str(model), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["num_runs"] for section in report["sections"] for row in section["rows"]}
    assert rows == {
        "Omni": 2,
        "diffusers, to bfloat16": 2,
        "Omni, to bfloat16": 2,
        "diffusers, parallel loading, to bfloat16": 2,
    }
    assert report["settings"]["dtype"] == "float32"
    assert len(report["targets"]) == 3


@pytest.mark.usefixtures("here")
def test_other_weights_are_a_failure(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "POLICY", "tests.bench.rows")
    options = ["--repeat", "1", "--device", "cpu", "--cache", "warm", "--only", "omni,default"]
    assert main(["bench", "load", str(model), *options]) == 1
    assert "weights equal: NO" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_a_rivals_failure_is_a_note_and_omnis_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [model, "--repeat", "1", "--device", "cpu", "--cache", "warm", "--only", "omni,raw"]
    real = run_here

    def fail(way: str) -> Report:
        def run_or_fail(target: str, job: load.Any, environment: object) -> object:
            if job.way == way:
                raise UsageError("broke")
            return real(target, job)

        monkeypatch.setattr(turns, "run_fresh", run_or_fail)
        return run(*options)

    report = fail("raw")
    assert report.correct
    assert any("preads into scratch, 4 threads, warm: FAILED: broke" in note for note in report.notes)
    assert not fail("omni").correct
    monkeypatch.setattr(turns, "run_fresh", lambda *_: fail_all())
    with pytest.raises(UsageError, match="no row could be measured: in place, every page touched, "):
        run(*options)


def fail_all() -> None:
    raise UsageError("broke")


@pytest.mark.usefixtures("here")
def test_rows_that_memory_cannot_hold_are_left_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "FREE_SHARE", 1e-9)
    report = run(model, "--repeat", "1", "--device", "cpu", "--cache", "warm", "--only", "raw,omni-host")
    assert [row.name for section in report.sections for row in section.rows] == ["preads into scratch, 4 threads"]
    assert "into a host master, Omni, host master: left out, the memory does not hold it" in report.notes


def test_a_copy_has_one_file_and_the_same_tensors(pipeline: Path) -> None:
    components = read_components(pipeline)
    assert [component.name for component in components if len(component.files) > 1] == ["transformer"]
    with consolidated(components, pipeline) as alone:
        for many, one in zip(components, alone, strict=True):
            assert len(one.files) == 1
            assert read_components(Path(one.folder))[0].class_name == many.class_name
            tensors = {name: tensor for file in many.files for name, tensor in load_file(file).items()}
            copied = load_file(one.files[0])
            assert set(copied) == set(tensors)
            assert all(copied[name].equal(tensor) for name, tensor in tensors.items())
        folder = Path(alone[0].folder).parent
    assert not folder.exists()


def test_targets_of_a_gpu_compare_with_the_slower_limit() -> None:
    seconds = {("omni", "warm"): [1.2], ("raw", "warm"): [1.0], ("link", "warm"): [0.8], ("default", "warm"): [6.0]}
    seconds |= {("omni", "cold"): [20.0], ("raw", "cold"): [19.0]}
    judged = {name: ratio for name, ratio, _ in judge(build_bounds("cuda", ()), seconds)}
    assert judged == {
        "load over the slower of preads and link, warm": pytest.approx(1.2),
        "diffusers over Omni, warm": pytest.approx(5.0),
        "preads over Omni, cold": pytest.approx(0.95),
    }
    keys = [way.key for group in build_groups("cuda", "bfloat16", ("float32",), 16, True) for way in group.ways]
    assert {"omni", "raw", "link", "default", "omni-single"} <= set(keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeat", "0"], "--threads and --repeat must be at least 1"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["--only", "omnni"], "--only omnni: no such row, did you mean 'omni'"),
    ],
)
def test_settings_that_cannot_be_are_told(model: Path, options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(model, *options)


def test_folders_that_are_no_model_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither a pipeline \(model_index.json\) nor a model \(config.json\)"):
        run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json: not the JSON that belongs there"):
        run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="names no class"):
        run(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UsageError, match="holds no safetensors weights"):
        run(tmp_path)
    import torch

    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="the weights are I8; the bench takes F32, BF16, F16"):
        main_dtype(read_components(tmp_path))
