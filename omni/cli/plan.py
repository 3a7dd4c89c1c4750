"""Show what would run where, and why: processes, stages, memory, edges, and a drawing. Nothing is started.

Modules of functions that the graph names are imported, to read their type hints.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from omni.choices import RunnerChoice
from omni.cli.memory_table import COLUMNS, memory_lines, memory_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from omni.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `omni plan`."""
    parser.add_argument("graph", metavar="GRAPH", help="graph file")
    parser.add_argument(
        "--hardware",
        metavar="NAME|FILE",
        help="plan for other hardware than this machine: h200x8, h200x8x2 (two nodes), cpu16, or an inventory file",
    )
    parser.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="change a value of the graph")
    parser.add_argument("--runner", choices=get_args(RunnerChoice), default="auto", help="override the choice")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--svg", metavar="FILE", help="also draw the graph into this file")


def command(args: argparse.Namespace) -> int:
    """Plan the graph and print it. Returns the exit code."""
    from omni.checkpoint import gather_facts
    from omni.hardware import load_hardware
    from omni.load import load_graph
    from omni.plan import plan_graph
    from omni.plan_document import plan_document

    graph = load_graph(args.graph, args.set).graph
    plan = plan_graph(graph, load_hardware(args.hardware), gather_facts(graph), args.runner)
    if args.svg:
        _write_svg(plan, Path(args.svg))
    if args.json:
        print(json.dumps(plan_document(plan), indent=2))
    else:
        print_plan(plan)
        if args.svg:
            print(f"drawn in {args.svg}")
    return 0


def print_plan(plan: Plan) -> None:
    """Tables and drawing on standard output, in ASCII where its encoding has no lines."""
    from rich.console import Console
    from rich.text import Text

    from omni.draw import draw_terminal

    ascii_only = not _can_draw(sys.stdout.encoding)
    console = Console(safe_box=ascii_only, highlight=False)
    console.print(Text(f"{plan.graph.spec.name} on {plan.hardware.name}: {plan.runner} runner, since {plan.reason}"))
    console.print()
    console.print(Text(draw_terminal(plan, ascii_only)), no_wrap=True, crop=False, overflow="ignore", soft_wrap=True)
    console.print()
    for table in (_process_table(plan), _stage_table(plan), _memory_table(plan), _edge_table(plan)):
        if table.row_count:
            _print_table(console, table, ascii_only)
    for line in memory_lines(plan):
        console.print(Text(line))
    for warning in (*plan.hardware.notes, *plan.warnings):
        console.print(Text(f"warning: {warning}", style="yellow"))


def _print_table(console: Console, table: Table, ascii_only: bool) -> None:
    from rich import box

    table.box = box.ASCII if ascii_only else box.SIMPLE_HEAD
    table.title_justify = "left"
    console.print(table)


def _process_table(plan: Plan) -> Table:
    where = ["node"] if len(plan.hardware.nodes) > 1 else []
    table = _table("Processes", "process", *where, "stages", "CPUs", "threads", "GPUs", "why")
    for process in plan.processes:
        gpus = f"{process.gpus:g} (no. {', '.join(map(str, process.gpu_ids))})" if process.gpu_ids else "-"
        cpus = "-" if process.kind == "driver" else f"{process.cpus:g}"
        node = [process.node] if where else []
        stages = ", ".join(process.stages) or "-"
        _add_row(table, process.name, *node, stages, cpus, str(process.num_threads), gpus, process.reason)
    return table


def _stage_table(plan: Plan) -> Table:
    from omni.sizes import format_bytes

    table = _table("Stages", "stage", "kind", "process", "device", "weights", "why")
    for stage in plan.stages:
        size = "unknown" if stage.weight_bytes is None else format_bytes(stage.weight_bytes)
        kind = str(plan.graph.spec.stages[stage.stage].__struct_config__.tag)
        weights = "-" if stage.weight_bytes == 0 else size
        _add_row(table, stage.stage, kind, stage.process, stage.device, weights, stage.reason)
    return table


def _memory_table(plan: Plan) -> Table:
    table = _table("Memory", *COLUMNS)
    for row in memory_rows(plan):
        _add_row(table, *row)
    return table


def _edge_table(plan: Plan) -> Table:
    table = _table("Edges", "from", "to", "transport", "why")
    for planned in plan.edges:
        edge = planned.edge
        target = f"{edge.target_stage}.{edge.target_port}"
        _add_row(table, str(edge.source), target, planned.transport, planned.reason)
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_style="bold", padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=False)
    return table


def _add_row(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))  # Text: a name in [brackets] is no markup


def _can_draw(encoding: str | None) -> bool:
    try:
        "\u2502\u25b6".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _write_svg(plan: Plan, file: Path) -> None:
    from omni.draw_svg import draw_svg
    from omni.errors import UsageError

    try:
        file.write_text(draw_svg(plan), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--svg {file}: cannot be written: {error.strerror}") from error
