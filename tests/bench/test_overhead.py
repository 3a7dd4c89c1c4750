"""`omni bench overhead` on an untrained painter: structure and equal pixels, not times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from omni.bench import overhead
from omni.cli.main import build_parser, main
from omni.errors import UsageError
from omni.testing import doubles

CHILD = "import sys; from omni.cli.main import entry; entry()"


def test_both_sides_draw_the_same_without_ray(painter: Path, root: Path) -> None:
    command = [
        sys.executable,
        "-c",
        CHILD,
        "bench",
        "overhead",
        str(painter),
        "--repeat",
        "3",
        "--warmup",
        "1",
        "--json",
    ]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["correct"] is True
    assert report["notes"][0].startswith("noise, bare against itself: ")
    assert report["notes"][1:] == ["pixels equal: yes", "ray imported: no"]
    rows = report["sections"][0]["rows"]
    names = ["bare diffusers", "bare diffusers, again", "Omni inline"]
    assert [(row["name"], row["num_runs"]) for row in rows] == [(name, 3) for name in names]
    assert all(0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in rows)
    assert [(target["unit"], target["limit"]) for target in report["targets"]] == [("ms", 5.0), ("%", 1.0)] * 2
    added = rows[2]["median_ms"] - rows[0]["median_ms"]
    assert report["targets"][0]["value"] == pytest.approx(added)


def test_other_pixels_are_a_failure(
    painter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = overhead._time_bare
    monkeypatch.setattr(overhead, "_time_bare", lambda p, call, prompt, seed: real(p, call, prompt, seed + 1))
    assert main(["bench", "overhead", str(painter), "--repeat", "1", "--warmup", "0"]) == 1
    assert "pixels equal: NO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ("{a: {kind: double}}", [], "needs a graph with a single stage, of kind diffusion"),
        ("{a: {kind: double}, b: {kind: double}}", [], "needs a graph with a single stage"),
        ("{a: {kind: double}}", ["--repeat", "0"], "--repeat must be at least 1"),
    ],
)
def test_other_graphs_are_refused(tmp_path: Path, stages: str, options: list[str], message: str) -> None:
    (tmp_path / "g.yaml").write_text(f"stages: {stages}")
    with doubles(), pytest.raises(UsageError, match=message):
        overhead.measure(build_parser().parse_args(["bench", "overhead", str(tmp_path / "g.yaml"), *options]))
