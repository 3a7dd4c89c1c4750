"""Check graph files without loading anything: keys, values, edges, types and cycles.

Prints one line for each good file, and one line for each mistake of the others, as compilers do. Exit code 2 when
there is any mistake. Modules of functions that a graph names are imported, to read their type hints.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `omni validate`."""
    parser.add_argument("graphs", metavar="GRAPH", nargs="+", help="YAML files")
    parser.add_argument(
        "--set",
        metavar="PATH=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="change a value of every file first, as in stages.draw.call.num_inference_steps=8; may be repeated",
    )


def command(args: argparse.Namespace) -> int:
    """Print what is wrong; 0 when nothing is, else 2."""
    from omni.errors import GraphError
    from omni.load import load_graph

    code = 0
    for path in args.graphs:
        try:
            graph = load_graph(path, args.overrides).graph
        except GraphError as error:
            print(error)
            code = 2
            continue
        num_stages = f"{len(graph.order)} stage{'s' if len(graph.order) > 1 else ''}"
        print(f"{path}: ok: {num_stages}, outputs {', '.join(graph.outputs)}")
    return code
