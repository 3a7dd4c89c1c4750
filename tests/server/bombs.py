"""Media files made to do harm, and honest ones beside them."""

from __future__ import annotations

import io
import json
import struct
import wave
import zlib
from typing import Any

import numpy as np
from PIL import Image

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def picture(width: int = 6, height: int = 4, mode: str = "RGB", form: str = "PNG", **options: Any) -> bytes:
    """An honest picture."""
    file = io.BytesIO()
    Image.new(mode, (width, height), 200 if mode == "L" else (200, 10, 30, 90)[: len(mode)]).save(file, form, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that says it has a size, with further chunks and hardly any pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return PNG_HEAD + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def png_bomb(side: int) -> bytes:
    """A whole picture of black pixels, a thousandth of its size when packed."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return PNG_HEAD + header + chunk(b"IDAT", zlib.compress(b"\0" * (side * 3 + 1) * side, 9)) + chunk(b"IEND", b"")


def many_chunks(count: int) -> bytes:
    """A PNG of many empty chunks."""
    return png(1, 1, chunk(b"prVt", b"") * count)


def many_segments(count: int) -> bytes:
    """A JPEG of many empty segments."""
    data = picture(form="JPEG")
    return data[:2] + b"\xff\xe5\x00\x02" * count + data[2:]


def many_fill_bytes(count: int) -> bytes:
    """A JPEG with many fill bytes before a segment."""
    data = picture(form="JPEG")
    return data[:2] + b"\xff" * count + data[2:]


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = picture(64, 64, form="JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def many_blocks(count: int) -> bytes:
    """A GIF of many comments."""
    data = picture(mode="L", form="GIF")
    place = data.index(b",")
    return data[:place] + b"!\xfe\x01a\x00" * count + data[place:]


def many_webp_chunks(count: int) -> bytes:
    """A WebP of many empty chunks."""
    data = picture(form="WEBP", exif=b"Exif\0\0II*\0\0\0\0\0")
    body = data[12:] + b"ABCD\0\0\0\0" * count
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def animation(form: str, num_frames: int = 3) -> bytes:
    """A picture that moves."""
    frames = [Image.new("RGB", (8, 8), (index * 40, 0, 0)) for index in range(num_frames)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    return file.getvalue()


def clip(num_frames: int = 3, width: int = 32, height: int = 32, codec: str = "libx264", form: str = "mp4") -> bytes:
    """An honest clip."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(num_frames):
            pixels = np.full((height, width, 3), index * 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def index_bomb(num_samples: int) -> bytes:
    """A clip of 1 KB whose index says that it has very many samples; FFmpeg keeps 35 bytes for each."""
    data = bytearray(clip(1, codec="mpeg4"))
    for name, place, content in (
        (b"stsz", 8, struct.pack(">II", 1, num_samples)),
        (b"stts", 12, struct.pack(">I", num_samples)),
        (b"stsc", 16, struct.pack(">I", num_samples)),
    ):
        start = data.index(name) + place
        data[start : start + len(content)] = content
    return bytes(data)


def sound(num_samples: int = 800, rate: int = 8000) -> bytes:
    """An honest sound."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(np.zeros(num_samples, "<i2").tobytes())
    return file.getvalue()


def silence_bomb(num_samples: int) -> bytes:
    """A FLAC of silence, which packs to next to nothing."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, num_samples), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def safetensors(header: dict[str, Any], content: bytes = b"") -> bytes:
    """A tensor file with any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
