"""What a stage's weights take and where they live: the memory part of a plan, which the stage carries out."""

from __future__ import annotations

from typing import Literal

import msgspec

Policy = Literal["none", "component", "layerwise", "disk"]


class ComponentMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One component's weights, in bytes as they are loaded."""

    name: str
    weight_bytes: int
    device_bytes: int
    """Weights that stay on the device for as long as the stage lives."""
    streamed_bytes: int = 0
    """Weights copied to the device each time the component runs (a denoise step, for a denoiser)."""
    slot_bytes: int = 0
    """Device memory through which streamed weights pass."""
    place: str = "device"
    """For people: `device`, `host, in turn`, `host, streamed`, `disk, streamed`."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage does with its weights, what that takes, and why."""

    policy: Policy
    components: tuple[ComponentMemory, ...] = ()
    budget_bytes: int = 0
    """Device memory that the stage may take; 0 when unknown."""
    activation_bytes: int = 0
    """Estimate of what a request takes beside the weights; a first request corrects it."""
    peak_device_bytes: int = 0
    peak_host_bytes: int = 0
    load_seconds: float = 0.0
    step_seconds: float = 0.0
    """Floor of a denoise step: streamed bytes over the rate of the link; 0 when nothing is streamed."""
    reason: str = ""
