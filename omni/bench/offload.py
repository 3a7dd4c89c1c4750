"""Denoise steps with weights that leave the device: Omni's offload policies against diffusers', in fresh processes.

MODEL is the folder of a denoiser, or of a pipeline with one, as `omni models random` writes it. Each row loads it, sets
its way to offload up, and takes steps on random inputs; outputs must be equal to the last bit. The floor of a step is
the resident one, or the time that its weights take over the link, whichever is longer. Without a GPU, host memory plays
one: copies and outputs are checked, and times say nothing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from omni.bench.offload_rows import Offloaded
    from omni.bench.report import Report, Section, Table, Target

LOAD_POLICY = "stages.policies.load"
OFFLOAD_POLICY = "stages.policies.offload.apply"
"""Modules of Omni's policies."""
DEFAULT_SIZES = "1024x1024,2048x2048"
MAX_STEP = 1.03
MAX_SETUP = 1.1
MAX_MEMORY = 1.05
MIN_SWAP = 0.9
GIB = 2**30
ONE_RUN = "once"


class Row(msgspec.Struct, frozen=True):
    """One way to keep the weights."""

    name: str
    fields: dict[str, Any]
    """Of an offload_rows.Job."""
    needs_gpu: bool = False
    is_omni: bool = False


ROWS: dict[str, Row] = {
    "resident": Row("resident", {"way": "resident"}),
    "full": Row("Omni, layerwise", {"way": "layerwise"}, is_omni=True),
    "half": Row("Omni, layerwise, half resident", {"way": "layerwise", "resident_share": 0.5}, is_omni=True),
    "component": Row("Omni, component", {"way": "component"}, is_omni=True),
    "group": Row("diffusers, group offload by block", {"way": "group"}, needs_gpu=True),
    "leaf": Row("diffusers, group offload by leaf", {"way": "leaf"}, needs_gpu=True),
    "hook": Row("diffusers, model CPU offload", {"way": "hook"}, needs_gpu=True),
}
"""Key for --only -> row."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni bench offload`."""
    parser.add_argument("model", metavar="MODEL", help="folder of a denoiser, or of a pipeline with one")
    parser.add_argument(
        "--sizes",
        metavar="WxH[xF],...",
        default=DEFAULT_SIZES,
        help=f"pixels, and frames of a clip (default: {DEFAULT_SIZES})",
    )
    parser.add_argument("--steps", metavar="N", type=int, default=5, help="steps of each size and row (default: 5)")
    parser.add_argument("--threads", metavar="N", type=int, default=4, help="reader threads (default: 4)")
    parser.add_argument("--device", metavar="NAME", default="auto", help="cpu, cuda or cuda:N (default: a GPU, if any)")
    parser.add_argument("--only", metavar="ROW,...", default="", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--variant", metavar="NAME", help="of the weight files, such as fp16")


def measure(args: argparse.Namespace) -> Report:
    """Run the bench. Raises UsageError when the model or an argument is not fit."""
    from omni.bench.checkpoints import find_device, main_dtype, weight_bytes
    from omni.bench.offload_rows import Job, Offloaded
    from omni.bench.turns import Turn, choose, take_turns
    from omni.errors import UsageError

    if args.steps < 1 or args.threads < 1:
        raise UsageError("--steps and --threads must be at least 1")
    sizes = _parse_sizes(args.sizes)
    component, device = _find_denoiser(Path(args.model), args.variant), find_device(args.device)
    dtype = main_dtype([component])
    keys = choose(args.only, {"all": list(ROWS)})
    left_out = [key for key in keys if ROWS[key].needs_gpu and device == "cpu"]
    fields = {"link": {"way": "link"}, **{key: ROWS[key].fields for key in ROWS if key in keys - set(left_out)}}
    common = {
        "component": component,
        "dtype": dtype,
        "device": device,
        "sizes": sizes,
        "steps": args.steps,
        "threads": args.threads,
        "load_policy": LOAD_POLICY,
        "offload_policy": OFFLOAD_POLICY,
    }
    turns = [
        Turn(key, ONE_RUN, ROWS[key].name if key in ROWS else "link", Job(**common, **more))
        for key, more in fields.items()
    ]
    results, failures = take_turns("omni.bench.offload_rows:run", turns, 1, Offloaded)
    rows = {key: results[key, ONE_RUN][0] for key in ROWS if (key, ONE_RUN) in results}
    if not rows or ("link", ONE_RUN) not in results:
        raise UsageError("no row could be measured: " + "; ".join(f"{row}: {why}" for row, why in failures.items()))
    settings = {
        "model": args.model,
        "bytes": weight_bytes([component]),
        "denoiser": component.class_name,
        "dtype": dtype,
        "device": device,
        "steps": args.steps,
        "threads": args.threads,
    }
    notes = [f"{ROWS[key].name}: left out, it needs a GPU" for key in ROWS if key in left_out]
    notes += [f"{label}: FAILED: {why}" for label, why in failures.items()]
    if device == "cpu":
        notes.insert(0, "no GPU: host memory plays one, and times and memory say nothing")
    is_whole = not any(row.is_omni and row.name in failures for row in ROWS.values())
    link = results["link", ONE_RUN][0].link_rate
    return _report(settings, [_size_name(size) for size in sizes], rows, link, notes, is_whole)


def _parse_sizes(text: str) -> tuple[tuple[int, int, int], ...]:
    """`1024x1024,832x480x81` as width, height and frames."""
    from omni.errors import UsageError

    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", part.strip())
        if found is None:
            raise UsageError(
                f"--sizes {part}: write width and height, such as 1024x1024, and frames of a clip, 832x480x81"
            )
        sizes.append((int(found[1]), int(found[2]), int(found[3] or 1)))
    return tuple(sizes)


def _size_name(size: tuple[int, int, int]) -> str:
    width, height, num_frames = size
    return f"{width}x{height}" + (f"x{num_frames}" if num_frames > 1 else "")


def _find_denoiser(folder: Path, variant: str | None) -> Any:
    """The first component whose class has builders of inputs."""
    from omni.bench.checkpoints import read_components
    from omni.errors import UsageError
    from omni.models.denoiser_inputs import BUILDERS

    components = read_components(folder, variant)
    for component in components:
        if component.class_name in BUILDERS:
            return component
    names = ", ".join(component.class_name for component in components)
    raise UsageError(f"{folder}: holds {names}, and no denoiser of the classes {', '.join(BUILDERS)}")


def _report(
    settings: dict[str, Any],
    sizes: list[str],
    rows: Mapping[str, Offloaded],
    link: float,
    notes: list[str],
    is_whole: bool,
) -> Report:
    from omni.bench.report import Report, describe_machine

    on_gpu = settings["device"] != "cpu"
    machine = describe_machine(("torch", "diffusers"))
    if on_gpu:
        import torch

        machine["GPU"] = torch.cuda.get_device_name(settings["device"])
    correct, found = _compare(rows, sizes)
    return Report(
        bench="offload",
        settings=settings,
        machine={**machine, "link": f"{link / 1e9:.1f} GB/s"},
        sections=tuple(_sections(rows, sizes)),
        targets=tuple(_targets(rows, sizes, link, on_gpu)),
        correct=correct and is_whole,
        notes=(*found, *notes),
        tables=(_step_table(rows, sizes, link), _memory_table(rows)),
    )


def _compare(rows: Mapping[str, Offloaded], sizes: list[str]) -> tuple[bool, list[str]]:
    """Whether Omni's rows gave the resident row's outputs (or each other's, without one), and what to say of it."""
    correct, notes = True, []
    reference = next(iter(rows))
    for number, size in enumerate(sizes):
        steps = {key: row.steps[number] for key, row in rows.items()}
        wrong = [key for key, step in steps.items() if step.digest != steps[reference].digest or not step.is_sound]
        correct = correct and not any(ROWS[key].is_omni or key == reference for key in wrong)
        others = ", ".join(ROWS[key].name for key in wrong)
        notes.append(f"outputs equal, {size}: {f'NO: {others}' if wrong else 'yes'}")
    return correct, notes


def floor_seconds(rows: Mapping[str, Offloaded], number: int, key: str, link: float) -> float | None:
    """The least that a step of a row could take: the resident step, or its copies; None without a resident row."""
    if "resident" not in rows:
        return None
    compute = median(rows["resident"].steps[number].seconds)
    return max(compute, (rows[key].steps[number].bytes_in or 0.0) / link)


def _sections(rows: Mapping[str, Offloaded], sizes: list[str]) -> list[Section]:
    from omni.bench.report import build_section

    reference = ROWS[next(iter(rows))].name
    sections = [
        build_section(
            f"one denoise step, {size}", reference, {ROWS[k].name: r.steps[n].seconds for k, r in rows.items()}
        )
        for n, size in enumerate(sizes)
    ]
    swaps = {ROWS[key].name: row.swap_seconds for key, row in rows.items() if row.swap_seconds}
    if swaps:
        sections.append(build_section("all weights to the device, and away again", next(iter(swaps)), swaps))
    return sections


def _targets(rows: Mapping[str, Offloaded], sizes: list[str], link: float, on_gpu: bool) -> list[Target]:
    from omni.bench.report import build_target

    targets = []
    if "component" in rows:
        copied = float(rows["component"].bytes_out or 0)
        targets.append(build_target("weights copied back by component", copied, 0.0, "bytes"))
    if not on_gpu:
        return targets
    for key in ("full", "half"):
        for number, size in enumerate(sizes if key in rows else []):
            if (floor := floor_seconds(rows, number, key, link)) is not None:
                ratio = median(rows[key].steps[number].seconds) / floor
                targets.append(build_target(f"{ROWS[key].name}, step over floor, {size}", ratio, MAX_STEP, "x"))
        if key in rows:
            row = rows[key]
            ready = (row.load_seconds + row.setup_seconds) / row.load_seconds
            targets.append(build_target(f"{ROWS[key].name}, load and set-up over load", ready, MAX_SETUP, "x"))
    if "component" in rows:
        row = rows["component"]
        rate = row.weight_bytes / median(row.swap_seconds)
        targets.append(build_target("component's swap over link", rate / link, MIN_SWAP, "x", False))
    for key, row in rows.items():
        if ROWS[key].is_omni and (taken := host_bytes(row)) is not None:
            targets.append(build_target(f"{ROWS[key].name}, host memory", taken / row.weight_bytes, MAX_MEMORY, "x"))
    return targets


def host_bytes(row: Offloaded) -> float | None:
    """Main memory that holds weights in the end: the process's own and shared pages, or what torch has pinned.

    Where the system does not tell pages apart, it is the peak of all.
    """
    if row.memory is None:
        return None
    own, shared = row.memory.anonymous_bytes, row.memory.shared_bytes
    return max(row.memory.peak_bytes if own is None else own + (shared or 0), row.pinned_bytes)


def _step_table(rows: Mapping[str, Offloaded], sizes: list[str], link: float) -> Table:
    from omni.bench.report import Table

    table: dict[str, tuple[float | None, ...]] = {}
    for number, size in enumerate(sizes):
        for key, row in rows.items():
            step, floor = row.steps[number], floor_seconds(rows, number, key, link)
            streamed = step.bytes_in / GIB if step.bytes_in is not None else None
            over = median(step.seconds) / floor if floor and (step.bytes_in is not None or key == "resident") else None
            table[f"{ROWS[key].name}, {size}"] = (step.copies_in, streamed, floor and floor * 1000, over)
    return Table(title="a step's copies and floor", columns=("copies in", "GiB in", "floor ms", "x floor"), rows=table)


def _memory_table(rows: Mapping[str, Offloaded]) -> Table:
    from omni.bench.report import Table

    def gib(value: float | None) -> float | None:
        return value / GIB if value is not None else None

    table: dict[str, tuple[float | None, ...]] = {}
    for key, row in rows.items():
        taken = host_bytes(row)
        table[ROWS[key].name] = (
            row.load_seconds,
            row.setup_seconds,
            row.steps[0].first_seconds,
            gib(row.device_bytes),
            gib(row.peak_allocated_bytes),
            gib(row.peak_reserved_bytes),
            gib(taken),
            taken / row.weight_bytes if taken is not None else None,
            gib(row.bytes_out),
        )
    columns = (
        "load s",
        "set-up s",
        "first step",
        "slots GiB",
        "GPU GiB",
        "reserved",
        "host GiB",
        "x weights",
        "GiB out",
    )
    return Table(title="set-up, and memory of GPU and host", columns=columns, rows=table)
