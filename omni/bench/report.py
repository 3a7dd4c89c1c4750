"""What every bench gives: rows of medians, ratios to one of them, targets, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import msgspec


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way to do the work. All times in milliseconds."""

    name: str
    median_ms: float
    min_ms: float
    max_ms: float
    p95_ms: float
    ratio: float
    """Median divided by the median of the reference row; 1.0 is the reference itself."""
    num_runs: int


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A number that Omni promises."""

    name: str
    value: float
    limit: float
    unit: str
    """`ms`, `%`, `x` or `/s`."""
    at_most: bool = True
    met: bool = False


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that do the same work."""

    title: str
    reference: str
    rows: tuple[Row, ...]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Further numbers of rows, beside their times."""

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]
    """Row -> one number for each column; None where there is none."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a bench; `--json` prints exactly this."""

    bench: str
    settings: dict[str, Any]
    machine: dict[str, str]
    sections: tuple[Section, ...]
    targets: tuple[Target, ...]
    correct: bool
    """Whether every result had the right content."""
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def build_section(title: str, reference: str, seconds: Mapping[str, Sequence[float]]) -> Section:
    """A section from each row's measured seconds."""
    base = median(seconds[reference])
    rows = (_build_row(name, values, base) for name, values in seconds.items())
    return Section(title=title, reference=reference, rows=tuple(rows))


def build_target(name: str, value: float, limit: float, unit: str, at_most: bool = True) -> Target:
    """A target and whether it is met."""
    met = value <= limit if at_most else value >= limit
    return Target(name=name, value=value, limit=limit, unit=unit, at_most=at_most, met=met)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def describe_machine(packages: Sequence[str]) -> dict[str, str]:
    """Cores, memory, Python and the versions of `packages`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"system": f"{platform.system()} {platform.machine()}", "cores": str(cores)}
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    facts["python"] = platform.python_version()
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def print_report(report: Report, as_json: bool) -> None:
    """Print a report on stdout: tables for people, or one JSON document."""
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print(", ".join(f"{key} {value}" for key, value in report.machine.items()))
    console.print(", ".join(f"{key} {value}" for key, value in report.settings.items()))
    for section in report.sections:
        table = RichTable(title=section.title, title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for heading in ("median ms", "p95 ms", "min ms", "max ms", f"x {section.reference}", "runs"):
            table.add_column(heading, justify="right")
        for row in section.rows:
            times = (row.median_ms, row.p95_ms, row.min_ms, row.max_ms)
            table.add_row(row.name, *(_three_digits(time) for time in times), f"{row.ratio:.2f}", str(row.num_runs))
        console.print("")
        console.print(table)
    for facts in report.tables:
        table = RichTable(title=facts.title, title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for column in facts.columns:
            table.add_column(column, justify="right")
        for name, values in facts.rows.items():
            table.add_row(name, *("-" if value is None else _three_digits(value) for value in values))
        console.print("")
        console.print(table)
    console.print("")
    for target in report.targets:
        sign = "<=" if target.at_most else ">="
        outcome = "met" if target.met else "MISSED"
        console.print(f"{target.name}: {target.value:.2f} {target.unit} (target {sign} {target.limit:g}: {outcome})")
    for note in report.notes:
        console.print(note)


def _build_row(name: str, seconds: Sequence[float], base: float) -> Row:
    return Row(
        name=name,
        median_ms=median(seconds) * 1000,
        min_ms=min(seconds) * 1000,
        max_ms=max(seconds) * 1000,
        p95_ms=percentile(seconds, 0.95) * 1000,
        ratio=median(seconds) / base,
        num_runs=len(seconds),
    )


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
