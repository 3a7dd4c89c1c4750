"""Rows of a bench in turns: each run in a fresh process, every round in another order, with a bar while it lasts."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from omni.bench.fresh import run_fresh
from omni.errors import OmniError, UsageError
from omni.graph import nearest


class Turn(msgspec.Struct, frozen=True):
    """One run of one row."""

    key: str
    state: str
    """`warm`, `cold`, or whatever tells runs of one row apart."""
    label: str
    job: Any
    environment: Mapping[str, str] = {}


def take_turns(
    target: str, turns: Sequence[Turn], repeat: int, result: type[Any]
) -> tuple[dict[tuple[str, str], list[Any]], dict[str, str]]:
    """Results of each row and state, as `result`, and what went wrong, by label.

    `target`: `module:function` that gets a turn's job. A row that fails once is not run again.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    results: dict[tuple[str, str], list[Any]] = {}
    failures: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task("", total=repeat * len(turns))
        for _ in range(repeat):
            for turn in random.sample(turns, len(turns)):
                bars.update(bar, description=turn.label)
                if turn.label not in failures:
                    try:
                        answer = run_fresh(target, turn.job, turn.environment)
                        results.setdefault((turn.key, turn.state), []).append(msgspec.convert(answer, result))
                    except OmniError as error:
                        failures[turn.label] = str(error)
                bars.advance(bar)
    return results, failures


def choose(only: str, groups: Mapping[str, Iterable[str]]) -> set[str]:
    """Keys of the rows that `--only` names, by their own key or their group's; all when it names none.

    Raises UsageError for a name that is neither.
    """
    rows = {key for keys in groups.values() for key in keys}
    chosen: set[str] = set()
    for name in filter(None, (part.strip() for part in only.split(","))):
        if name not in rows and name not in groups:
            names = sorted({*rows, *groups})
            raise UsageError(f"--only {name}: no such row{nearest(name, names)}; there are {', '.join(names)}")
        chosen |= {name} if name in rows else set(groups[name])
    return chosen or rows
