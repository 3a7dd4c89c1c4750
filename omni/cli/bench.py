"""Measure this installation against its rivals, in the same run.

Every bench prints medians and ratios, and whether Omni's target was met. Inputs are random. The exit code is 1 when a
result was wrong (pixels that differ), never when a machine is slow.
"""

from __future__ import annotations

import argparse
import importlib

BENCHES = {
    "overhead": "one request through Omni inline against the same bare diffusers call",
    "batch": "several requests at once against the same ones one after another",
    "load": "weights from files to the device or host memory, against diffusers and raw reads",
    "offload": "denoise steps with weights that stream or take turns, against diffusers' offloading",
    "hop": "a tensor from one Ray actor to another through Omni against other ways to carry it",
    "abort": "how soon a stage is free after an abort, over HTTP, against one of its steps",
    "serve": "omni serve under load: latency, requests per second, memory",
}
"""Name -> one line of help; each is a module of omni.bench with `add_arguments(parser)` and `measure(args)`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni bench`."""
    subparsers = parser.add_subparsers(dest="bench", metavar="NAME", required=True)
    for name, text in BENCHES.items():
        module = importlib.import_module(f"omni.bench.{name}")
        subparser = subparsers.add_parser(name, help=text, description=module.__doc__)
        subparser.formatter_class = argparse.RawDescriptionHelpFormatter
        subparser.add_argument("--json", action="store_true", help="print the result as JSON, for machines")
        subparser.add_argument("--verbose", action="store_true", help="show tracebacks and logs")
        module.add_arguments(subparser)


def command(args: argparse.Namespace) -> int:
    """Run one bench and print its report."""
    from omni.bench.report import print_report

    report = importlib.import_module(f"omni.bench.{args.bench}").measure(args)
    print_report(report, args.json)
    return 0 if report.correct else 1
