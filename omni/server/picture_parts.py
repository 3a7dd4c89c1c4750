"""How many parts a picture file is made of, counted before it is opened.

A picture of one pixel may have millions of empty chunks before it; a reader that keeps a record of each takes minutes
and gigabytes. Counting stops at MAX_PARTS, and looks at the places where parts begin only.
"""

from __future__ import annotations

MAX_PARTS = 20_000
"""No camera and no program writes as many: chunks of PNG and WebP, segments of JPEG, blocks of GIF."""
MAX_SCANS = 200
"""Passes of a progressive JPEG, each over all its pixels; some ten are usual, and several pictures may be inside."""


def has_too_many_parts(data: bytes) -> bool:
    """Whether a picture has more parts than any honest one; false for what is no PNG, JPEG, WebP or GIF."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _count_chunks(data, 8, "big", 12) > MAX_PARTS
    if data.startswith(b"\xff\xd8"):
        return data.count(b"\xff\xda") > MAX_SCANS or _count_segments(data) > MAX_PARTS
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _count_blocks(data) > MAX_PARTS
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _count_chunks(data, 12, "little", 8) > MAX_PARTS
    return False


def _count_chunks(data: bytes, place: int, order: str, overhead: int) -> int:
    """Chunks of PNG (length, name, content, checksum) and of WebP (name, length, content to an even place)."""
    count = 0
    while place + 8 <= len(data) and count <= MAX_PARTS:
        count += 1
        if order == "big":
            place += int.from_bytes(data[place : place + 4], "big") + overhead
        else:
            length = int.from_bytes(data[place + 4 : place + 8], "little")
            place += length + length % 2 + overhead
    return count


def _count_segments(data: bytes) -> int:
    """Segments of a JPEG up to its first scan; fill bytes count too, since a reader passes them one by one."""
    count, place = 0, 2
    while place + 4 <= len(data) and count <= MAX_PARTS:
        count += 1
        if data[place] != 0xFF or data[place + 1] in (0x00, 0xFF):
            place += 1
        elif data[place + 1] == 0xDA:
            break
        elif data[place + 1] == 0x01 or 0xD0 <= data[place + 1] <= 0xD9:  # markers without content
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return count


def _count_blocks(data: bytes) -> int:
    """Blocks of a GIF's extensions up to its first picture."""
    flags = data[10] if len(data) > 10 else 0
    place = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0)
    count = 0
    while place < len(data) and data[place] != 0x2C and count <= MAX_PARTS:
        count += 1
        if data[place] != 0x21:
            place += 1
            continue
        place += 2
        while place < len(data) and data[place] and count <= MAX_PARTS:
            count += 1
            place += data[place] + 1
        place += 1
    return count
