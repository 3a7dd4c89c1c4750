"""What a stage's weights take and where they live: the memory part of a plan, which the stage carries out."""

from __future__ import annotations

from typing import Literal

import msgspec

Policy = Literal["none", "component", "layerwise", "disk"]
Place = Literal["device", "host, in turn", "host, streamed", "disk, in turn", "disk, streamed"]


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """How fast weights move, in bytes a second."""

    h2d_bytes_per_second: float = 25e9
    """From pinned host memory to one GPU."""
    page_cache_bytes_per_second: float = 43e9
    """From the page cache into memory, with as many threads as it takes."""
    disk_bytes_per_second: float = 2e9
    """From the disk, when the page cache has nothing of it."""


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage may take of its device and host."""

    device: Literal["cpu", "cuda"] = "cuda"
    device_bytes: int = 0
    """0: unknown, and taken to hold anything."""
    host_bytes: int = 0
    """0: unknown, and taken to hold anything."""
    links: Links = Links()


class ComponentUse(msgspec.Struct, frozen=True, kw_only=True):
    """How one component works in a request, as the kind of its stage knows it."""

    num_runs: int = 1
    """How often its forward runs."""
    calls_per_step: int = 1
    """Runs of each denoise step: two with classifier-free guidance in two calls."""
    activation_bytes: int = 0
    """Device memory that it takes at most while it runs, beside weights."""
    may_stream: bool = True
    """Its blocks run one after another, each once in a forward."""


class ComponentMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One component's weights, in bytes as they are loaded."""

    name: str
    weight_bytes: int
    device_bytes: int
    """Weights that stay on the device for as long as the stage lives."""
    streamed_bytes: int = 0
    """Weights copied to the device each time the component runs (a denoise step, for a denoiser); once a request when
    it takes turns."""
    slot_bytes: int = 0
    """Device memory through which streamed weights pass; all of the component when it takes turns."""
    place: Place = "device"
    num_copies: int = 0
    """How often a request copies the streamed weights."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage does with its weights, what that takes, and why."""

    policy: Policy
    components: tuple[ComponentMemory, ...] = ()
    """Empty when the checkpoint was not on this machine."""
    awaits_checkpoint: bool = False
    """Nothing is decided yet: the stage plans again, within `room`, once it has the checkpoint."""
    budget_bytes: int = 0
    """Device memory that the stage may take; 0 when unknown."""
    activation_bytes: int = 0
    """Estimate of what a request takes beside the weights; a first request corrects it."""
    context_bytes: int = 0
    """What CUDA and its libraries take beside all that torch allocates."""
    peak_device_bytes: int = 0
    """Weights, slots and activations at once: what torch allocates at most."""
    peak_host_bytes: int = 0
    """Memory of the process at most."""
    load_seconds: float = 0.0
    """From the page cache."""
    cold_load_seconds: float = 0.0
    """From the disk."""
    step_seconds: float = 0.0
    """Floor of a denoise step (a token, for a language model): streamed bytes over the rate of the link; 0 when
    nothing is streamed."""
    copy_seconds: float = 0.0
    """All weights that a request copies, over the rate of the link."""
    shares_host: bool = False
    """Another stage on the same host keeps the same weights there: they have one copy."""
    room: Room = Room()
    """What it was planned for."""
    reason: str = ""

    def moves(self, component: str) -> bool:
        """Whether some weights of a component come to the device only when they are needed."""
        planned = next((part for part in self.components if part.name == component), None)
        if planned is None:
            return self.policy != "none"
        return planned.device_bytes < planned.weight_bytes
