"""Ways to lay out a stage's weights on a GPU and its host, and the quickest of those that fit. Pure arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import msgspec

from omni.memory import ComponentUse, Room
from omni.sizes import GIB, parse_bytes
from omni.spec import OffloadSpec

CONTEXT_BYTES = GIB
"""The CUDA context, the libraries' workspaces, and what torch's allocator holds without using it."""
PROCESS_BYTES = {"cpu": GIB // 2, "cuda": 3 * GIB}
"""Host memory of a process that has imported torch and diffusers, and started CUDA."""
MAX_SEARCHED = 6
"""The largest components, of which all combinations are tried; all others do the same, or planning would take long."""

Mode = Literal["stay", "turn", "stream"]
Source = Literal["host", "disk"]


class Part(msgspec.Struct, frozen=True):
    """A component as the arithmetic sees it; bytes as they are loaded."""

    name: str
    stored_bytes: int
    """In the checkpoint's files."""
    blocks: tuple[int, ...]
    """Of what can be streamed; empty when it cannot."""
    outside_bytes: int
    use: ComponentUse

    @property
    def weight_bytes(self) -> int:
        """All its weights."""
        return self.outside_bytes + sum(self.blocks)


class Layout(msgspec.Struct, frozen=True):
    """A way to do it that fits, and what it costs."""

    modes: tuple[Mode, ...]
    source: Source
    resident: tuple[int, ...]
    """Bytes of blocks that stay on the device, of each part that streams."""
    peak_bytes: int
    seconds: float
    """What a request spends on copies, at least."""


class Chooser:
    """Weighs the ways to lay out the weights of one stage on a GPU."""

    def __init__(
        self, parts: tuple[Part, ...], offload: OffloadSpec, room: Room, budget: int, may_offload: bool
    ) -> None:
        self.parts = parts
        self.offload = offload
        self.room = room
        self.budget = budget
        self.may_offload = may_offload
        self.resident = parse_bytes(offload.resident) if offload.resident is not None else None

    def choose(self) -> Layout | None:
        """The quickest layout that fits and that the spec's policy allows; None when none fits."""
        return min(self.fitting, key=lambda layout: layout.seconds, default=None)

    @cached_property
    def fitting(self) -> tuple[Layout, ...]:
        """All layouts that fit and are allowed; of equals, the simplest comes first."""
        found = (self.lay_out(modes, source) for modes, source in self.candidates())
        return tuple(layout for layout in found if layout is not None)

    def candidates(self) -> Iterator[tuple[tuple[Mode, ...], Source]]:
        """Modes of all parts, and where the weights wait that are not on the device."""
        policy, num_parts = self.offload.policy, len(self.parts)
        stay, turn = tuple[Mode, ...](["stay"] * num_parts), tuple[Mode, ...](["turn"] * num_parts)
        if policy in ("auto", "none") or not self.may_offload:
            yield stay, "host"
        if policy == "none" or not self.may_offload:
            return
        if policy == "component":
            if num_parts > 1:
                yield turn, "host"
            return
        sources: dict[str, tuple[Source, ...]] = {"auto": ("host", "disk"), "disk": ("disk",), "layerwise": ("host",)}
        for source in sources[policy]:
            for modes in self.combinations():
                if "stream" in modes or ("turn" in modes and not self.is_asked):
                    yield modes, source

    def combinations(self) -> Iterator[tuple[Mode, ...]]:
        """Modes of all parts: the largest ones each for itself, the others all alike."""
        by_size = sorted(range(len(self.parts)), key=lambda index: -self.parts[index].weight_bytes)
        searched, others = by_size[:MAX_SEARCHED], by_size[MAX_SEARCHED:]
        together: tuple[Mode, ...] = ("stay", "turn") if others and not self.streams_all else ("stay",)
        for *chosen, same in itertools.product(*(self.modes_of(self.parts[index]) for index in searched), together):
            modes = dict.fromkeys(others, same) | dict(zip(searched, chosen, strict=True))
            yield tuple(modes[index] for index in range(len(self.parts)))

    def modes_of(self, part: Part) -> tuple[Mode, ...]:
        """What may become of one part under the policies that mix."""
        turn: tuple[Mode, ...] = ("turn",) if len(self.parts) > 1 else ()
        stream: tuple[Mode, ...] = ("stream",) if part.blocks else ()
        if not self.is_asked:
            return ("stay", *turn, *stream)
        if stream and (self.streams_all or part.use.num_runs > 1 or len(self.parts) == 1):
            return stream
        return ("stay",) if self.streams_all else ("stay", *turn, *stream)

    @property
    def is_asked(self) -> bool:
        """The spec asks for streaming."""
        return self.offload.policy in ("layerwise", "disk")

    @property
    def streams_all(self) -> bool:
        """Who asks for streaming and names no budget wants the least memory."""
        return self.is_asked and self.offload.vram is None and self.resident is None

    def lay_out(self, modes: tuple[Mode, ...], source: Source) -> Layout | None:
        """The layout with these modes and as many blocks on the device as fit; None when it does not fit."""
        if not self.has_host_room(modes, source):
            return None
        peak = self.peak(modes)
        limit = self.budget - CONTEXT_BYTES if self.budget else None
        if self.is_asked and self.resident is not None:
            resident = self.fill(modes, self.resident)
        elif self.streams_all:
            resident = [0] * len(self.parts)
        else:
            bounds = [bound for bound in (self.resident, None if limit is None else limit - peak) if bound is not None]
            resident = self.fill(modes, min(bounds, default=None))
        if limit is not None and peak + sum(resident) > limit:
            return None
        return self._layout(modes, source, resident)

    def squeeze(self, modes: tuple[Mode, ...], source: Source) -> Layout:
        """The layout with these modes in any case: with as few blocks on the device as the budget wants, or none."""
        bounds = [bound for bound in (self.resident,) if bound is not None]
        if self.budget:
            bounds.append(max(0, self.budget - CONTEXT_BYTES - self.peak(modes)))
        return self._layout(modes, source, self.fill(modes, min(bounds, default=None)))

    def _layout(self, modes: tuple[Mode, ...], source: Source, resident: list[int]) -> Layout:
        seconds = sum(
            self.copied(part, mode, kept) * self.num_copies(part, mode)
            for part, mode, kept in zip(self.parts, modes, resident, strict=True)
        ) / self.rate(source)
        return Layout(modes, source, tuple(resident), self.peak(modes) + sum(resident), seconds)

    def fill(self, modes: tuple[Mode, ...], left: int | None) -> list[int]:
        """Bytes of blocks that stay, of each part: those that would be copied most often first, then large ones."""
        resident = [0] * len(self.parts)
        blocks = [
            (part.use.num_runs, size, index)
            for index, (part, mode) in enumerate(zip(self.parts, modes, strict=True))
            if mode == "stream"
            for size in part.blocks
        ]
        for _, size, index in sorted(blocks, key=lambda block: (-block[0], -block[1], block[2])):
            if left is None or size <= left:
                resident[index] += size
                left = None if left is None else left - size
        return resident

    def slots(self, part: Part) -> int:
        """Bytes of the slots that its blocks pass through."""
        return min(self.offload.ahead + 1, len(part.blocks)) * max(part.blocks)

    def peak(self, modes: tuple[Mode, ...]) -> int:
        """The most that torch allocates when no block stays on the device.

        The room for turns is as large as the largest that takes turns, and it is kept while others compute.
        """
        base, turn = 0, 0
        for part, mode in zip(self.parts, modes, strict=True):
            if mode == "stay":
                base += part.weight_bytes
            elif mode == "stream":
                base += part.outside_bytes + self.slots(part)
            else:
                turn = max(turn, part.weight_bytes)
        return base + turn + max((part.use.activation_bytes for part in self.parts), default=0)

    def host_bytes(self, modes: tuple[Mode, ...], source: Source) -> int:
        """Host memory of the process, with the weights that wait there."""
        waiting = sum(part.weight_bytes for part, mode in zip(self.parts, modes, strict=True) if mode != "stay")
        return PROCESS_BYTES[self.room.device] + (waiting if source == "host" else 0)

    def has_host_room(self, modes: tuple[Mode, ...], source: Source) -> bool:
        """Whether the weights that wait in host memory fit there."""
        waits = source == "host" and any(mode != "stay" for mode in modes)
        return not (waits and 0 < self.room.host_bytes < self.host_bytes(modes, source))

    def copied(self, part: Part, mode: Mode, resident: int) -> int:
        """Bytes that one copy takes."""
        if mode == "stay":
            return 0
        return part.weight_bytes if mode == "turn" else sum(part.blocks) - resident

    def num_copies(self, part: Part, mode: Mode) -> int:
        """Copies a request."""
        return {"stay": 0, "turn": 1, "stream": part.use.num_runs}[mode]

    def rate(self, source: Source) -> float:
        """Bytes a second onto the device."""
        links = self.room.links
        slowest = links.disk_bytes_per_second if source == "disk" else links.h2d_bytes_per_second
        return min(slowest, links.h2d_bytes_per_second)

    def least(self) -> int | None:
        """The smallest peak of any layout that is allowed, in the host memory that there is; None when none is."""
        fits = (modes for modes, source in self.candidates() if self.has_host_room(modes, source))
        return min(map(self.peak, fits), default=None)
