"""Values of graphs as bytes for an answer: pictures, sounds and data URLs, encoded in memory. Everything blocks."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from omni.errors import InputError
from omni.media import Audio

if TYPE_CHECKING:
    from PIL import Image

ImageFormat = Literal["png", "jpeg", "webp"]
AudioFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]
IMAGE_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
OPUS_RATE = 48_000
PCM_RATE = 24_000
"""Of OpenAI's `pcm`: 16 bit, one channel, no header."""
PREVIEW_PIXELS = 256
PREVIEW_QUALITY = 70


class Encoder(msgspec.Struct, frozen=True):
    """How FFmpeg writes a sound."""

    container: str
    codec: str
    media_type: str
    rates: tuple[int, ...] = ()
    """Samples per second that the codec takes; none: all. Others are converted to the last."""


AUDIO_ENCODERS: dict[AudioFormat, Encoder] = {
    "mp3": Encoder("mp3", "libmp3lame", "audio/mpeg", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "opus": Encoder("ogg", "libopus", "audio/ogg", (OPUS_RATE,)),
    "aac": Encoder("adts", "aac", "audio/aac", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)),
    "flac": Encoder("flac", "flac", "audio/flac"),
    "wav": Encoder("wav", "pcm_s16le", "audio/wav"),
    "pcm": Encoder("s16le", "pcm_s16le", "audio/pcm", (PCM_RATE,)),
}


def encode_image(image: Image.Image, image_format: ImageFormat = "png", quality: int = 95) -> bytes:
    """The picture as a file; `quality` 1 to 100 is for JPEG and WebP, and JPEG keeps no transparency."""
    file = io.BytesIO()
    if image_format == "jpeg":
        image = image.convert("RGB")
    options = {} if image_format == "png" else {"quality": quality}
    image.save(file, format=image_format.upper(), **options)
    return file.getvalue()


def data_url(data: bytes, media_type: str) -> str:
    """`data:image/png;base64,...`."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def preview_url(image: Image.Image) -> str:
    """A preview as a data URL of a small JPEG, PREVIEW_PIXELS at its longer side."""
    small = image.convert("RGB")
    small.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
    return data_url(encode_image(small, "jpeg", PREVIEW_QUALITY), "image/jpeg")


def encode_audio(audio: Audio, audio_format: AudioFormat) -> bytes:
    """The sound as a file; `pcm` is 24 kHz, mono, 16 bit without a header. Raises InputError for too many channels."""
    import av
    import numpy as np

    encoder = AUDIO_ENCODERS[audio_format]
    if len(audio.samples) > 2:
        raise InputError(f"the sound has {len(audio.samples)} channels; answers have 1 or 2")
    mono = audio_format == "pcm" or len(audio.samples) == 1
    rate = audio.rate if not encoder.rates or audio.rate in encoder.rates else encoder.rates[-1]
    file = io.BytesIO()
    with av.open(file, "w", format=encoder.container) as container:
        stream: Any = container.add_stream(encoder.codec, rate=rate, layout="mono" if mono else "stereo")
        samples = np.ascontiguousarray(np.clip(audio.samples, -1.0, 1.0), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono" if len(samples) == 1 else "stereo")
        frame.sample_rate = audio.rate
        resampler = av.AudioResampler(stream.format, stream.layout, rate, stream.codec_context.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return file.getvalue()
