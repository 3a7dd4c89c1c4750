"""Several requests at once against the same ones one after another, on one diffusion stage.

GRAPH has one text-to-image diffusion stage. It is loaded twice: without step batching, and with it, as `batching` in
the graph says or for as many requests as there are. Each round draws the same random prompts and seeds with both, in
changing order. The requests of a round may take different numbers of steps (`--mixed`). The pictures must be equal to
the precision of the arithmetic: kernels choose their order of sums by the size of the batch.
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TYPE_CHECKING, Any

from omni.bench.overhead import DEFAULT_GRAPH, random_prompt, single_stage
from omni.load_flags import add_load_flags, with_load_flags

if TYPE_CHECKING:
    from omni.api import Omni
    from omni.bench.report import Report

MIN_GAIN = 1.5
MAX_LEVELS = 2
"""What pixels may differ by, of 255."""
SERIAL, BATCHED = "one after another", "at once, batched"
SIDES = (SERIAL, BATCHED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni bench batch`."""
    parser.add_argument("graph", metavar="GRAPH", nargs="?", default=DEFAULT_GRAPH, help=f"default: {DEFAULT_GRAPH}")
    parser.add_argument("--requests", metavar="N", type=int, default=8, help="requests in a round (default: 8)")
    parser.add_argument("--mixed", action="store_true", help="every other request takes half of the steps")
    parser.add_argument("--repeat", metavar="N", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--warmup", metavar="N", type=int, default=1, help="rounds that do not count (default: 1)")
    parser.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="change the graph")
    add_load_flags(parser)


def measure(args: argparse.Namespace) -> Report:
    """Run the bench. Raises UsageError when the graph is not a single text-to-image stage."""
    from omni.api import Omni
    from omni.errors import UsageError

    if args.repeat < 1 or args.warmup < 0 or args.requests < 1:
        raise UsageError("--repeat and --requests must be at least 1 and --warmup at least 0")
    overrides = with_load_flags(args, args.graph)
    given = Omni(args.graph, overrides=overrides, runner="inline")
    spec, name = single_stage(given), given.plan.stages[0].stage
    size = f"stages.{name}.batching.max_requests"
    batching = [] if spec.batching.max_requests > 1 else [f"{size}={args.requests}"]
    steps = int(spec.call.get("num_inference_steps", 20))
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu_seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    levels = 0
    alone = Omni(args.graph, overrides=[*overrides, f"{size}=1"], runner="inline")
    together = Omni(args.graph, overrides=[*overrides, *batching], runner="inline")
    with alone, together:
        for turn in range(args.warmup + args.repeat):
            requests = [_request(number, steps, args.mixed) for number in range(args.requests)]
            images = {}
            for side in random.sample(SIDES, len(SIDES)):
                begin, cpu_begin = time.perf_counter(), time.process_time()
                images[side] = _draw_in_turn(alone, requests) if side == SERIAL else _draw_at_once(together, requests)
                if turn >= args.warmup:
                    seconds[side].append(time.perf_counter() - begin)
                    cpu_seconds[side].append(time.process_time() - cpu_begin)
            levels = max(levels, _largest_difference(images[SERIAL], images[BATCHED]))
        counts = _counts(together, name)
    return _report(args, seconds, cpu_seconds, levels, counts)


def _request(number: int, steps: int, mixed: bool) -> dict[str, Any]:
    chosen = max(1, steps // 2) if mixed and number % 2 else steps
    return {"prompt": random_prompt(), "seed": random.randrange(2**32), "num_inference_steps": chosen}


def _draw_in_turn(omni: Omni, requests: list[dict[str, Any]]) -> list[Any]:
    return [_draw(omni, request) for request in requests]


def _draw_at_once(omni: Omni, requests: list[dict[str, Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: _draw(omni, request), requests))


def _draw(omni: Omni, request: dict[str, Any]) -> Any:
    return next(iter(omni.generate(**request).outputs.values()))[0]


def _largest_difference(ours: list[Any], theirs: list[Any]) -> int:
    import numpy as np

    return max(
        int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())
        for a, b in zip(ours, theirs, strict=True)
    )


def _counts(omni: Omni, name: str) -> tuple[int, int, int]:
    """Calls, forwards and the largest batch of the stage that batches."""
    from omni.runner.inline import InlineRunner

    assert isinstance(omni.runner, InlineRunner)
    stage: Any = omni.runner.stage(name)
    batches = stage.built.meeting.batches
    return batches.num_calls, batches.num_forwards, batches.largest


def _report(
    args: argparse.Namespace,
    seconds: dict[str, list[float]],
    cpu_seconds: dict[str, list[float]],
    levels: int,
    counts: tuple[int, int, int],
) -> Report:
    import torch

    from omni.bench.report import Report, build_section, build_target, describe_machine

    machine = describe_machine(("torch", "diffusers"))
    machine["torch threads"] = str(torch.get_num_threads())
    gains = [alone / together for alone, together in zip(seconds[SERIAL], seconds[BATCHED], strict=True)]
    calls, forwards, largest = counts
    return Report(
        bench="batch",
        settings={
            "graph": args.graph,
            "requests": args.requests,
            "mixed": args.mixed,
            "repeat": args.repeat,
            "warmup": args.warmup,
        },
        machine=machine,
        sections=(
            build_section(f"{args.requests} requests", SERIAL, seconds),
            build_section("CPU time of them, all threads", SERIAL, cpu_seconds),
        ),
        targets=(
            build_target(
                "throughput, by medians", median(seconds[SERIAL]) / median(seconds[BATCHED]), MIN_GAIN, "x", False
            ),
            build_target("throughput, median of rounds", median(gains), MIN_GAIN, "x", False),
        ),
        correct=levels <= MAX_LEVELS,
        notes=(
            f"largest difference of a pixel: {levels} of 255 (at most {MAX_LEVELS})",
            f"denoiser: {calls} calls in {forwards} forwards, {largest} at most in one",
        ),
    )
