"""Why a memory plan is as it is, and why there is none: sentences with the numbers."""

from __future__ import annotations

from omni.memory import MemoryPlan
from omni.memory_layouts import CONTEXT_BYTES, Chooser, Layout
from omni.sizes import format_bytes

REMEDY = "raise offload.vram, use a larger GPU, a smaller dtype or model, or ask for fewer pixels"


def sizes(chooser: Chooser) -> str:
    """Weights and activations, for messages."""
    activations = max((part.use.activation_bytes for part in chooser.parts), default=0)
    text = f"{format_bytes(sum(part.weight_bytes for part in chooser.parts))} of weights"
    return text + (f" and {format_bytes(activations)} of activations" if activations else "")


def refusal(chooser: Chooser) -> str:
    """Why nothing fits, with the numbers and what to do."""
    policy = chooser.offload.policy
    all_modes = list(chooser.candidates())
    if policy == "component" and not all_modes:
        return "offload.policy: component needs several components, and this model is one: say layerwise"
    if not all_modes:
        return f"offload.policy: {policy} needs repeated blocks, and the model has none that can be streamed"
    asked = "" if policy == "auto" else f"offload.policy: {policy} does not fit: "
    least = min(chooser.peak(modes) for modes, _ in all_modes) + CONTEXT_BYTES
    host = min(chooser.host_bytes(modes, source) for modes, source in all_modes)
    if chooser.budget and least > chooser.budget:
        return (
            f"{asked}{sizes(chooser)} need at least {format_bytes(least)} of GPU memory, the CUDA context included, "
            f"and there are {format_bytes(chooser.budget)}: "
            + (f"say offload.policy: auto, or {REMEDY}" if policy != "auto" and chooser.may_offload else REMEDY)
        )
    if chooser.room.host_bytes and host > chooser.room.host_bytes:
        return (
            f"{asked}with the weights that wait there the process takes {format_bytes(host)} of host memory, and there "
            f"are {format_bytes(chooser.room.host_bytes)}: say offload.policy: disk"
        )
    return (
        f"{asked}{format_bytes(chooser.resident or 0)} of resident blocks (offload.resident) are too many beside "
        f"{format_bytes(least)} for all else in {format_bytes(chooser.budget)}: lower offload.resident, or drop it"
    )


def reason(layout: Layout, chooser: Chooser) -> str:
    """Why the layout was taken: what does not fit, what is copied instead, and what the other way would cost."""
    asked = "" if chooser.offload.policy == "auto" or not chooser.may_offload else "as offload.policy says; "
    if all(mode == "stay" for mode in layout.modes):
        if not chooser.budget:
            return f"{asked}{sizes(chooser)}; the GPU's memory is not known, so all of it stays there"
        return f"{asked}{sizes(chooser)} fit in {format_bytes(chooser.budget)}"
    why = asked or f"{sizes(chooser)} do not fit in {format_bytes(chooser.budget)}; "
    return f"{why}{_deeds(layout, chooser)}{_alternative(layout, chooser)}"


def _deeds(layout: Layout, chooser: Chooser) -> str:
    """What is copied, how often, and what that costs at least."""
    turns = [part.name for part, mode in zip(chooser.parts, layout.modes, strict=True) if mode == "turn"]
    texts = []
    for part, mode, resident in zip(chooser.parts, layout.modes, layout.resident, strict=True):
        if mode == "stream":
            size, times = format_bytes(sum(part.blocks) - resident), part.use.num_runs
            texts.append(f"{size} of {part.name} stream" + (f" {times} times" if times > 1 else " once"))
    if turns:
        texts.append(
            f"{', '.join(turns[:-1])}{' and ' * (len(turns) > 1)}{turns[-1]} take{'s' * (len(turns) == 1)} turns"
        )
    source = "from the checkpoint, since host memory is short" if chooser.offload.policy == "auto" else "from disk"
    where = f" {source}" if layout.source == "disk" else ""
    return f"{', '.join(texts)}{where}: {layout.seconds:.1f} s a request"


def _alternative(layout: Layout, chooser: Chooser) -> str:
    """The best way without streaming, or with it: the one that was not taken."""
    if chooser.offload.policy != "auto" or layout.source == "disk":
        return ""
    streams = "stream" in layout.modes
    others = [other for other in chooser.fitting if ("stream" in other.modes) != streams and other.seconds]
    name = "components in turn" if streams else "streaming"
    if others:
        return f" ({name}: {min(other.seconds for other in others):.1f} s)"
    if not streams:
        return ""
    turned = [modes for modes, source in chooser.candidates() if "stream" not in modes and "turn" in modes]
    if not turned:
        return ""
    needed = min(map(chooser.peak, turned)) + CONTEXT_BYTES
    return f" (components in turn would need {format_bytes(needed)})" if needed > chooser.budget else ""


def memory_note(memory: MemoryPlan | None) -> str:
    """A few words for a drawing; empty when there is nothing to say."""
    if memory is None or not memory.components:
        return ""
    if memory.room.device == "cpu":
        return f"{format_bytes(memory.peak_host_bytes)} host"
    how = "" if memory.policy == "none" else f", {memory.policy}"
    return f"{format_bytes(memory.peak_device_bytes)} GPU{how}"
