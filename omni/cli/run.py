"""Run a graph and write its outputs.

GRAPH is a YAML file, or a PNG that `omni run` wrote: the picture is made again from the graph, inputs and seed in its
metadata, with --set, --prompt, --input and --seed on top. Text and file names go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, get_args

from omni.choices import RunnerChoice
from omni.load_flags import add_load_flags

if TYPE_CHECKING:
    from omni.cli.execution import Outcome
    from omni.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni run`."""
    parser.add_argument("graph", metavar="GRAPH", help="a graph file, or a PNG written by omni run")
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("--prompt", metavar="TEXT", help="what to make; short for --input prompt=TEXT")
    inputs.add_argument(
        "--input",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an input of the graph: text, JSON, or a file for pictures, clips, sounds and tensors; "
        "given again for the same name, the values make a list",
    )
    inputs.add_argument(
        "--prompts", metavar="FILE", help="one prompt per line (- is stdin; blank lines and # are skipped)"
    )
    inputs.add_argument("--seed", metavar="N", type=int, help="makes the run repeatable; drawn at random when left out")
    inputs.add_argument("--n", metavar="N", type=int, default=1, help="runs per prompt, with seeds SEED, SEED+1, ...")
    inputs.add_argument(
        "--trust", action="store_true", help="run a picture whose graph names code, servers or keys of its own"
    )
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help="where to write (the suffix decides the format), or a folder; an existing file is replaced; "
        "left out: GRAPH-001.png and so on, never an existing name",
    )
    outputs.add_argument("--events", action="store_true", help="print every event as one line of JSON on stdout")
    outputs.add_argument("--quiet", "-q", action="store_true", help="no progress and no table")
    how = parser.add_argument_group("how to run")
    how.add_argument(
        "--set", metavar="PATH=VALUE", action="append", default=[], help="change the graph: stages.draw.call.height=512"
    )
    how.add_argument("--runner", choices=get_args(RunnerChoice), default="auto", help="override the planner's choice")
    how.add_argument("--hardware", metavar="NAME", help="plan for a preset or inventory file instead of this machine")
    how.add_argument("--address", metavar="ADDRESS", help="an existing Ray cluster (or set RAY_ADDRESS)")
    add_load_flags(how)


def command(args: argparse.Namespace) -> int:
    """Run; the exit code is 1 when a request failed."""
    import asyncio

    from omni.cli.execution import Execution
    from omni.cli.interrupt import Interrupts
    from omni.cli.job import prepare
    from omni.cli.progress import open_view

    with Interrupts() as interrupts:
        with open_view(args.quiet, sys.stderr) as view:
            execution = Execution(view, args.events)
            job = prepare(args, execution.loading)
            try:
                outcomes = asyncio.run(interrupts.guard(execution.run(job)))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
        return _report(args, outcomes, job.omni.plan)


def _report(args: argparse.Namespace, outcomes: list[Outcome], plan: Plan) -> int:
    """Print texts, paths, failures and the tables."""
    from omni.cli.summary import print_tables

    for outcome in outcomes:
        if not args.events:
            print(*outcome.texts, *outcome.files, sep="\n", end="\n" if outcome.texts or outcome.files else "")
        if outcome.error is not None:
            print(f"omni run: {outcome.label}{outcome.error}", file=sys.stderr)
            if args.verbose and (details := outcome.details or getattr(outcome.error, "details", "")):
                print(details, file=sys.stderr)
    done = [outcome for outcome in outcomes if outcome.timings is not None]
    if done and not args.quiet:
        print_tables([o.timings for o in done if o.timings], [o.seed for o in done], plan, sys.stderr)
    return 1 if any(outcome.error for outcome in outcomes) else 0
