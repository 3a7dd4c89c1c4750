"""What `omni plan` says of memory: a row for each component, and a few lines for each stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from omni.cli.progress import format_seconds
from omni.memory import MemoryPlan
from omni.sizes import format_bytes

if TYPE_CHECKING:
    from omni.plan import Plan

COLUMNS = ("component", "weights", "on GPU", "copied a request", "slots", "lives")


def memory_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    """One row for each component of each stage that has a model, in the order of COLUMNS."""
    memories = {stage.stage: stage.memory for stage in plan.stages if stage.memory is not None}
    for name, memory in memories.items():
        prefix = f"{name}." if len(memories) > 1 else ""
        has_gpu = memory.room.device == "cuda"
        for part in memory.components:
            yield (
                f"{prefix}{part.name}",
                format_bytes(part.weight_bytes),
                format_bytes(part.device_bytes) if has_gpu and part.device_bytes else "-",
                f"{part.num_copies} x {format_bytes(part.streamed_bytes)}" if part.num_copies else "-",
                format_bytes(part.slot_bytes) if part.slot_bytes else "-",
                part.place if has_gpu else "host",
            )


def memory_lines(plan: Plan) -> Iterator[str]:
    """What each stage takes at most, how long it loads, and why."""
    for stage in plan.stages:
        if stage.memory is not None:
            yield f"{stage.stage}: {memory_line(stage.memory)}"


def memory_line(memory: MemoryPlan) -> str:
    """One stage's memory as a sentence."""
    if not memory.components:
        return memory.reason
    parts = [f"offload {memory.policy}"] if memory.room.device == "cuda" else []
    peaks = [f"{format_bytes(memory.peak_host_bytes)} of host memory"]
    if memory.room.device == "cuda":
        free = format_bytes(memory.activation_bytes)
        peaks.insert(0, f"{format_bytes(memory.peak_device_bytes)} of GPU memory ({free} of it for activations)")
    parts.append(f"peak {' and '.join(peaks)}")
    warm, cold = format_seconds(memory.load_seconds), format_seconds(memory.cold_load_seconds)
    parts.append(f"load at least {warm}, from a cold disk {cold}")
    if memory.step_seconds:
        parts.append(f"a step at least {format_seconds(memory.step_seconds)}")
    return f"{'; '.join(parts)}. Why: {memory.reason}"
