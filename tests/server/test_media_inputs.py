"""Media of requests: what is read, and each way to do harm with one, with its exact answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omni.decode import ReadLimits
from omni.errors import InputError
from omni.media import Audio, Video
from omni.server import media_inputs
from omni.server.addresses import AddressRules
from omni.server.media_inputs import MediaReader, MediaType, decode_here, parse_data_url, read_limits
from omni.server.settings import ServerSettings
from tests.server import bombs

SMALL = ServerSettings(
    max_media_bytes=100_000,
    max_pixels=10_000,
    max_side=500,
    max_frames=10,
    max_decoded_bytes=200_000,
    decode_seconds=20.0,
    max_media=3,
)


NO_FILE = "input 'photo' must be a data URL, an http(s) URL or an upload; no file of the server is opened"


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


async def read(value: Any, media_type: MediaType = "image", **options: Any) -> Any:
    return await (reader := MediaReader(SMALL)).resolve(value, media_type, "photo", reader.open(), **options)


async def refusal(value: Any, media_type: MediaType = "image") -> str:
    with pytest.raises(InputError) as caught:
        await read(value, media_type)
    return str(caught.value)


# Data URLs ---------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=100), st.sampled_from(["", "image/png", "IMAGE/PNG", "text/plain;charset=utf-8"]))
def test_data_urls_come_back(data: bytes, media_type: str) -> None:
    found = parse_data_url(data_url(data, media_type), 100, "photo")
    assert found == (media_type.split(";")[0].lower(), data)


@given(st.text(max_size=80) | st.text(max_size=60).map("data:image/png;base64,".__add__))
def test_any_text_is_a_data_url_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        media_type, data = parse_data_url(text, 20, "photo")
        assert len(data) <= 20
        assert media_type == media_type.lower()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:", "input 'photo' is not a data URL with base64 content: data:image/png;base64,..."),
        ("data:image/png,abc", "input 'photo' is not a data URL with base64 content: data:image/png;base64,..."),
        ("data:image/png;base64", "input 'photo' is not a data URL with base64 content: data:image/png;base64,..."),
        ("data:image/png;base64;x=1,abcd", "input 'photo' is not a data URL with base64 content"),
        ("data:" + "a" * 300 + ";base64,abcd", "input 'photo' is not a data URL with base64 content"),
        ("data:;base64,abc", "input 'photo' is a data URL whose base64 is broken: Incorrect padding"),
        ("data:;base64,ab cd", "input 'photo' is a data URL whose base64 is broken: Only base64 data is allowed"),
        ("data:;base64,YQ==YQ==", "input 'photo' is a data URL whose base64 is broken: Excess data after padding"),
        ("data:;base64,ab-_", "input 'photo' is a data URL whose base64 is broken: Only base64 data is allowed"),
        (
            "data:;base64,\u00e9\u00e9\u00e9\u00e9",
            "input 'photo' is a data URL whose base64 is broken: string",
        ),
        ("data:;base64," + "A" * 200, "input 'photo' has more than 100 bytes, the limit of this server"),
    ],
)
def test_bad_data_urls_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_data_url(text, 100, "photo")
    assert str(caught.value).startswith(message)


# Sources -----------------------------------------------------------------------------------------------------------


async def test_a_picture_comes_from_bytes_and_a_data_url() -> None:
    data = bombs.picture()
    for value in (data, data_url(data), data_url(data, "text/html")):
        image = await read(value)
        assert (image.size, image.mode) == ((6, 4), "RGB")


async def test_several_pictures_come_as_a_list() -> None:
    images = await read([bombs.picture(), data_url(bombs.picture(7, 7))])
    assert [image.size for image in images] == [(6, 4), (7, 7)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "/etc/passwd",
            "input 'photo' must be a data URL, an http(s) URL or an upload; no file of the server is opened",
        ),
        (
            "file:///etc/passwd",
            "input 'photo' must be a data URL, an http(s) URL or an upload; no file of the server is",
        ),
        ("", "input 'photo' must be a data URL, an http(s) URL or an upload; no file of the server is opened"),
        ({"path": "a"}, "input 'photo' must be a data URL, an http(s) URL or an upload, not an object"),
        (None, "input 'photo' must be a data URL, an http(s) URL or an upload, not null"),
        (7, "input 'photo' must be a data URL, an http(s) URL or an upload, not a number"),
        (True, "input 'photo' must be a data URL, an http(s) URL or an upload, not true or false"),
        ([["data:"]], "input 'photo[0]' must be a data URL, an http(s) URL or an upload, not a list"),
        (["data:"] * 4, "input 'photo' has 4 items; at most 3 are read"),
        (["data:;base64,"], "input 'photo[0]' is empty"),
        (b"", "input 'photo' is empty"),
        (b"x" * 100_001, "input 'photo' has more than 100000 bytes, the limit of this server"),
        ("http://media.test/a.png", "'media.test' is not a host that this server sends requests to; start the"),
        ("HTTPS://169.254.169.254/", "'169.254.169.254' is not a host that this server sends requests to; start"),
    ],
)
async def test_other_sources_are_refused(value: Any, message: str) -> None:
    assert (await refusal(value)).startswith(message)


async def test_an_allowed_url_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    async def fetch(url: str, rules: AddressRules, max_bytes: int, seconds: float) -> bytes:
        fetched.append((url, rules.allowed_hosts, max_bytes, seconds))
        return bombs.picture()

    monkeypatch.setattr(media_inputs, "fetch", fetch)
    reader = MediaReader(ServerSettings(allowed_hosts=("media.test",), max_media_bytes=1000, fetch_seconds=3.0))
    assert (await reader.resolve("https://media.test/a", "image", "photo", reader.open())).size == (6, 4)
    assert fetched == [("https://media.test/a", ("media.test",), 1000, 3.0)]


async def test_a_thread_keeps_its_slot_when_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    going, may_end = threading.Event(), threading.Event()

    def decode(data: bytes, *_: object) -> Image.Image:
        going.set()
        if data == b"slow":
            assert may_end.wait(20)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(media_inputs, "decode_here", decode)
    reader = MediaReader(ServerSettings(max_decoders=1))
    first = asyncio.ensure_future(reader.resolve(b"slow", "image", "photo", reader.open()))
    assert await asyncio.to_thread(going.wait, 20)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await reader.resolve(b"quick", "image", "photo", reader.open())
    may_end.set()
    async with asyncio.timeout(20):
        assert (await reader.resolve(b"quick", "image", "photo", reader.open())).size == (1, 1)


# Pictures ----------------------------------------------------------------------------------------------------------


async def test_pictures_come_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert (await read(bombs.picture(form="JPEG", exif=exif))).size == (4, 6)


async def test_transparency_stays_where_it_is_asked_for() -> None:
    image = await read(bombs.picture(mode="RGBA"), alpha=True)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (200, 10, 30, 90)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"nonsense", "input 'photo' is not a picture that can be read; PNG, JPEG, WEBP, GIF, BMP are"),
        (bombs.picture(form="TIFF"), "input 'photo' is not a picture that can be read; PNG, JPEG, WEBP, GIF, BMP are"),
        (bombs.SVG, "input 'photo' is a drawing (SVG) and no picture; send it as PNG, JPEG or WebP"),
        (b"\xef\xbb\xbf \n<svg/>", "input 'photo' is a drawing (SVG) and no picture; send it as PNG, JPEG or WebP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "input 'photo' is not a picture that can be read"),
        (bombs.png(30_000, 30_000), "input 'photo': too many pixels; at most 10000 are read"),
        (bombs.png(2**31 - 1, 2**31 - 1), "input 'photo': too many pixels; at most 10000 are read"),
        (bombs.png_bomb(1000), "input 'photo': 1000x1000 pixels; at most 10000 are read"),
        (bombs.picture(101, 100), "input 'photo': 101x100 pixels; at most 10000 are read"),
        (bombs.picture(501, 2), "input 'photo': 501x2 pixels; a side has at most 500"),
        (bombs.png(0, 5), "input 'photo' is "),
        (bombs.many_chunks(4000), ""),
        (bombs.animation("GIF"), "input 'photo' is an animated picture; send a still one, or a clip where a video is"),
        (bombs.animation("WEBP"), "input 'photo' is an animated picture; send a still one, or a clip where a video is"),
        (bombs.animation("PNG"), "input 'photo' is an animated picture; send a still one, or a clip where a video is"),
        (bombs.picture(90, 90, form="JPEG")[:300], "input 'photo' is a broken picture: "),
        (bombs.clip(), "input 'photo' is not a picture that can be read"),
    ],
)
async def test_bad_pictures_are_refused(data: bytes, message: str) -> None:
    if message:
        assert (await refusal(data)).startswith(message)
    else:
        assert (await read(data)).size == (1, 1)  # the first row is there


async def test_a_picture_of_many_parts_is_refused_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", None)
    reader = MediaReader(ServerSettings())
    with pytest.raises(InputError, match="input 'photo' is made of more parts than any honest picture; write it anew"):
        await reader.resolve(bombs.many_chunks(30_000), "image", "photo", reader.open())


@pytest.mark.filterwarnings("ignore")  # PIL warns of broken metadata
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_broken_pictures_are_input_errors(form: str, data: st.DataObject) -> None:
    """Bytes changed, cut out and doubled."""
    content = bytearray(bombs.picture(40, 30, mode="L" if form == "GIF" else "RGB", form=form))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.sampled_from([1, 1, 4, 50]))
        content[place : place + length] = data.draw(st.binary(max_size=8) | st.just(bytes(content[place:])))
        if not content:
            return
    with contextlib.suppress(InputError):
        image = decode_here(bytes(content), "image", "it", read_limits(SMALL))
        assert image.width * image.height <= SMALL.max_pixels


# Clips and sounds --------------------------------------------------------------------------------------------------


async def test_clips_are_decoded_in_a_process_of_their_own() -> None:
    video = await read(data_url(bombs.clip(), "video/mp4"), "video")
    assert isinstance(video, Video)
    assert (video.frames.shape, video.fps) == ((3, 32, 32, 3), 8.0)
    assert np.abs(video.frames[2].astype(int) - 20).max() <= 4
    assert video.frames.flags.writeable


async def test_sounds_are_decoded_in_a_process_of_their_own() -> None:
    audio = await read(bombs.sound(), "audio")
    assert isinstance(audio, Audio)
    assert (audio.samples.shape, audio.samples.dtype, audio.rate) == ((1, 800), np.float32, 8000)


@pytest.mark.parametrize(
    ("data", "media_type", "message"),
    [
        (b"nonsense" * 9, "video", "input 'photo' is not a clip or sound that can be read (mov, mp4, matroska, webm,"),
        (b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", "video", "input 'photo' is not a clip or sound that can be read"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "video", "input 'photo' is not a clip or sound that can be read"),
        (bombs.clip(width=128, height=128), "video", "input 'photo': 128x128 pixels; at most 10000 are read"),
        (bombs.clip(11), "video", "input 'photo' has more than 10 frames; shorten it"),
        (bombs.clip(10, 96, 96), "video", "input 'photo' unpacks to more than 200000 bytes; shorten or shrink it"),
        (bombs.clip(codec="libx265"), "audio", "input 'photo' has no sound track"),
        (
            bombs.clip(codec="ffv1", form="matroska"),
            "video",
            "input 'photo' is coded as ffv1, which is not read; H.264",
        ),
        (bombs.sound(), "video", "input 'photo' has no video track"),
        (bombs.silence_bomb(100_000), "audio", "input 'photo' unpacks to more than 200000 bytes; shorten or shrink it"),
        (bombs.index_bomb(150_000_000), "video", "input 'photo' has no frames"),
    ],
)
async def test_bad_clips_and_sounds_are_refused(data: bytes, media_type: MediaType, message: str) -> None:
    assert len(data) < 20_000
    assert (await refusal(data, media_type)).startswith(message)


# Tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"nonsense" * 9, "input 'photo' is not a safetensors file: "),
        (b"\x80\x04\x95cposix\nsystem\n.", "input 'photo' is not a safetensors file: "),  # a pickle
        (b"PK\x03\x04" + b"\0" * 60, "input 'photo' is not a safetensors file: "),  # a torch archive
        (b"\xff" * 8 + b"{}", "input 'photo' is not a safetensors file: "),
        (bombs.safetensors({}), "input 'photo' must hold one tensor, and holds 0: "),
        (
            bombs.safetensors({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4),
            "input 'photo' is not a safetensors file: ",
        ),
        (
            bombs.safetensors(
                {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate("ab")},
                b"\0\0",
            ),
            "input 'photo' must hold one tensor, and holds 2: a, b",
        ),
    ],
)
async def test_bad_tensors_are_refused(data: bytes, message: str) -> None:
    assert (await refusal(data, "tensor")).startswith(message)


def test_large_tensors_are_refused() -> None:
    with pytest.raises(InputError, match="it has more than 5 bytes; at most these are read"):
        decode_here(b"x" * 6, "tensor", "it", ReadLimits(max_decoded_bytes=5))
