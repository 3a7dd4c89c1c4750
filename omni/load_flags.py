"""The flags about loading weights, for every command that starts a graph: they set `load` of each stage that has it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omni.errors import UsageError

THREADS, DISABLE = "--num-weight-load-threads", "--disable-multithread-weight-load"


def add_load_flags(parser: Any) -> None:
    """Add the flags to a parser or to a group of one."""
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(THREADS, metavar="N", type=int, help="threads that read weights: load.threads of every stage")
    ways.add_argument(
        DISABLE, action="store_true", help="load as the libraries do by themselves: load.enabled=false for every stage"
    )


def with_load_flags(
    args: argparse.Namespace, graph: str | Path | dict[str, Any], base_dir: str | None = None
) -> list[str]:
    """The overrides that `args` ask for: those of `--set`, and on top those of the flags.

    Raises UsageError, and GraphError when the graph is wrong.
    """
    from omni.load import load_graph

    overrides = list(args.set)
    threads, disable = args.num_weight_load_threads, args.disable_multithread_weight_load
    if threads is None and not disable:
        return overrides
    if threads is not None and threads < 1:
        raise UsageError(f"{THREADS} {threads}: must be at least 1")
    change = "enabled=false" if disable else f"threads={threads}"
    stages = load_graph(graph, overrides, base_dir).spec.stages
    return overrides + [f"stages.{name}.load.{change}" for name, stage in stages.items() if hasattr(stage, "load")]
