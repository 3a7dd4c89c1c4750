"""`omni bench batch` on an untrained painter: structure and equal pictures, not times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni.bench import batch
from omni.cli.main import build_parser, main
from omni.errors import UsageError
from omni.testing import doubles


def test_at_once_and_in_turn(painter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "batch", str(painter), "--requests", "3", "--repeat", "2", "--mixed", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["correct"] is True
    rows = report["sections"][0]["rows"]
    assert [(row["name"], row["num_runs"]) for row in rows] == [("one after another", 2), ("at once, batched", 2)]
    assert [target["limit"] for target in report["targets"]] == [1.5, 1.5]
    assert report["notes"][0].startswith("largest difference of a pixel: ")
    assert report["notes"][1].startswith("denoiser: ")


def test_other_pictures_are_a_failure(
    painter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "_draw_at_once", lambda omni, requests: batch._draw_in_turn(omni, requests[::-1]))
    assert main(["bench", "batch", str(painter), "--requests", "2", "--repeat", "1", "--warmup", "0"]) == 1
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--repeat", "0"], ["--requests", "0"], ["--warmup", "-1"]])
def test_wrong_numbers(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "g.yaml").write_text("stages: {a: {kind: double}}")
    with doubles(), pytest.raises(UsageError, match="must be at least"):
        batch.measure(build_parser().parse_args(["bench", "batch", str(tmp_path / "g.yaml"), *options]))
