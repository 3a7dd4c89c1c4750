"""Entry point of the `omni` command: parse, dispatch, turn errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage or graph, 130 interrupted. A user's mistake never prints a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import threading
import traceback
from typing import Any

COMMANDS = {
    "run": "run a graph and write its outputs",
    "serve": "serve graphs over HTTP: OpenAI's routes, jobs, a page",
    "plan": "show what would run where, and why",
    "validate": "check graph files without loading anything",
    "schema": "print the JSON Schema of graph files, for editors",
    "models": "write models with random weights, to measure and try with",
    "bench": "measure this installation against its rivals",
}
"""Name -> one line of help; each is a module of this package with `add_arguments(parser)` and `command(args)`."""


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import omni

        print(f"omni {omni.__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `omni` command with all its subcommands."""
    parser = argparse.ArgumentParser(prog="omni", description="Run graphs of generative models from YAML files.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"omni.cli.{name}")
        subparser = subparsers.add_parser(name, help=text, description=module.__doc__)
        subparser.formatter_class = argparse.RawDescriptionHelpFormatter
        subparser.add_argument("--verbose", action="store_true", help="show tracebacks and logs")
        module.add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = build_parser().parse_args(argv)
    from omni.errors import OmniError, UsageError

    try:
        module = importlib.import_module(f"omni.cli.{args.command}")
        code: int = module.command(args)
        return code
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the CLI edge: everything ends as one line and an exit code
        if args.verbose or not isinstance(error, OmniError):
            traceback.print_exc()
        if args.verbose and (details := getattr(error, "details", "")):
            print(details, file=sys.stderr)
        print(f"omni {args.command}: {error}", file=sys.stderr)
        return 1


def entry() -> None:
    """The console script: exit at once, also when a stage's thread is stuck in foreign code and cannot be joined."""
    code = main()
    if threading.active_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
