"""The table that `omni run` ends with: seconds and bytes of each stage and hop."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TextIO

from omni.api import Timings
from omni.cli.progress import format_seconds
from omni.messages import HopFinished, StageFinished
from omni.sizes import format_bytes

WIDTH_IN_FILES = 120


def print_table(timings: Sequence[Timings], seeds: Sequence[int], stream: TextIO) -> None:
    """Print seconds and bytes per stage and hop, of one request or as medians of several."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("stage or hop", no_wrap=True)
    table.add_column("seconds" if len(timings) == 1 else f"seconds (median of {len(timings)})", justify="right")
    table.add_column("bytes", justify="right")
    for name, parts in _rows(timings).items():
        size = round(median(part.bytes for part in parts))
        table.add_row(name, format_seconds(median(part.seconds for part in parts)), format_bytes(size))
    table.add_row("whole request", format_seconds(median(timing.seconds for timing in timings)), "")
    shown = str(seeds[0]) if len(seeds) == 1 else ", ".join(map(str, seeds[:8])) + (", ..." if len(seeds) > 8 else "")
    console = Console(file=stream, width=None if stream.isatty() else WIDTH_IN_FILES, highlight=False)
    console.print(table)
    console.print(f"seed {shown}")


def _rows(timings: Sequence[Timings]) -> dict[str, list[StageFinished | HopFinished]]:
    """What happened, in order of the first request: a hop before the stage that waited for it."""
    rows: dict[str, list[StageFinished | HopFinished]] = {}
    for timing in timings:
        for stage in timing.stages.values():
            for hop in timing.hops:
                if hop.target.split(".")[0] == stage.stage:
                    rows.setdefault(f"  {hop.source} -> {hop.target} ({hop.transport})", []).append(hop)
            rows.setdefault(stage.stage, []).append(stage)
    return rows
