"""Sizes in bytes and durations, read from text and written for people."""

from __future__ import annotations

import re

from omni.errors import UsageError

GIB = 1024**3
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def parse_bytes(text: str | int) -> int:
    """`24GiB`, `512 GB`, `1.5TiB` or a plain number of bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write a number and a unit, such as 24GiB, 512GB or 1.5TiB")
    return int(float(match.group(1)) * _UNITS[unit])


def format_bytes(size: int) -> str:
    """Three digits or so in binary units: `512 B`, `1.5 KiB`, `53.7 GiB`."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 999.95 or unit == "TiB":
            break
    return f"{value:.1f} {unit}"


def parse_seconds(text: str) -> float:
    """`5ms` or `1.5s`, in seconds. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s)\s*", text)
    if match is None:
        raise UsageError(f"{text!r} is not a duration; write a number and a unit, such as 5ms or 1.5s")
    return float(match.group(1)) / (1000 if match.group(2) == "ms" else 1)
