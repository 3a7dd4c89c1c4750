"""Encoded media to values: what a picture, clip, sound or tensor holds, within limits. Its content tells its format.

Heavy libraries (PIL, av, numpy, safetensors) are imported where they are used.
"""

from __future__ import annotations

import contextlib
import struct
import time
import zlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from omni.errors import InputError
from omni.media import Audio, Video

if TYPE_CHECKING:
    import av
    from PIL import Image

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MEDIA_FORMATS = ("mov", "mp4", "matroska", "webm", "gif", "wav", "mp3", "flac", "ogg")
"""Containers that are read, by FFmpeg's names. No playlists: these make FFmpeg open other files and addresses."""
BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What PIL raises for broken pictures."""


class ReadLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What is read. The defaults are for files of the user's own."""

    picture_formats: tuple[str, ...] = PICTURE_FORMATS
    animated: bool = True
    """Whether a picture may be animated; its first frame is what is read."""
    alpha: bool = False
    """Give pictures as RGBA instead of RGB."""
    max_pixels: int = 100_000_000
    """Width times height of a picture or frame: some files of a few KB unpack to gigabytes."""
    max_side: int = 1_000_000
    """Width or height."""
    max_frames: int = 2**31
    """Frames of a clip."""
    max_decoded_bytes: int = 8 * 1024**3
    """Decoded size of a clip, sound or tensor."""
    codecs: tuple[str, ...] = ()
    """Decoders that are used for clips and sounds, by FFmpeg's names; none: all there are."""
    max_seconds: float = 0.0
    """Time to decode a clip or sound; 0: as long as it takes."""


def decode_media(file: BinaryIO, kind: str, where: str, limits: ReadLimits) -> Any:
    """The value of an open file for an input of type `kind` (image, video, audio or tensor).

    Pictures come upright and as RGB; see omni.media for clips and sounds. `where` names the file in messages.
    Raises InputError with the reason.
    """
    match kind:
        case "image":
            return _decode_image(file, where, limits)
        case "video":
            return _decode_video(file, where, limits)
        case "audio":
            return _decode_audio(file, where, limits)
        case "tensor":
            return _decode_tensor(file, where, limits)
    raise ValueError(f"'{kind}' is no type of media")


def _decode_image(file: BinaryIO, where: str, limits: ReadLimits) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file, formats=limits.picture_formats) as image:
            _check_size(image.width, image.height, where, limits)
            # A camera's JPEG may have a second picture for depth, and a scan many pages: these are no animations.
            if not limits.animated and image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False):
                raise InputError(f"{where} is an animated picture; send a still one, or a clip where a video is wanted")
            return ImageOps.exif_transpose(image).convert("RGBA" if limits.alpha else "RGB")
    except UnidentifiedImageError as error:
        formats = ", ".join(limits.picture_formats)
        raise InputError(f"{where} is not a picture that can be read; {formats} are") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{where}: too many pixels; at most {limits.max_pixels} are read") from error
    except BROKEN as error:
        raise InputError(f"{where} is a broken picture: {error}") from error


def _check_size(width: int, height: int, where: str, limits: ReadLimits) -> None:
    if width * height > limits.max_pixels:
        raise InputError(f"{where}: {width}x{height} pixels; at most {limits.max_pixels} are read")
    if max(width, height) > limits.max_side:
        raise InputError(f"{where}: {width}x{height} pixels; a side has at most {limits.max_side}")


class _Meter:
    """Adds up what a clip or sound unpacks to, and how long that takes."""

    def __init__(self, where: str, limits: ReadLimits) -> None:
        self.where = where
        self.limits = limits
        self.num_bytes = 0
        self.num_frames = 0
        self.started_at = time.monotonic()

    def add(self, num_bytes: int, frames: int = 0) -> None:
        """Count a piece. Raises InputError when it is one too many."""
        self.num_bytes += num_bytes
        self.num_frames += frames
        seconds = self.limits.max_seconds
        if self.num_bytes > self.limits.max_decoded_bytes:
            raise InputError(
                f"{self.where} unpacks to more than {self.limits.max_decoded_bytes} bytes; shorten or shrink it"
            )
        if self.num_frames > self.limits.max_frames:
            raise InputError(f"{self.where} has more than {self.limits.max_frames} frames; shorten it")
        if seconds and time.monotonic() - self.started_at > seconds:
            raise InputError(f"{self.where} takes more than {seconds:g} s to decode; shorten or shrink it")


def _decode_video(file: BinaryIO, where: str, limits: ReadLimits) -> Video:
    import numpy as np

    with _open_media(file, where, limits) as container:
        if not container.streams.video:
            raise InputError(f"{where} has no video track")
        stream = container.streams.video[0]
        context = stream.codec_context
        _check_codec(context, where, limits)
        _check_size(context.width, context.height, where, limits)
        context.options = _decoder_options(limits)
        stream.thread_type = "AUTO"
        meter = _Meter(where, limits)
        frames = []
        for frame in container.decode(stream):
            _check_size(frame.width, frame.height, where, limits)  # may be more than the container says
            meter.add(frame.width * frame.height * 3, frames=1)
            picture = frame.to_ndarray(format="rgb24")
            frames.append(np.rot90(picture, frame.rotation // 90) if frame.rotation % 360 else picture)
        if not frames:
            raise InputError(f"{where} has no frames")
        if any(picture.shape != frames[0].shape for picture in frames):
            raise InputError(f"{where} has frames of different sizes")
        return Video(np.ascontiguousarray(np.stack(frames)), float(stream.average_rate or stream.guessed_rate or 16))


def _decode_audio(file: BinaryIO, where: str, limits: ReadLimits) -> Audio:
    import av
    import numpy as np

    with _open_media(file, where, limits) as container:
        if not container.streams.audio:
            raise InputError(f"{where} has no sound track")
        stream = container.streams.audio[0]
        _check_codec(stream.codec_context, where, limits)
        resampler = av.AudioResampler(format="fltp")
        meter = _Meter(where, limits)
        parts = []
        for frame in _and_end(container.decode(stream)):
            for converted in resampler.resample(frame):
                parts.append(converted.to_ndarray())
                meter.add(parts[-1].nbytes)
        if not parts:
            raise InputError(f"{where} has no samples")
        return Audio(np.concatenate(parts, axis=1), stream.rate)


def _and_end(frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame | None]:
    """All frames, and None, upon which a resampler gives what it still holds."""
    yield from frames
    yield None


def _decoder_options(limits: ReadLimits) -> dict[str, str]:
    """Bounds what a decoder allocates. Twice the limit: decoders pad frames, by much for small ones."""
    return {"max_pixels": str(2 * limits.max_pixels + 2**16)}


def _check_codec(context: av.CodecContext, where: str, limits: ReadLimits) -> None:
    if limits.codecs and context.codec.name not in limits.codecs:
        raise InputError(
            f"{where} is coded as {context.codec.name}, which is not read; H.264 and AAC are, among others"
        )


def _decode_tensor(file: BinaryIO, where: str, limits: ReadLimits) -> Any:
    from safetensors import SafetensorError, deserialize

    data = file.read(limits.max_decoded_bytes + 1)
    if len(data) > limits.max_decoded_bytes:
        raise InputError(f"{where} has more than {limits.max_decoded_bytes} bytes; at most these are read")
    try:  # names first, without torch: importing it takes seconds
        only_name([name for name, _ in deserialize(data)], where)  # type: ignore[no-untyped-call]
        from safetensors.torch import load

        return next(iter(load(data).values()))
    except SafetensorError as error:
        raise InputError(f"{where} is not a safetensors file: {error}") from error
    except (ValueError, LookupError, RuntimeError) as error:  # a type or shape that torch does not know
        raise InputError(f"{where} has a tensor that cannot be read: {error}") from error


def only_name(names: Collection[str], where: str) -> str:
    """The name of the only tensor of a file. Raises InputError when it has none or several."""
    if len(names) != 1:
        found = ", ".join(sorted(names))[:200]
        raise InputError(f"{where} must hold one tensor, and holds {len(names)}: {found}")
    return next(iter(names))


@contextlib.contextmanager
def _open_media(file: BinaryIO, where: str, limits: ReadLimits) -> Iterator[av.container.InputContainer]:
    """An open clip or sound; whatever the decoder complains about becomes an InputError."""
    import av

    options = {
        "format_whitelist": ",".join(MEDIA_FORMATS),
        "protocol_whitelist": "none",  # a container cannot make FFmpeg open anything else
        **_decoder_options(limits),
    }
    if limits.codecs:
        options["codec_whitelist"] = ",".join(limits.codecs)
    try:
        with av.open(file, mode="r", options=options) as container:
            yield container
    except av.FFmpegError as error:
        formats = ", ".join(MEDIA_FORMATS)
        raise InputError(f"{where} is not a clip or sound that can be read ({formats}): {error.strerror}") from error
    except (ValueError, LookupError, ArithmeticError, RuntimeError, MemoryError) as error:  # of broken clips
        raise InputError(f"{where} is a broken clip or sound: {error}") from error
