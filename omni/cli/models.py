"""Make models to try Omni with.

`omni models random` writes a model with random weights in the shape of a released one, so that loading, offloading and
speed can be measured without a download.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

CONFIGS = ("qwen-image", "flux", "sd3.5", "z-image", "wan2.2", "ltx-2")
"""omni.models.stock.STOCK, which takes long to import; tests compare them."""
SCALES = ("full", "small", "tiny")
"""omni.models.stock.SCALES."""
DTYPES = ("bfloat16", "float16", "float32")
RANDOM = """Write a diffusers model, or a whole pipeline, with random weights in the shape of a released one.

The folder loads with from_pretrained and has the tensors of the real checkpoint, in as many files. The numbers are
normal, none is constant (gates that training starts at zero are not zero either), and depend on --seed alone. No more
than one file's weights are in memory at a time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni models`."""
    subparsers = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    subparser = subparsers.add_parser("random", help="write a model with random weights", description=RANDOM)
    subparser.formatter_class = argparse.RawDescriptionHelpFormatter
    subparser.add_argument("folder", metavar="DIR", help="where to write; made when it is not there")
    subparser.add_argument("--config", metavar="NAME", choices=CONFIGS, required=True, help=", ".join(CONFIGS))
    subparser.add_argument(
        "--component",
        metavar="NAME",
        default="transformer",
        help="transformer (the default), another component, or all of the pipeline",
    )
    subparser.add_argument(
        "--scale",
        choices=SCALES,
        default="full",
        help="full: the released size; small: its widths with few layers; tiny: some MB",
    )
    subparser.add_argument(
        "--layers", metavar="N", type=int, help="depth of the denoiser; further stacks of it keep their proportion"
    )
    subparser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    subparser.add_argument("--shard-size", metavar="SIZE", default="5GB", help="largest file (default: 5GB)")
    subparser.add_argument("--seed", metavar="N", type=int, default=0, help="default: 0")
    subparser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    subparser.add_argument("--verbose", action="store_true", help="show tracebacks and logs")


def command(args: argparse.Namespace) -> int:
    """Write the model and say what it is."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from omni.errors import UsageError
    from omni.models.random_model import RandomModel, write_model
    from omni.sizes import format_bytes, parse_bytes

    shard_bytes = parse_bytes(args.shard_size)
    if shard_bytes < 1 or (args.layers is not None and args.layers < 1):
        raise UsageError("--shard-size and --layers must be at least 1")
    model = RandomModel(
        config=args.config,
        component=args.component,
        scale=args.scale,
        layers=args.layers,
        dtype=args.dtype,
        shard_bytes=shard_bytes,
        seed=args.seed,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task(f"write {args.config}", total=None)
        written = write_model(
            model, Path(args.folder), args.force, lambda done, total: bars.update(bar, completed=done, total=total)
        )
    print(
        f"{args.folder}: {args.config} {args.component}, {written.num_parameters / 1e9:.2f} B parameters, "
        f"{format_bytes(written.num_bytes)} in {written.num_files} files"
    )
    return 0
