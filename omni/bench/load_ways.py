"""The rows of `omni bench load`, in groups that do the same work, and the targets between them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import msgspec

MAX_IN_PLACE = 1.0
MAX_MASTER = 1.3
MIN_CONVERSION = 2.0
MAX_SINGLE = 1.1
"""As fast, with a tenth for noise."""
MAX_MEMORY = 1.05
MAX_LIMIT = 1.3
MIN_LIBRARY = 4.5
MIN_DISK = 0.95


class Way(msgspec.Struct, frozen=True):
    """One row."""

    key: str
    """For --only."""
    name: str
    job: dict[str, Any]
    """Fields of a load_rows.Job."""
    environment: dict[str, str] = {}
    is_single: bool = False
    """Loads the copy of the checkpoint that has one file for each component."""
    size: float = 1.0
    """Bytes of what is loaded over those of the checkpoint."""

    def gpu_share(self, device: str) -> float:
        """GPU memory that a run takes, over the checkpoint's bytes."""
        ends_there = self.job["way"] in ("omni", "library") and self.job.get("target") != "host"
        return self.size if ends_there and device != "cpu" and self.job["device"] != "cpu" else 0.0

    def memory_share(self, device: str) -> float:
        """Main memory that a run takes beside the page cache, over the checkpoint's bytes; none of it is exact."""
        fills = self.job.get("target") == "host" or self.job.get("fresh") or self.job.get("copy")
        return self.size if fills or (device == "cpu" and self.size != 1.0) else 0.0


class Group(msgspec.Struct, frozen=True):
    """Rows that do the same work."""

    key: str
    title: str
    reference: str
    """Key of the row that the others are compared with."""
    ways: tuple[Way, ...]
    cold: bool = True
    """Whether it is measured with a cold cache too."""


class Bound(msgspec.Struct, frozen=True):
    """A target: the time of one row over that of another."""

    name: str
    row: str
    over: tuple[str, ...]
    """Of several rows, the slowest counts."""
    limit: float
    at_most: bool = True
    states: tuple[str, ...] = ("warm", "cold")


ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PARALLEL = {"HF_ENABLE_PARALLEL_LOADING": "yes"}


def build_groups(device: str, dtype: str, others: tuple[str, ...], threads: int, single: bool) -> tuple[Group, ...]:
    """All groups for a device and the checkpoint's own dtype; `others` are dtypes to convert to."""
    omni, library, raw = ({"way": way, "dtype": dtype, "device": device} for way in ("omni", "library", "raw"))
    one, many = {**raw, "threads": 1, "fresh": False}, {**raw, "threads": threads, "fresh": False}
    own = Way("omni", "Omni", omni)
    master = Way("omni-host", "Omni, host master", {**omni, "target": "host"})
    place: tuple[Way, ...] = (
        Way("default", "diffusers", library),
        own,
        Way("map", "diffusers, device_map", {**library, "device_map": True}),
        Way("parallel", "diffusers, parallel loading", {**library, "device_map": device != "cpu"}, PARALLEL),
        Way("raw-1", "preads into scratch, 1 thread", one),
        Way("raw", _threads("preads into scratch", threads), many),
    )
    if device != "cpu":
        place = (*place, Way("link", "pinned memory to the device", {"way": "link", "dtype": dtype, "device": device}))
    host = (
        Way("fresh", _threads("preads into fresh memory", threads), {**many, "fresh": True}),
        Way("fresh-1", "preads into fresh memory, 1 thread", {**one, "fresh": True}),
        master,
        Way("copy", "diffusers and a copy", {**library, "device": "cpu", "copy": True}),
    )
    title = "in place, every page touched" if device == "cpu" else f"to {device}"
    groups = [Group("place", title, "default", place), Group("host", "into a host master", "fresh", host)]
    for other in others:
        size = ITEM_BYTES[other] / ITEM_BYTES[dtype]
        convert = tuple(
            Way(f"{key}-{other}", f"{name}, to {other}", {**job, "dtype": other}, environment, size=size)
            for key, name, job, environment in (
                ("default", "diffusers", library, {}),
                ("omni", "Omni", omni, {}),
                ("parallel", "diffusers, parallel loading", library, PARALLEL),
            )
        )
        groups.append(Group(f"to-{other}", f"converted from {dtype} to {other}", f"default-{other}", convert, False))
    if single:
        base = master if device == "cpu" else own
        alone = Way("omni-single", f"{base.name}, one file", base.job, is_single=True)
        groups.append(Group("single", "one file against several", base.key, (base, alone), False))
    return tuple(groups)


def build_bounds(device: str, others: tuple[str, ...]) -> tuple[Bound, ...]:
    """What Omni promises between the rows."""
    if device == "cpu":
        bounds = [
            Bound("first output over diffusers'", "omni", ("default",), MAX_IN_PLACE),
            Bound("host master over preads into fresh memory", "omni-host", ("fresh",), MAX_MASTER),
            Bound("host master over diffusers and a copy", "omni-host", ("copy",), MAX_IN_PLACE),
        ]
        bounds += [
            Bound(f"diffusers over Omni, to {other}", f"default-{other}", (f"omni-{other}",), MIN_CONVERSION, False)
            for other in others
        ]
        return (*bounds, Bound("one file over several", "omni-single", ("omni-host",), MAX_SINGLE))
    return (
        Bound("load over the slower of preads and link", "omni", ("raw", "link"), MAX_LIMIT, states=("warm",)),
        Bound("diffusers over Omni", "default", ("omni",), MIN_LIBRARY, False, ("warm",)),
        Bound("preads over Omni", "raw", ("omni",), MIN_DISK, False, ("cold",)),
        Bound("one file over several", "omni-single", ("omni",), MAX_SINGLE),
    )


def judge(bounds: tuple[Bound, ...], seconds: Mapping[tuple[str, str], list[float]]) -> list[tuple[str, float, Bound]]:
    """Name, ratio and bound of each target whose rows were measured; `seconds` by key and state."""
    judged = []
    for bound in bounds:
        for state in bound.states:
            # The link is the same, whatever is cached.
            found = [seconds.get((key, state)) or (key == "link" and seconds.get((key, "warm"))) for key in bound.over]
            mine = seconds.get((bound.row, state))
            if mine and all(found):
                ratio = median(mine) / max(median(values) for values in found if values)
                judged.append((f"{bound.name}, {state}", ratio, bound))
    return judged


def _threads(name: str, threads: int) -> str:
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
