"""Sizes to and from text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.errors import UsageError
from omni.sizes import GIB, format_bytes, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("512 GB", 512 * 10**9),
        ("1.5TiB", 1536 * GIB),
        (7, 7),
        ("7", 7),
        ("1kb", 1000),
        (" 2 b ", 2),
    ],
)
def test_parse(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1.GiB", "-1GiB", "24 giga", "1e3", "1 2", "\u0661GiB"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size; write a number and a unit, such as 24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1023 * 1024, "1.0 MiB"),
        (54 * GIB, "54.0 GiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(0, 2**60))
def test_round_trip_is_close(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= 0.051 * max(1, size)


@pytest.mark.parametrize(("text", "seconds"), [("5ms", 0.005), (" 1.5 s ", 1.5), ("0ms", 0.0)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["5", "ms", "-1s", "5 min"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_seconds(text)
