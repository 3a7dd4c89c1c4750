"""Rows in fresh processes: what goes in and out, failures, and memory."""

from __future__ import annotations

import os

import pytest

from omni.bench import fresh, turns
from omni.bench.fresh import MemoryMeter, run_fresh
from omni.bench.turns import Turn, choose, take_turns
from omni.errors import OmniError, UsageError

HERE = "tests.bench.rows"


def test_a_function_runs_in_another_process() -> None:
    result = run_fresh(f"{HERE}:answer", {"a": [1, "b"]}, {"SETTING": "on"})
    assert (result["job"], result["setting"]) == ({"a": [1, "b"]}, "on")
    assert result["process"] != os.getpid()


@pytest.mark.parametrize(
    ("function", "message"),
    [("refuse", "UsageError: there is no such thing"), ("crash", "ZeroDivisionError: oh")],
)
def test_failures_say_why(function: str, message: str) -> None:
    with pytest.raises(OmniError, match=message):
        run_fresh(f"{HERE}:{function}", None)


def test_a_row_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "DEADLINE_SECONDS", 0.001)
    with pytest.raises(OmniError, match=r"not done within 0\.001 s"):
        run_fresh(f"{HERE}:answer", None)


def test_memory_counts_what_is_taken_since() -> None:
    meter = MemoryMeter()
    taken = bytearray(os.urandom(1 << 20) * 64)
    memory = meter.read()
    assert memory.peak_bytes >= 60 << 20
    assert memory.anonymous_bytes is None or memory.anonymous_bytes >= 60 << 20
    del taken
    assert MemoryMeter().read().peak_bytes < 60 << 20


def test_turns_are_whole_rounds_and_a_failed_row_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def run(target: str, job: str, environment: object) -> str:
        calls.append(job)
        if job == "bad":
            raise OmniError("broke")
        return f"{target} {job}"

    monkeypatch.setattr(turns, "run_fresh", run)
    rows = [Turn(job, "warm", f"row {job}", job) for job in ("a", "b", "bad")]
    results, failures = take_turns("t", rows, 3, str)
    assert results == {("a", "warm"): ["t a"] * 3, ("b", "warm"): ["t b"] * 3}
    assert failures == {"row bad": "broke"}
    assert set(calls[:3]) == {"a", "b", "bad"}
    assert sorted(calls) == ["a"] * 3 + ["b"] * 3 + ["bad"]


def test_rows_are_chosen_by_their_key_or_their_group() -> None:
    groups = {"g": ["a", "b"], "h": ["b", "c"]}
    assert choose("", groups) == {"a", "b", "c"}
    assert choose("a, h", groups) == {"a", "b", "c"}
    assert choose("g", groups) == {"a", "b"}
    with pytest.raises(UsageError, match=r"--only d: no such row.*; there are a, b, c, g, h"):
        choose("d", groups)
