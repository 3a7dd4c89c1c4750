"""Weights from files to where they are used, through Omni, diffusers and plain reads, in turns of fresh processes.

MODEL is the folder of a model, or of a pipeline, whose components Omni loads at once. Its files are in the page cache
(warm) or dropped from it (cold); imports do not count. On a CPU the weights stay mapped or are filled into memory of
their own, and a load counts until every page has been touched; with a GPU they end there.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni.bench.checkpoints import Component
    from omni.bench.load_rows import Loaded
    from omni.bench.load_ways import Bound, Group, Way
    from omni.bench.report import Report, Section, Table, Target

POLICY = "stages.policies.load"
"""The module of Omni's load policy."""
FREE_SHARE = 0.9
"""Of the free memory, a row may take so much."""
GROUP_KEYS = "place, host, to-float32 or to-bfloat16, single"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni bench load`."""
    parser.add_argument("model", metavar="MODEL", help="folder of a model or a pipeline with safetensors weights")
    parser.add_argument("--threads", metavar="N", type=int, default=4, help="reader threads (default: 4)")
    parser.add_argument("--repeat", metavar="N", type=int, default=3, help="runs of each row (default: 3)")
    parser.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda or cuda:N (default: a GPU, if any)")
    parser.add_argument("--cache", choices=("both", "warm", "cold"), default="both", help="default: both")
    parser.add_argument(
        "--only", metavar="ROW,...", default="", help=f"rows by their keys, or groups of rows: {GROUP_KEYS}"
    )
    parser.add_argument("--variant", metavar="NAME", help="of the weight files, such as fp16")


def measure(args: argparse.Namespace) -> Report:
    """Run the bench. Raises UsageError when the model or an argument is not fit."""
    from omni.bench.checkpoints import consolidated, find_device, main_dtype, read_components, weight_bytes
    from omni.bench.load_rows import Loaded
    from omni.bench.load_ways import build_bounds, build_groups
    from omni.bench.turns import choose, take_turns
    from omni.errors import UsageError

    if args.threads < 1 or args.repeat < 1:
        raise UsageError("--threads and --repeat must be at least 1")
    components = read_components(Path(args.model), args.variant)
    device, dtype = find_device(args.device), main_dtype(components)
    others = tuple(other for other in ("float32", "bfloat16") if other != dtype)
    is_sharded = any(len(component.files) > 1 for component in components)
    groups = build_groups(device, dtype, others, args.threads, is_sharded)
    keys = choose(args.only, {group.key: [way.key for way in group.ways] for group in groups})
    notes = [] if is_sharded else ["one file against several: each component has one file already"]
    keys -= _too_large(groups, weight_bytes(components), device, notes)
    with contextlib.ExitStack() as stack:
        alone: tuple[Component, ...] = ()
        if "omni-single" in keys:
            alone = stack.enter_context(consolidated(components, Path(args.model)))
        turns = _plan_turns(args, groups, keys, components, alone)
        results, failures = take_turns("omni.bench.load_rows:run", turns, args.repeat, Loaded)
    if not results:
        raise UsageError("no row could be measured: " + "; ".join(f"{row}: {why}" for row, why in failures.items()))
    settings = {
        "model": args.model,
        "bytes": weight_bytes(components),
        "components": len(components),
        "dtype": dtype,
        "device": device,
        "threads": args.threads,
        "repeat": args.repeat,
    }
    return _report(settings, groups, build_bounds(device, others), results, failures, notes)


def _too_large(groups: Sequence[Group], num_bytes: int, device: str, notes: list[str]) -> set[str]:
    """Keys of rows that would not fit into the memory of the machine or its GPU."""
    from omni.registry import import_string

    free, free_gpu = import_string("stages.memory.limits:available_bytes")(), 0
    if device != "cpu":
        import torch

        free_gpu = torch.cuda.mem_get_info(device)[0]
    large = set()
    for group in groups:
        for way in group.ways:
            needed, on_gpu = way.memory_share(device) * num_bytes, way.gpu_share(device) * num_bytes
            if needed > free * FREE_SHARE or (on_gpu and on_gpu > free_gpu * FREE_SHARE):
                large.add(way.key)
                notes.append(f"{group.title}, {way.name}: left out, the memory does not hold it")
    return large


def _plan_turns(
    args: argparse.Namespace,
    groups: Sequence[Group],
    keys: set[str],
    components: tuple[Component, ...],
    alone: tuple[Component, ...],
) -> list[Any]:
    """One turn of each row and state of the cache; a row of two groups is measured once."""
    from omni.bench.checkpoints import find_device, weight_bytes
    from omni.bench.load_rows import Job
    from omni.bench.turns import Turn

    turns: dict[tuple[str, str], Turn] = {}
    device, num_bytes = find_device(args.device), weight_bytes(components)
    for group in groups:
        for way in group.ways:
            for state in ("warm", "cold"):
                wanted = way.key in keys and args.cache in ("both", state)
                if wanted and (state == "warm" or (group.cold and way.job["way"] != "link")):
                    job = Job(
                        components=alone if way.is_single else components,
                        policy=POLICY,
                        cold=state == "cold",
                        fresh_bytes=int((way.memory_share(device) + (state == "cold")) * num_bytes),
                        **{"threads": args.threads, **way.job},
                    )
                    label = f"{group.title}, {way.name}, {state}"
                    turns.setdefault((way.key, state), Turn(way.key, state, label, job, way.environment))
    return list(turns.values())


def _report(
    settings: dict[str, Any],
    groups: Sequence[Group],
    bounds: tuple[Bound, ...],
    results: Mapping[tuple[str, str], list[Loaded]],
    failures: Mapping[str, str],
    notes: list[str],
) -> Report:
    from omni.bench.report import Report, describe_machine

    correct, found = _compare(groups, results)
    failed = [f"{label}: FAILED: {why}" for label, why in failures.items()]
    doubts = {run.doubt for runs in results.values() for run in runs if run.doubt}
    return Report(
        bench="load",
        settings=settings,
        machine=describe_machine(("torch", "diffusers", "transformers")),
        sections=tuple(_sections(groups, results)),
        targets=tuple(_targets(bounds, groups, results)),
        correct=correct and not any("Omni" in label for label in failures),
        notes=(found, *sorted(doubts), *failed, *notes),
        tables=(_table(groups, results),),
    )


def _compare(groups: Sequence[Group], results: Mapping[tuple[str, str], list[Loaded]]) -> tuple[bool, str]:
    """Whether all rows of a dtype loaded the same numbers."""
    sums: dict[str, set[str]] = {}
    for group in groups:
        for way in group.ways:
            for state in ("warm", "cold"):
                found = {run.checksum for run in results.get((way.key, state), ()) if run.checksum}
                sums.setdefault(way.job["dtype"], set()).update(found)
    correct = all(len(found) <= 1 for found in sums.values())
    return correct, f"weights equal: {'yes' if correct else 'NO'}"


def _sections(groups: Sequence[Group], results: Mapping[tuple[str, str], list[Loaded]]) -> list[Section]:
    from omni.bench.report import build_section

    sections = []
    for group in groups:
        for state in ("warm", "cold") if group.cold else ("warm",):
            seconds = {
                way.name: [run.seconds for run in results[way.key, state]]
                for way in group.ways
                if (way.key, state) in results
            }
            reference = next((way.name for way in group.ways if way.key == group.reference), "")
            if seconds:
                base = reference if reference in seconds else next(iter(seconds))
                sections.append(build_section(f"{group.title}, {state}", base, seconds))
    return sections


def _targets(
    bounds: tuple[Bound, ...], groups: Sequence[Group], results: Mapping[tuple[str, str], list[Loaded]]
) -> list[Target]:
    from omni.bench.load_ways import MAX_MEMORY, judge
    from omni.bench.report import build_target

    seconds = {place: [run.seconds for run in runs] for place, runs in results.items()}
    targets = [build_target(name, ratio, b.limit, "x", b.at_most) for name, ratio, b in judge(bounds, seconds)]
    ways = {way.key: way for group in groups for way in group.ways}
    for key, way in ways.items():
        runs = [run for (name, _), found in results.items() if name == key for run in found]
        if way.job["way"] == "omni" and runs:
            peak = max(run.memory.peak_bytes / run.num_bytes for run in runs)
            targets.append(build_target(f"peak memory over weights, {_full_name(way)}", peak, MAX_MEMORY, "x"))
    return targets


def _table(groups: Sequence[Group], results: Mapping[tuple[str, str], list[Loaded]]) -> Table:
    """Rates, and the memory of each row's process beside what its imports take."""
    from omni.bench.report import Table

    def gib(values: list[int | None]) -> float | None:
        known = [value for value in values if value is not None]
        return max(known) / 2**30 if known else None

    rows: dict[str, tuple[float | None, ...]] = {}
    for way in {way.key: way for group in groups for way in group.ways}.values():
        rates = [
            median(run.num_bytes / run.seconds for run in runs) / 1e9
            if (runs := results.get((way.key, state)))
            else None
            for state in ("warm", "cold")
        ]
        runs = [run for state in ("warm", "cold") for run in results.get((way.key, state), ())]
        if runs:
            peak = max(run.memory.peak_bytes for run in runs)
            rows[_full_name(way)] = (
                *rates,
                peak / 2**30,
                peak / runs[0].num_bytes,
                gib([run.memory.anonymous_bytes for run in runs]),
                gib([run.memory.file_bytes for run in runs]),
                gib([run.memory.shared_bytes for run in runs]),
            )
    columns = ("warm GB/s", "cold GB/s", "peak GiB", "x weights", "own GiB", "mapped GiB", "shared GiB")
    return Table(title="rate, and main memory at the peak and in the end", columns=columns, rows=rows)


def _full_name(way: Way) -> str:
    return f"{way.name} ({way.key})"
