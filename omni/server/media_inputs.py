"""Media that a request brings, as data URLs, uploads or allowed URLs: bounded before they are decoded.

What a client calls a file, and what type it says it has, decide nothing: the content does. Pictures are decoded in
threads of the server. Clips and sounds are decoded in a process of its own for each, with bounded memory and time:
a clip of 1 KB can make a decoder take gigabytes before it says how long the clip is.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from omni.decode import ReadLimits, decode_media
from omni.errors import InputError
from omni.media import Audio, Video
from omni.server.addresses import AddressRules, fetch
from omni.server.decode_child import Answer
from omni.server.media_room import MediaRoom, RequestMedia
from omni.server.picture_parts import has_too_many_parts
from omni.server.settings import ServerSettings

MediaType = Literal["image", "video", "audio", "tensor"]

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
CODECS = (
    *("h264", "hevc", "vp8", "vp9", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "gif", "mjpeg"),
    *("aac", "mp3", "mp3float", "flac", "opus", "libopus", "vorbis", "alac"),
    *("pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_u8", "pcm_f32le", "pcm_f64le"),
)
"""FFmpeg has hundreds of decoders, most of them for formats that nobody sends and few people test."""
DATA_URL = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
MAX_HEAD_CHARS = 256
"""Of a data URL, up to its comma."""
CHILD_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG")
"""What the decoding process gets to know of the server's environment, which has secrets."""
START_SECONDS = 30.0
"""Time for the decoding process to start, on top of what it may take to decode."""
PIPE_BYTES = 1024**2


def parse_data_url(text: str, max_bytes: int, name: str) -> tuple[str, bytes]:
    """Media type (lower case, may be empty) and content of `data:image/png;base64,...`. Raises InputError."""
    head = DATA_URL.match(text[:MAX_HEAD_CHARS])
    if head is None or not head.group(2).lower().endswith(";base64"):
        raise InputError(f"input '{name}' is not a data URL with base64 content: data:image/png;base64,...")
    num_chars = len(text) - head.end()
    if num_chars > (max_bytes + 2) // 3 * 4:
        raise InputError(f"input '{name}' has more than {max_bytes} bytes, the limit of this server")
    try:
        data = binascii.a2b_base64(text[head.end() :], strict_mode=True)
    except (binascii.Error, ValueError) as error:  # ValueError: of characters that are not ASCII
        raise InputError(f"input '{name}' is a data URL whose base64 is broken: {error}") from error
    return head.group(1).strip().lower(), data


def read_limits(settings: ServerSettings, *, alpha: bool = False) -> ReadLimits:
    """What decoders accept of media from the network."""
    return ReadLimits(
        picture_formats=PICTURE_FORMATS,
        animated=False,
        alpha=alpha,
        max_pixels=settings.max_pixels,
        max_side=settings.max_side,
        max_frames=settings.max_frames,
        max_decoded_bytes=settings.max_decoded_bytes,
        codecs=CODECS,
        max_seconds=settings.decode_seconds,
    )


class MediaReader:
    """Turns what a client sent for a media input into the value that a graph takes.

    One for each app: it bounds how many media are decoded at the same time.
    """

    def __init__(self, settings: ServerSettings, rules: AddressRules | None = None) -> None:
        """`rules`: what may be fetched; left out, what `settings.allowed_hosts` says."""
        self._settings = settings
        self._rules = rules or AddressRules(settings.allowed_hosts)
        self._decoders = asyncio.Semaphore(settings.max_decoders)
        self._room = MediaRoom(settings)

    def open(self, check_queue: Callable[[], None] = lambda: None) -> RequestMedia:
        """The count of one request's media; see RequestMedia."""
        return RequestMedia(self._settings, self._room, check_queue)

    async def resolve(
        self, value: Any, media_type: MediaType, name: str, counted: RequestMedia, *, alpha: bool = False
    ) -> Any:
        """A PIL image, omni.media.Video, omni.media.Audio or tensor, or a list of them for a list.

        `value` is bytes (an upload), a data URL, an allowed http(s) URL, or a list of these; `name` is the field, for
        messages; `counted` is the request's count; `alpha` keeps the transparency of a picture (RGBA, else RGB).
        Raises InputError, or ApiError when there is no room.
        """
        if not isinstance(value, list):
            return await self._resolve_one(value, media_type, name, counted, alpha)
        if len(value) > self._settings.max_media:
            raise InputError(f"input '{name}' has {len(value)} items; at most {self._settings.max_media} are read")
        found = []
        for index, item in enumerate(value):
            found.append(await self._resolve_one(item, media_type, f"{name}[{index}]", counted, alpha))
        return found

    async def _resolve_one(
        self, value: Any, media_type: MediaType, name: str, counted: RequestMedia, alpha: bool
    ) -> Any:
        counted.begin()
        data = await self._content(value, name)
        if not data:
            raise InputError(f"input '{name}' is empty")
        limits = read_limits(self._settings, alpha=alpha)
        decoded = await self._decode(data, media_type, f"input '{name}'", limits)
        counted.add(decoded)
        return decoded

    async def _decode(self, data: bytes, media_type: MediaType, where: str, limits: ReadLimits) -> Any:
        if media_type in ("video", "audio"):
            async with self._decoders:
                return await decode_apart(data, media_type, where, limits)
        await self._decoders.acquire()
        # A thread cannot be stopped: it keeps its slot when nobody waits for it any more.
        task = asyncio.ensure_future(asyncio.to_thread(decode_here, data, media_type, where, limits))
        task.add_done_callback(self._picture_done)
        return await asyncio.shield(task)

    def _picture_done(self, task: asyncio.Future[Any]) -> None:
        self._decoders.release()
        if not task.cancelled():
            task.exception()  # nobody may be left to take it

    async def _content(self, value: Any, name: str) -> bytes:
        settings = self._settings
        if isinstance(value, str):
            scheme = value[:8].lower()
            if scheme.startswith("data:"):
                return parse_data_url(value, settings.max_media_bytes, name)[1]
            if scheme.startswith(("http://", "https://")):
                return await fetch(value, self._rules, settings.max_media_bytes, settings.fetch_seconds)
            raise InputError(
                f"input '{name}' must be a data URL, an http(s) URL or an upload; no file of the server is opened"
            )
        if not isinstance(value, bytes):
            raise InputError(f"input '{name}' must be a data URL, an http(s) URL or an upload, not {_kind(value)}")
        if len(value) > settings.max_media_bytes:
            raise InputError(f"input '{name}' has more than {settings.max_media_bytes} bytes, the limit of this server")
        return value


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def decode_here(data: bytes, kind: str, where: str, limits: ReadLimits) -> Any:
    """The value of an encoded picture or tensor. Blocks. Raises InputError."""
    if kind == "image":
        if data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<svg", b"<?xml", b"<!DOCTYPE", b"<!--")):
            raise InputError(f"{where} is a drawing (SVG) and no picture; send it as PNG, JPEG or WebP")
        if has_too_many_parts(data):
            raise InputError(f"{where} is made of more parts than any honest picture; write it anew")
    return decode_media(io.BytesIO(data), kind, where, limits)


async def decode_apart(data: bytes, kind: str, where: str, limits: ReadLimits) -> Video | Audio:
    """The value of an encoded clip or sound, decoded in a process of its own. Raises InputError."""
    environment = {name: os.environ[name] for name in CHILD_VARIABLES if name in os.environ}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    arguments = ("-P", "-m", "omni.server.decode_child", kind, msgspec.json.encode(limits).decode())
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=pipe,
        stdout=pipe,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
        limit=PIPE_BYTES,
    )
    try:
        async with asyncio.timeout(START_SECONDS + limits.max_seconds):
            answer, values = await _converse(process, data, limits)
    except TimeoutError as error:
        raise InputError(f"{where} takes too long to decode; shorten or shrink it") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
    if answer.error:
        raise InputError(f"{where}{answer.error}")
    value = _value(answer, kind, values)
    if value is None:  # it crashed, or ran out of the memory or time that it may take
        raise InputError(f"{where} is a broken {'clip' if kind == 'video' else 'sound'}, or takes too much to decode")
    return value


async def _converse(process: asyncio.subprocess.Process, data: bytes, limits: ReadLimits) -> tuple[Answer, bytearray]:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(data)
        await process.stdin.drain()
        process.stdin.close()
    line = await process.stdout.readline()
    answer = msgspec.json.decode(line, type=Answer) if line.endswith(b"\n") else Answer()
    values = bytearray()
    while chunk := await process.stdout.read(PIPE_BYTES):
        values += chunk
        if len(values) > limits.max_decoded_bytes:
            return Answer(), bytearray()
    return answer, values


def _value(answer: Answer, kind: str, values: bytearray) -> Video | Audio | None:
    """The values in the shape that the answer says, or None when they do not fit it."""
    import numpy as np

    if kind == "video" and len(answer.shape) == 4 and answer.shape[3] == 3:
        array = np.frombuffer(values, dtype=np.uint8)
        fits = array.size == np.prod(answer.shape, dtype=object) > 0
        return Video(array.reshape(answer.shape), answer.rate) if fits else None
    if kind == "audio" and len(answer.shape) == 2:
        samples = np.frombuffer(values, dtype=np.float32) if len(values) % 4 == 0 else np.zeros(0, np.float32)
        fits = samples.size == np.prod(answer.shape, dtype=object) > 0
        return Audio(samples.reshape(answer.shape), int(answer.rate)) if fits else None
    return None
