"""Rows, targets and their printing."""

from __future__ import annotations

import json
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.bench.report import Report, Table, build_section, build_target, describe_machine, percentile, print_report

SECONDS = {"ours": [0.010, 0.030, 0.020], "theirs": [0.040, 0.040, 0.080]}


def report(correct: bool = True) -> Report:
    return Report(
        bench="hop",
        settings={"repeat": 3},
        machine={"cores": "2"},
        sections=(build_section("one hop", "theirs", SECONDS),),
        targets=(build_target("hop", 0.5, 1.3, "x"), build_target("speed-up", 2.0, 10.0, "x", at_most=False)),
        correct=correct,
        notes=("contents equal: yes",),
        tables=(Table(title="memory", columns=("GiB", "x"), rows={"ours": (1.25, None)}),),
    )


def test_rows_hold_milliseconds_and_ratios() -> None:
    ours, theirs = build_section("one hop", "theirs", SECONDS).rows
    assert (ours.median_ms, ours.min_ms, ours.max_ms, ours.num_runs) == (20.0, 10.0, 30.0, 3)
    assert (ours.ratio, theirs.ratio) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("value", "at_most", "met"), [(1.0, True, True), (1.1, True, False), (1.0, False, True), (0.9, False, False)]
)
def test_targets_are_judged(value: float, at_most: bool, met: bool) -> None:
    assert build_target("t", value, 1.0, "ms", at_most).met is met


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_percentiles_are_values_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values) + 1e-9
    assert percentile(values, 1.0) == max(values)
    assert percentile(values, 0.5) <= median(values)


def test_people_get_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(), as_json=False)
    out = capsys.readouterr().out
    for text in ("cores 2", "repeat 3", "x theirs", "one hop", "hop: 0.50 x (target <= 1.3: met)", "contents equal"):
        assert text in out
    assert "speed-up: 2.00 x (target >= 10: MISSED)" in out


def test_machines_get_stable_keys(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["bench", "settings", "machine", "sections", "targets", "correct", "notes", "tables"]
    assert list(found["sections"][0]) == ["title", "reference", "rows"]
    row = ["name", "median_ms", "min_ms", "max_ms", "p95_ms", "ratio", "num_runs"]
    assert list(found["sections"][0]["rows"][0]) == row
    assert list(found["targets"][0]) == ["name", "value", "limit", "unit", "at_most", "met"]


def test_the_machine_is_named() -> None:
    machine = describe_machine(("msgspec", "no-such-package"))
    assert int(machine["cores"]) >= 1
    assert machine["msgspec"][0].isdigit()
    assert machine["no-such-package"] == "not installed"
