"""Pictures and sounds as bytes."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from omni.errors import InputError
from omni.media import Audio
from omni.server.encoding import AUDIO_ENCODERS, PCM_RATE, encode_audio, encode_image, preview_url


def tone(rate: int, num_channels: int) -> Audio:
    """Half a second."""
    samples = np.sin(np.arange(rate // 2) * 440 * 2 * np.pi / rate, dtype=np.float32)
    return Audio(np.stack([samples] * num_channels) * 0.5, rate)


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_pictures(image_format: str) -> None:
    picture = Image.new("RGBA", (6, 4), (255, 0, 0, 128))
    found = Image.open(io.BytesIO(encode_image(picture, image_format)))  # type: ignore[arg-type]
    assert (found.format, found.size) == (image_format.upper(), (6, 4))
    assert ("A" in found.getbands()) == (image_format != "jpeg")


def test_previews_are_data_urls() -> None:
    assert preview_url(Image.new("RGB", (4, 4))).startswith("data:image/jpeg;base64,/9j/")


@pytest.mark.parametrize("rate", [6_000, 22_050, 44_100])
@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("audio_format", [name for name in AUDIO_ENCODERS if name != "pcm"])
def test_sounds(audio_format: str, num_channels: int, rate: int) -> None:
    data = encode_audio(tone(rate, num_channels), audio_format)  # type: ignore[arg-type]
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.audio[0]
        frames = [frame.to_ndarray() for frame in container.decode(stream)]
        assert stream.channels == num_channels
        num_samples = sum(frame.shape[1] // (1 if frame.shape[0] > 1 else stream.channels) for frame in frames)
        assert num_samples / stream.rate == pytest.approx(0.5, abs=0.1)


def test_raw_samples_are_mono_and_of_one_rate() -> None:
    samples = np.frombuffer(encode_audio(tone(44_100, 2), "pcm"), "<i2")
    assert len(samples) == pytest.approx(PCM_RATE / 2, abs=50)
    assert 0.45 < np.abs(samples).max() / 32767 < 0.55


def test_too_many_channels_are_refused() -> None:
    with pytest.raises(InputError, match="3 channels"):
        encode_audio(tone(8_000, 3), "wav")
