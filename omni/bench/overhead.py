"""One request through Omni inline against the same bare diffusers call, in one process, turn by turn.

GRAPH has one text-to-image diffusion stage. Both sides load the same folder into a pipeline of their own and draw the
same random prompts and seeds; the pixels must be equal. The bare call runs in the same thread as Omni's: torch keeps a
pool of kernel threads per calling thread, and two pools would compete for the cores and slow both sides down. The bare
call is measured twice, and the difference between the two is what the machine's noise alone makes.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from omni.load_flags import add_load_flags, with_load_flags

if TYPE_CHECKING:
    from omni.api import Omni
    from omni.bench.report import Report, Target
    from omni.spec import DiffusionSpec

DEFAULT_GRAPH = "configs/draw.yaml"
SIZES = ("tiny", "small", "large", "huge")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
SHAPES = ("circle", "square", "triangle", "star")
MAX_MS = 5.0
MAX_PERCENT = 1.0
BARE, AGAIN, OMNI = "bare diffusers", "bare diffusers, again", "Omni inline"
SIDES = (BARE, AGAIN, OMNI)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni bench overhead`."""
    parser.add_argument("graph", metavar="GRAPH", nargs="?", default=DEFAULT_GRAPH, help=f"default: {DEFAULT_GRAPH}")
    parser.add_argument("--repeat", metavar="N", type=int, default=20, help="measured runs of each side (default: 20)")
    parser.add_argument("--warmup", metavar="N", type=int, default=3, help="runs that do not count (default: 3)")
    parser.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="change the graph")
    add_load_flags(parser)


def measure(args: argparse.Namespace) -> Report:
    """Run the bench. Raises UsageError when the graph is not a single text-to-image stage."""
    from omni.api import Omni
    from omni.errors import UsageError
    from omni.runner.inline import InlineRunner
    from omni.stage import ThreadedStage

    if args.repeat < 1 or args.warmup < 0:
        raise UsageError("--repeat must be at least 1 and --warmup at least 0")
    omni = Omni(args.graph, overrides=with_load_flags(args, args.graph), runner="inline")
    spec = single_stage(omni)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    correct = True
    with omni:
        assert isinstance(omni.runner, InlineRunner)
        stage = omni.runner.stage(omni.plan.stages[0].stage)
        assert isinstance(stage, ThreadedStage)
        bare = stage.submit(_load_bare, omni, spec).result()
        for turn in range(args.warmup + args.repeat):
            prompt, seed = random_prompt(), random.randrange(2**32)
            images = {}
            for name in random.sample(SIDES, len(SIDES)):
                cpu_begin = time.process_time()
                if name != OMNI:
                    took, images[name] = stage.submit(_time_bare, bare, spec.call, prompt, seed).result()
                else:
                    took, images[name] = _time_omni(omni, prompt, seed)
                if turn >= args.warmup:
                    seconds[name].append(took)
                    cpu_seconds[name].append(time.process_time() - cpu_begin)
            correct = correct and _equal(images[BARE], images[OMNI])
    return _report(args, seconds, cpu_seconds, correct)


def single_stage(omni: Omni) -> DiffusionSpec:
    """The spec of the graph's only stage. Raises UsageError when it does not make pictures."""
    from omni.errors import UsageError
    from omni.spec import DiffusionSpec

    specs = list(omni.graph.spec.stages.values())
    outputs = [omni.graph.ports[source.stage].outputs[source.port].type for source in omni.graph.outputs.values()]
    if len(specs) != 1 or not isinstance(specs[0], DiffusionSpec) or "image" not in outputs[0]:
        raise UsageError("this bench needs a graph with a single stage, of kind diffusion, that makes pictures")
    return specs[0]


def _load_bare(omni: Omni, spec: DiffusionSpec) -> Any:
    """The same class from the same folder with the same dtype, loaded as diffusers' documentation does it."""
    import diffusers

    from omni.model_paths import resolve_model_path
    from omni.registry import import_string

    device = omni.plan.stages[0].device
    dtype = import_string("stages.diffusion.build:choose_dtype")(spec, device)
    loader = getattr(diffusers, spec.pipeline or "DiffusionPipeline")
    options = {"revision": spec.revision, "variant": spec.variant, "trust_remote_code": spec.trust_remote_code}
    given = {name: value for name, value in options.items() if value}
    pipeline = loader.from_pretrained(
        resolve_model_path(spec.model, omni.graph.base_dir), dtype=dtype, use_safetensors=True, **given
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _time_bare(pipeline: Any, call: dict[str, Any], prompt: str, seed: int) -> tuple[float, Any]:
    import torch

    begin = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(seed)
    images = pipeline(**{**call, "prompt": prompt, "generator": generator}).images
    return time.perf_counter() - begin, images


def _time_omni(omni: Omni, prompt: str, seed: int) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = omni.generate(prompt=prompt, seed=seed)
    return time.perf_counter() - begin, next(iter(result.outputs.values()))


def random_prompt() -> str:
    """A prompt that the small painter understands."""
    pick = random.choice
    return f"a {pick(SIZES)} {pick(COLOURS)} {pick(SHAPES)} on a {pick(COLOURS)} background"


def _equal(ours: list[Any], theirs: list[Any]) -> bool:
    import numpy as np

    return len(ours) == len(theirs) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True)
    )


def _targets(seconds: dict[str, list[float]]) -> tuple[Target, ...]:
    from omni.bench.report import build_target

    base = median(seconds[BARE])
    added = {
        "difference of medians": median(seconds[OMNI]) - base,
        "median of paired differences": _paired(seconds, OMNI),
    }
    return tuple(
        target
        for name, value in added.items()
        for target in (
            build_target(f"added, {name}", value * 1000, MAX_MS, "ms"),
            build_target(f"added, {name}", value / base * 100, MAX_PERCENT, "%"),
        )
    )


def _paired(seconds: dict[str, list[float]], name: str) -> float:
    """Median over the turns of what `name` took longer than the bare call."""
    return median(ours - bare for ours, bare in zip(seconds[name], seconds[BARE], strict=True))


def _noise(seconds: dict[str, list[float]]) -> str:
    medians = (median(seconds[AGAIN]) - median(seconds[BARE])) * 1000
    return f"noise, bare against itself: {medians:+.1f} ms by medians, {_paired(seconds, AGAIN) * 1000:+.1f} ms paired"


def _report(
    args: argparse.Namespace, seconds: dict[str, list[float]], cpu_seconds: dict[str, list[float]], correct: bool
) -> Report:
    import torch

    from omni.bench.report import Report, build_section, describe_machine

    machine = describe_machine(("torch", "diffusers"))
    machine["torch threads"] = str(torch.get_num_threads())
    ray = "yes" if "ray" in sys.modules else "no"
    return Report(
        bench="overhead",
        settings={"graph": args.graph, "repeat": args.repeat, "warmup": args.warmup},
        machine=machine,
        sections=(
            build_section("one request", BARE, seconds),
            build_section("CPU time of one request, all threads", BARE, cpu_seconds),
        ),
        targets=_targets(seconds),
        correct=correct,
        notes=(_noise(seconds), f"pixels equal: {'yes' if correct else 'NO'}", f"ray imported: {ray}"),
    )
