"""Media files: what is written comes back, what cannot be read is told, and no half file is left."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from omni import files
from omni.decode import ReadLimits
from omni.errors import InputError, UsageError
from omni.files import SUFFIXES, check_folder, kind_of, read_media, write_output
from omni.media import Audio, Video

RANDOM = np.random.default_rng(0)


def picture(width: int = 6, height: int = 4, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(RANDOM.integers(0, 255, shape, dtype=np.uint8))


def clip(num_frames: int = 8, width: int = 32, height: int = 32, fps: float = 8.0) -> Video:
    return Video(RANDOM.integers(0, 255, (num_frames, height, width, 3), dtype=np.uint8), fps)


def sound(num_channels: int = 2, num_samples: int = 16000, rate: int = 16000) -> Audio:
    wave_form = np.sin(np.arange(num_samples) / 20.0, dtype=np.float32)
    return Audio(np.tile(wave_form, (num_channels, 1)), rate)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("words", "text"),
        (picture(), "image"),
        (clip(), "video"),
        (sound(), "audio"),
        (np.zeros(2), "tensor"),
        ({"a": 1}, "json"),
        (3, "json"),
    ],
)
def test_kinds_are_told_apart(value: Any, kind: str) -> None:
    assert kind_of(value) == kind


# Pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES["image"])
def test_a_picture_comes_back(tmp_path: Path, suffix: str) -> None:
    flat = Image.new("RGB", (8, 8), (200, 30, 90))
    path = write_output(flat, tmp_path / f"a{suffix}")
    assert np.abs(pixels(read_media(path, "image")).astype(int) - pixels(flat)).max() <= 6


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["RGB", "L"]), st.text(max_size=200))
def test_a_png_keeps_pixels_and_metadata(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, mode: str, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.png"
    metadata = "".join(letter for letter in text if letter.isprintable())
    image = picture(width, height, mode)
    write_output(image, path, metadata=metadata)
    with Image.open(path) as found:
        assert found.info.get("omni", "") == metadata
        assert np.array_equal(pixels(found), pixels(image))


def test_a_picture_with_alpha_becomes_a_jpeg(tmp_path: Path) -> None:
    assert read_media(write_output(picture(mode="RGBA"), tmp_path / "a.jpg"), "image").mode == "RGB"


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture(6, 4).save(tmp_path / "a.jpg", exif=exif)
    assert read_media(tmp_path / "a.jpg", "image").size == (4, 6)


def test_pictures_come_as_rgb(tmp_path: Path) -> None:
    picture(mode="RGBA").save(tmp_path / "a.png")
    assert read_media(tmp_path / "a.png", "image").mode == "RGB"


def test_a_huge_picture_is_refused(tmp_path: Path) -> None:
    path = write_output(picture(), tmp_path / "a.png")
    with pytest.raises(InputError, match="6x4 pixels; at most 10"):
        read_media(path, "image", ReadLimits(max_pixels=10))


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_output(picture(20, 20), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="too many pixels"):
        read_media(path, "image")


def test_half_a_picture_is_refused(tmp_path: Path) -> None:
    path = write_output(picture(64, 64), tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="broken picture"):
        read_media(path, "image")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("image", "is not a picture"),
        ("video", "is not a clip or sound"),
        ("audio", "is not a clip or sound"),
        ("tensor", "is not a safetensors file"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"nothing of the kind" * 9)
    with pytest.raises(InputError, match=message):
        read_media(path, kind)


def test_formats_that_few_use_are_refused(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.eps")
    with pytest.raises(InputError, match=r"not a picture that can be read; PNG, JPEG, WEBP, GIF, BMP, TIFF are"):
        read_media(tmp_path / "a.eps", "image")


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_common_formats_are_read(tmp_path: Path, suffix: str) -> None:
    picture().save(tmp_path / "a", format=suffix)
    assert read_media(tmp_path / "a", "image").size == (6, 4)


@pytest.mark.parametrize(
    "playlist",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"],
)
def test_playlists_open_nothing(tmp_path: Path, playlist: str) -> None:
    write_output(clip(), tmp_path / "a.mp4")
    for suffix in (".mp4", ".m3u8"):
        path = tmp_path / f"list{suffix}"
        path.write_text(playlist.format("a.mp4"))
        with pytest.raises(InputError, match="is not a clip or sound that can be read"):
            read_media(path, "video")


@pytest.mark.parametrize(
    ("container", "codec"), [("matroska", "flac"), ("ogg", "flac"), ("flac", "flac"), ("mp3", "mp3")]
)
def test_sounds_of_other_formats_are_read(tmp_path: Path, container: str, codec: str) -> None:
    import av

    samples = (sound(1).samples * 30000).astype(np.int16)
    with av.open(str(tmp_path / "a"), "w", format=container) as file:
        stream = file.add_stream(codec, rate=16000, layout="mono")
        form = "s16" if codec == "flac" else "s16p"
        frame = av.AudioFrame.from_ndarray(samples, format=form, layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    assert read_media(tmp_path / "a", "audio").rate == 16000


@pytest.mark.parametrize("kind", ["image", "video", "audio", "tensor"])
def test_missing_files_are_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=r"cannot read .*gone: No such file"):
        read_media(tmp_path / "gone", kind)


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        read_media(tmp_path, "image")


# Clips and sounds -------------------------------------------------------------------------------------------------


def test_a_clip_comes_back_as_mp4(tmp_path: Path) -> None:
    frames = np.repeat(np.linspace(0, 250, 8, dtype=np.uint8), 32 * 32 * 3).reshape(8, 32, 32, 3)
    path = write_output(Video(frames, 12.5), tmp_path / "a.mp4")
    found = read_media(path, "video")
    assert found.frames.shape == frames.shape
    assert found.frames.dtype == np.uint8
    assert found.fps == 12.5
    assert np.abs(found.frames.astype(int) - frames).max() <= 8
    with pytest.raises(InputError, match="no sound track"):
        read_media(path, "audio")


def test_odd_sides_are_padded(tmp_path: Path) -> None:
    found = read_media(write_output(clip(width=33, height=31), tmp_path / "a.mp4"), "video")
    assert found.frames.shape[1:3] == (32, 34)


def test_a_clip_carries_its_sound(tmp_path: Path) -> None:
    path = write_output(clip(), tmp_path / "a.mp4", sound=sound())
    found = read_media(path, "audio")
    assert (found.rate, len(found.samples)) == (16000, 2)
    assert abs(found.samples.shape[1] - 16000) <= 2048
    assert 0.5 < np.abs(found.samples).max() < 1.2
    assert len(read_media(path, "video").frames) == 8


def test_a_sound_track_of_a_rare_rate_is_resampled(tmp_path: Path) -> None:
    path = write_output(clip(), tmp_path / "a.mp4", sound=sound(1, 10000, 10000))
    found = read_media(path, "audio")
    assert found.rate == 48000
    assert abs(found.samples.shape[1] - 48000) <= 4096


def test_a_sound_track_of_many_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has 3; write it as \.wav"):
        write_output(clip(), tmp_path / "a.mp4", sound=sound(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations(tmp_path: Path, suffix: str) -> None:
    path = write_output(clip(num_frames=5), tmp_path / f"a{suffix}")
    with Image.open(path) as image:
        assert image.n_frames == 5  # type: ignore[attr-defined]


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=200), st.integers(1, 3))
def test_wav_keeps_samples_to_16_bits(
    tmp_path_factory: pytest.TempPathFactory, samples: list[float], num_channels: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.wav"
    given_samples = np.array([samples] * num_channels, dtype=np.float32)
    write_output(Audio(given_samples, 22050), path)
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (num_channels, 22050, 2)
    found = read_media(path, "audio")
    assert found.samples.shape == given_samples.shape
    assert np.abs(found.samples - given_samples).max() < 1 / 16000


# The rest ---------------------------------------------------------------------------------------------------------


def test_tensors_come_back(tmp_path: Path) -> None:
    import torch

    tensor = torch.randn(3, 5).to(torch.bfloat16).T
    assert torch.equal(read_media(write_output(tensor, tmp_path / "a.safetensors"), "tensor"), tensor)
    array = RANDOM.random((2, 2))
    assert np.array_equal(read_media(write_output(array, tmp_path / "b.safetensors"), "tensor").numpy(), array)


def test_a_file_of_many_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(1), "b": np.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="must hold one tensor, and holds 2: a, b"):
        read_media(tmp_path / "a.safetensors", "tensor")


def test_text_and_json(tmp_path: Path) -> None:
    assert write_output("a snowman", tmp_path / "a.txt").read_text() == "a snowman\n"
    assert (
        write_output({"\u00e9": [1]}, tmp_path / "a.json").read_text(encoding="utf-8")
        == '{\n  "\u00e9": [\n    1\n  ]\n}\n'
    )


def test_a_wrong_suffix_says_which_are_right(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"audio is written as \.wav, not as '\.mp3'"):
        write_output(sound(), tmp_path / "a.mp3")


@pytest.mark.parametrize(
    ("value", "suffix"), [("\ud800", ".txt"), ({(1, 2): 3}, ".json"), (Video(clip().frames, 0.0), ".gif")]
)
def test_what_a_writer_cannot_take_is_told(tmp_path: Path, value: Any, suffix: str) -> None:
    with pytest.raises(UsageError, match=rf"cannot write .*a\{suffix}: \w+Error"):
        write_output(value, tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_is_kept(tmp_path: Path) -> None:
    path = write_output("old", tmp_path / "a.txt", replace=False)
    with pytest.raises(FileExistsError):
        write_output("new", path, replace=False)
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_output("old", tmp_path / "a.txt")

    def fail(text: str, part: str) -> None:
        Path(part).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_text", fail)
    with pytest.raises(UsageError, match="No space left"):
        write_output("new", path)
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_written_files_have_usual_permissions(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    assert write_output("a", tmp_path / "a.txt").stat().st_mode == usual.stat().st_mode


def test_folders_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="no such folder"):
        check_folder(tmp_path / "gone")

    def refuse(self: Path, exist_ok: bool = True) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UsageError, match="cannot write there: Permission denied"):
        check_folder(tmp_path)
