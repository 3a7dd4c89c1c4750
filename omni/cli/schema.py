"""Print the JSON Schema of graph files, so that editors complete and check them."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `omni schema`."""
    parser.add_argument("--markdown", action="store_true", help="print the keys as Markdown tables instead")


def command(args: argparse.Namespace) -> int:
    """Print the schema."""
    from omni.schema import graph_schema, key_tables

    if args.markdown:
        print(key_tables())
        return 0
    import json

    print(json.dumps(graph_schema(), indent=2))
    return 0
