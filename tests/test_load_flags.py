"""The flags about loading weights."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from omni.errors import UsageError
from omni.load import load_graph
from omni.load_flags import add_load_flags, with_load_flags

GRAPH: dict[str, Any] = {
    "stages": {
        "rewrite": {"kind": "llm", "model": "owner/llm"},
        "draw": {"kind": "diffusion", "model": "owner/model", "inputs": {"prompt": "rewrite.text"}},
        "frame": {"kind": "function", "call": "stages.function.library:add_border", "inputs": {"image": "draw.images"}},
    }
}


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--set", action="append", default=[])
    add_load_flags(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "threads", "enabled"),
    [
        ([], 4, True),
        (["--num-weight-load-threads", "9"], 9, True),
        (["--disable-multithread-weight-load"], 4, False),
        (["--set", "stages.draw.load.threads=2", "--num-weight-load-threads", "9"], 9, True),
    ],
)
def test_every_stage_with_weights(arguments: list[str], threads: int, enabled: bool) -> None:
    stages = load_graph(GRAPH, with_load_flags(parse(*arguments), GRAPH)).spec.stages
    loads = [stages[name].load for name in ("rewrite", "draw")]  # type: ignore[attr-defined]
    assert [(load.threads, load.enabled) for load in loads] == [(threads, enabled)] * 2


@pytest.mark.parametrize("threads", ["0", "-3"])
def test_at_least_one_thread(threads: str) -> None:
    with pytest.raises(UsageError, match=f"--num-weight-load-threads {threads}: must be at least 1"):
        with_load_flags(parse(f"--num-weight-load-threads={threads}"), GRAPH)


def test_the_two_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse("--num-weight-load-threads", "2", "--disable-multithread-weight-load")
