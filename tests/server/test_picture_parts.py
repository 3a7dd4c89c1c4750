"""Counting the parts of a picture: bombs are told from honest pictures, quickly, whatever the bytes are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.server.picture_parts import MAX_PARTS, MAX_SCANS, has_too_many_parts
from tests.server import bombs


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_honest_pictures_have_few_parts(form: str) -> None:
    assert not has_too_many_parts(bombs.picture(600, 400, form=form))


@pytest.mark.parametrize(
    "make", [bombs.many_chunks, bombs.many_segments, bombs.many_fill_bytes, bombs.many_blocks, bombs.many_webp_chunks]
)
def test_pictures_of_many_parts_are_found(make: object) -> None:
    assert callable(make)
    assert not has_too_many_parts(make(MAX_PARTS // 3))
    assert has_too_many_parts(make(MAX_PARTS + 1))


def test_a_jpeg_of_many_scans_is_found() -> None:
    assert not has_too_many_parts(bombs.many_scans(20))
    assert has_too_many_parts(bombs.many_scans(MAX_SCANS))


@pytest.mark.parametrize(
    "head", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"GIF89a\1\0\1\0\xf7\0\0", b""]
)
@given(rest=st.binary(max_size=300))
def test_any_bytes_can_be_counted(head: bytes, rest: bytes) -> None:
    assert has_too_many_parts(head + rest) is False


@pytest.mark.parametrize(
    ("head", "filler"),
    [
        (b"\x89PNG\r\n\x1a\n", b"\0"),
        (b"\xff\xd8", b"\0"),
        (b"\xff\xd8", b"\xff"),
        (b"\xff\xd8", b"\xff\xd0"),
        (b"GIF89a" + b"\0" * 7, b"\0"),
        (b"GIF89a" + b"\0" * 7, b"!\xfe\0"),
        (b"RIFF\0\0\0\0WEBP", b"\0"),
    ],
)
def test_the_smallest_parts_count(head: bytes, filler: bytes) -> None:
    assert has_too_many_parts(head + filler * 500_000)
