"""A tensor from one Ray actor to another through Omni, against other ways to carry it, turn by turn in one run.

Large: a random tensor of --size against one memcpy into warm memory, Ray's own serialisation, and queues between
spawned processes. Small: 1 KB, where only latency counts. --size 900MB needs about 10 GB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omni.bench.carriers import Carrier
    from omni.bench.report import Report

SMALL_BYTES = 1024
MEMORY_FACTOR = 10
"""Memory that the large hops take at once, in sizes of the tensor."""
WARMUP_LARGE, WARMUP_SMALL = 2, 10
MAX_MEMCPYS = 1.3
MIN_PICKLES = 10.0
MAX_SMALL_MS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni bench hop`."""
    parser.add_argument("--size", metavar="SIZE", default="900MB", help="of the large tensor (default: 900MB)")
    parser.add_argument("--repeat", metavar="N", type=int, default=7, help="large hops of each way (default: 7)")
    parser.add_argument("--repeat-small", metavar="N", type=int, default=100, help="1 KB hops of each (default: 100)")


def measure(args: argparse.Namespace) -> Report:
    """Run the bench. Raises UsageError when the machine is too small."""
    from omni.api import Omni
    from omni.bench.carriers import GRAPH, MemcpyCarrier, OmniCarrier, QueueCarrier, RayCarrier
    from omni.bench.report import Report, build_section, build_target, describe_machine

    size = _check(args)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.ExitStack() as stack:
        omni = OmniCarrier(stack.enter_context(Omni(GRAPH, runner="ray")))
        rivals = [stack.enter_context(carrier) for carrier in (RayCarrier(), QueueCarrier(False), QueueCarrier(True))]
        copies = [MemcpyCarrier(1), *([MemcpyCarrier(num_cores)] if num_cores > 1 else [])]
        small, small_correct = _take_turns([omni, *rivals], SMALL_BYTES, args.repeat_small, WARMUP_SMALL)
        large, large_correct = _take_turns([omni, *copies, *rivals], size, args.repeat, WARMUP_LARGE)
    big = build_section(f"{args.size}, producer to consumer", copies[0].name, large)
    tiny = build_section("1 KB, producer to consumer", omni.name, small)
    ratio = {row.name: row.ratio for row in big.rows}
    slowest = rivals[1].name
    correct = small_correct and large_correct
    return Report(
        bench="hop",
        settings={"size": args.size, "size_bytes": size, "repeat": args.repeat, "repeat_small": args.repeat_small},
        machine=describe_machine(("ray", "torch")),
        sections=(big, tiny),
        targets=(
            build_target(f"{args.size} hop over {copies[0].name}", ratio[omni.name], MAX_MEMCPYS, "x"),
            build_target(f"{slowest} over {args.size} hop", ratio[slowest] / ratio[omni.name], MIN_PICKLES, "x", False),
            build_target("1 KB hop", tiny.rows[0].median_ms, MAX_SMALL_MS, "ms"),
        ),
        correct=correct,
        notes=(f"contents equal: {'yes' if correct else 'NO'}",),
    )


def _check(args: argparse.Namespace) -> int:
    """The large size in bytes, whole int64 numbers."""
    from omni.errors import UsageError
    from omni.sizes import format_bytes, parse_bytes

    size = parse_bytes(args.size) // 8 * 8
    if size < SMALL_BYTES or args.repeat < 1 or args.repeat_small < 1:
        raise UsageError(f"--size must be at least {SMALL_BYTES} bytes, --repeat and --repeat-small at least 1")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size * MEMORY_FACTOR > memory:
        need = format_bytes(size * MEMORY_FACTOR)
        raise UsageError(f"--size {args.size}: takes {need} of memory, and there are {format_bytes(memory)}")
    return size


def _take_turns(
    carriers: Sequence[Carrier], num_bytes: int, repeat: int, warmup: int
) -> tuple[dict[str, list[float]], bool]:
    """Seconds of each carrier's hops, every round in another order, and whether all contents were right."""
    seconds: dict[str, list[float]] = {carrier.name: [] for carrier in carriers}
    correct = True
    for turn in range(warmup + repeat):
        for carrier in random.sample(carriers, len(carriers)):
            took, equal = carrier.hop(num_bytes)
            correct = correct and equal
            if turn >= warmup:
                seconds[carrier.name].append(took)
    return seconds, correct
