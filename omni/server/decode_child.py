"""Decodes one clip or sound in a process of its own: `python -m omni.server.decode_child KIND LIMITS`.

The encoded medium comes on standard input. On standard output goes one line of JSON, which describes the values or says
what is wrong, then the values themselves as they lie in memory.
"""

from __future__ import annotations

import io
import sys

import msgspec

from omni.decode import ReadLimits, decode_media
from omni.errors import InputError
from omni.media import Audio, Video

MEMORY_BYTES = 2 * 1024**3
"""Address space beyond three times the decoded size: libraries, and what decoders keep."""


class Answer(msgspec.Struct, kw_only=True):
    """The line before the values."""

    shape: tuple[int, ...] = ()
    rate: float = 0.0
    """Frames or samples per second."""
    error: str = ""


def main(kind: str, limits_json: str) -> None:
    """Decode standard input."""
    limits = msgspec.json.decode(limits_json, type=ReadLimits)
    _confine(limits)
    value: Video | Audio | None = None
    try:
        value = decode_media(io.BytesIO(sys.stdin.buffer.read()), kind, "", limits)
        answer = _answer(value)
    except InputError as error:
        answer = Answer(error=str(error))
    out = sys.stdout.buffer
    out.write(msgspec.json.encode(answer) + b"\n")
    if value is not None:
        out.write((value.frames if isinstance(value, Video) else value.samples).data)
    out.flush()


def _answer(value: Video | Audio) -> Answer:
    if isinstance(value, Video):
        return Answer(shape=value.frames.shape, rate=value.fps)
    return Answer(shape=value.samples.shape, rate=value.rate)


def _confine(limits: ReadLimits) -> None:
    """Bound the memory and time of this process, where the system can."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    memory = MEMORY_BYTES + 3 * limits.max_decoded_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    seconds = int(limits.max_seconds) * 4 + 10  # of all threads together
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(*sys.argv[1:])
