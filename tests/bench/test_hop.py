"""`omni bench hop` at tiny sizes: structure and correctness, not times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni.bench import hop
from omni.bench.carriers import Carrier, MemcpyCarrier, consume, produce
from omni.cli.main import build_parser
from omni.errors import UsageError

CHILD = """
from omni.cli.main import entry
if __name__ == "__main__":
    entry()
"""
WAYS = {"Omni", "Ray's default", "pickle through a queue", "torch.multiprocessing queue"}


def test_all_ways_carry_the_same_in_one_run(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    options = ["--size", "1MB", "--repeat", "2", "--repeat-small", "3", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), "bench", "hop", *options]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["correct"] is True
    assert report["settings"]["size_bytes"] == 1_000_000
    large, small = report["sections"]
    assert {row["name"] for row in small["rows"]} == WAYS
    assert {row["name"] for row in large["rows"]} >= {*WAYS, "memcpy, 1 thread"}
    assert {row["num_runs"] for row in large["rows"]} == {2}
    assert {row["num_runs"] for row in small["rows"]} == {3}
    assert [target["limit"] for target in report["targets"]] == [1.3, 10.0, 3.0]
    assert report["notes"] == ["contents equal: yes"]


def test_wrong_content_is_noticed() -> None:
    product = produce(800)
    assert consume(**product)
    product["tensor"][50] += 1
    assert not consume(**product)


def test_every_hop_carries_new_numbers() -> None:
    assert produce(800)["checksum"] != produce(800)["checksum"]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_copies_are_whole(num_threads: int) -> None:
    carrier = MemcpyCarrier(num_threads)
    for num_bytes in (800, 1600):
        seconds, correct = carrier.hop(num_bytes)
        assert correct
        assert seconds > 0


class _Counting(Carrier):
    def __init__(self, name: str, calls: list[str], correct: bool = True) -> None:
        self.name = name
        self.calls = calls
        self.correct = correct

    def hop(self, num_bytes: int) -> tuple[float, bool]:
        self.calls.append(self.name)
        return float(len(self.calls)), self.correct


def test_carriers_take_turns_and_warm_up() -> None:
    calls: list[str] = []
    carriers = [_Counting(name, calls) for name in "abc"]
    seconds, correct = hop._take_turns(carriers, 8, repeat=4, warmup=2)
    assert correct
    assert all(set(calls[turn : turn + 3]) == set("abc") for turn in range(0, 18, 3))
    assert sorted(value for values in seconds.values() for value in values) == [float(n) for n in range(7, 19)]


def test_one_wrong_hop_makes_the_run_wrong() -> None:
    carriers = [_Counting("a", []), _Counting("b", [], correct=False)]
    assert hop._take_turns(carriers, 8, repeat=1, warmup=0)[1] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "much"], "'much' is not a size"),
        (["--size", "1000"], "--size must be at least 1024 bytes"),
        (["--repeat", "0"], "--repeat and --repeat-small at least 1"),
        (["--size", "900TB"], r"--size 900TB: takes .* of memory, and there are"),
    ],
)
def test_settings_that_cannot_be_are_told(options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hop.measure(build_parser().parse_args(["bench", "hop", *options]))
