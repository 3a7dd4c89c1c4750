"""Media files: reading a request's pictures, clips and sounds, and writing a graph's outputs.

A file appears under its name only when it is whole. The suffix decides the format. Heavy libraries (PIL, av, numpy,
safetensors) are imported where they are used.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.decode import ReadLimits, decode_media, only_name
from omni.errors import InputError, UsageError
from omni.media import Audio, Video
from omni.transport.payload import is_array, is_image, is_tensor

if TYPE_CHECKING:
    import av
    from PIL import Image

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4", ".gif", ".webp"),
    "audio": (".wav",),
    "text": (".txt",),
    "json": (".json",),
    "tensor": (".safetensors",),
}
"""Type of a value -> suffixes that it can be written under; the first is the default."""

READ_LIMITS = ReadLimits()
"""For files that the user names."""
JPEG_QUALITY = 95
VIDEO_QUALITY = "18"
"""x264's constant rate factor; 18 is hard to tell from the original."""
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
LAYOUTS = {1: "mono", 2: "stereo"}


def kind_of(value: object) -> str:
    """The port type of a single value: text, image, video, audio, tensor or json."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, Video):
        return "video"
    if isinstance(value, Audio):
        return "audio"
    if is_image(value):
        return "image"
    return "tensor" if is_tensor(value) or is_array(value) else "json"


def items_of(value: Any) -> list[Any]:
    """The single values of an output: lists of media or text are taken apart, JSON stays whole."""
    if isinstance(value, list) and value and all(kind_of(item) != "json" or isinstance(item, list) for item in value):
        return [leaf for item in value for leaf in items_of(item)]
    return [value]


# Reading ----------------------------------------------------------------------------------------------------------


def read_media(path: str | Path, kind: str, limits: ReadLimits = READ_LIMITS) -> Any:
    """The value of a file for an input of type `kind` (image, video, audio or tensor).

    Pictures come upright and as RGB; see omni.media for clips and sounds. Raises InputError with the reason.
    """
    try:
        with open(path, "rb") as file:
            return _read_tensor(str(path)) if kind == "tensor" else decode_media(file, kind, str(path), limits)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _read_tensor(path: str) -> Any:
    """By its path, which keeps one copy in memory instead of three."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from error
    return tensors[only_name(tensors, path)]


# Writing ----------------------------------------------------------------------------------------------------------


def write_output(
    value: Any, path: str | Path, *, metadata: str = "", sound: Audio | None = None, replace: bool = True
) -> Path:
    """Write one value under `path`, replacing what is there, and return the path.

    The suffix decides the format, see SUFFIXES. `metadata` goes into a PNG's text chunk `omni`; `sound` becomes the
    sound track of an .mp4. Raises UsageError when the value does not fit the suffix or the file cannot be written,
    and FileExistsError when the name is taken and `replace` is false.
    """
    path = Path(path)
    kind, suffix = kind_of(value), path.suffix.lower()
    if suffix not in SUFFIXES[kind]:
        raise UsageError(f"{path}: {kind} is written as {' or '.join(SUFFIXES[kind])}, not as '{suffix}'")
    writers: dict[str, Callable[[str], None]] = {
        "image": lambda part: _write_image(value, part, suffix, metadata),
        "video": lambda part: _write_video(value, part, suffix, sound),
        "audio": lambda part: _write_wav(value, part),
        "tensor": lambda part: _write_tensor(value, part),
        "text": lambda part: _write_text(value if value.endswith("\n") else f"{value}\n", part),
        "json": lambda part: _write_text(json.dumps(value, indent=2, ensure_ascii=False, default=repr) + "\n", part),
    }
    with _whole_file(path, replace) as part:
        writers[kind](part)
    return path


def check_folder(folder: Path) -> None:
    """Raise UsageError when no file can be written into `folder`."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; make it first, or choose another --output")
    probe = folder / f".omni-{uuid.uuid4().hex}.part"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{folder}: cannot write there: {error.strerror}") from error


@contextlib.contextmanager
def _whole_file(path: Path, replace: bool) -> Iterator[str]:
    """A name beside `path` to write to; it becomes `path` when the block ends well, and is gone otherwise."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield str(part)
        if not replace:
            path.open("x").close()  # takes the name, or finds it taken; not every file system has hard links
        os.replace(part, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:  # of the libraries that write
        raise UsageError(f"cannot write {path}: {type(error).__name__}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _write_image(image: Image.Image, part: str, suffix: str, metadata: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    if suffix == ".png":
        info = PngInfo()
        if metadata:
            info.add_itxt("omni", metadata)
        image.save(part, format="PNG", pnginfo=info)
    elif suffix == ".webp":
        image.save(part, format="WEBP", quality=JPEG_QUALITY)
    else:
        image.convert("RGB").save(part, format="JPEG", quality=JPEG_QUALITY)


def _write_video(video: Video, part: str, suffix: str, sound: Audio | None) -> None:
    if suffix == ".mp4":
        _write_mp4(video, part, sound)
        return
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in video.frames]
    form = "GIF" if suffix == ".gif" else "WEBP"
    frames[0].save(part, format=form, save_all=True, append_images=frames[1:], duration=round(1000 / video.fps), loop=0)


def _write_mp4(video: Video, part: str, sound: Audio | None) -> None:
    import av
    import numpy as np

    # H.264 in the colour format that every player knows needs even sides: the last row and column are doubled.
    height, width = video.frames.shape[1:3]
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    with av.open(part, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(video.fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": VIDEO_QUALITY})
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        track = _add_sound(container, sound) if sound is not None else None
        for picture in video.frames:
            frame = av.VideoFrame.from_ndarray(np.pad(picture, padding, mode="edge"), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            samples = np.ascontiguousarray(sound.samples, dtype=np.float32)
            audio = av.AudioFrame.from_ndarray(samples, format="fltp", layout=LAYOUTS[len(samples)])
            audio.sample_rate = sound.rate
            container.mux(track.encode(audio))
            container.mux(track.encode())


def _add_sound(container: av.container.OutputContainer, sound: Audio) -> av.AudioStream:
    num_channels = len(sound.samples)
    if num_channels not in LAYOUTS:
        raise UsageError(f"a sound track has 1 or 2 channels, this one has {num_channels}; write it as .wav")
    rate = sound.rate if sound.rate in AAC_RATES else 48000
    return container.add_stream("aac", rate=rate, layout=LAYOUTS[num_channels])


def _write_wav(audio: Audio, part: str) -> None:
    import numpy as np

    samples = np.clip(audio.samples, -1.0, 1.0).T  # interleaved: one row of channels per instant
    with wave.open(part, "wb") as file:
        file.setnchannels(len(audio.samples))
        file.setsampwidth(2)
        file.setframerate(audio.rate)
        file.writeframes(np.round(samples * 32767.0).astype("<i2").tobytes())


def _write_tensor(value: Any, part: str) -> None:
    if is_tensor(value):
        from safetensors.torch import save_file

        save_file({"tensor": value.contiguous()}, part)
    else:
        from safetensors.numpy import save_file as save_array

        save_array({"tensor": value}, part)


def _write_text(text: str, part: str) -> None:
    Path(part).write_text(text, encoding="utf-8")
