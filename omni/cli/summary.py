"""The tables that `omni run` ends with: seconds and bytes of each stage and hop, and memory as planned and as taken."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, TextIO

from omni.api import Timings
from omni.cli.progress import format_seconds
from omni.messages import HopFinished, StageFinished
from omni.sizes import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from omni.plan import Plan

WIDTH_IN_FILES = 120


def print_tables(timings: Sequence[Timings], seeds: Sequence[int], plan: Plan, stream: TextIO) -> None:
    """Print what happened, of one request or as medians of several, and what the planner had said of memory."""
    from rich.console import Console

    console = Console(file=stream, width=None if stream.isatty() else WIDTH_IN_FILES, highlight=False)
    console.print(_time_table(timings))
    memory = _memory_table(timings, plan)
    if memory.row_count:
        console.print(memory)
    shown = str(seeds[0]) if len(seeds) == 1 else ", ".join(map(str, seeds[:8])) + (", ..." if len(seeds) > 8 else "")
    console.print(f"seed {shown}")


def _time_table(timings: Sequence[Timings]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("stage or hop", no_wrap=True)
    table.add_column("seconds" if len(timings) == 1 else f"seconds (median of {len(timings)})", justify="right")
    table.add_column("bytes", justify="right")
    for name, parts in _rows(timings).items():
        size = round(median(part.bytes for part in parts))
        table.add_row(name, format_seconds(median(part.seconds for part in parts)), format_bytes(size))
    table.add_row("whole request", format_seconds(median(timing.seconds for timing in timings)), "")
    return table


def _memory_table(timings: Sequence[Timings], plan: Plan) -> Table:
    """Peaks and load times, each beside its prediction. Peaks are those of the stage's process."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("memory", "GPU peak", "planned", "host peak", "planned", "load", "planned"):
        table.add_column(title, no_wrap=True, justify="left" if title == "memory" else "right")
    for name, load in timings[-1].loads.items():
        memory = plan.stage(name).memory
        runs = [timing.stages[name] for timing in timings if name in timing.stages]
        if memory is None or not memory.components:
            continue
        device, host = (
            max(getattr(found, peak) for found in (load, *runs)) for peak in ("peak_device_bytes", "peak_host_bytes")
        )
        has_gpu = memory.room.device == "cuda"
        table.add_row(
            name,
            format_bytes(device) if has_gpu else "-",
            format_bytes(memory.peak_device_bytes) if has_gpu else "-",
            format_bytes(host),
            format_bytes(memory.peak_host_bytes),
            format_seconds(load.load_seconds),
            format_seconds(memory.load_seconds),
        )
    return table


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
