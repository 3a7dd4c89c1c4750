"""Decoded media: counted over a request, and over all that are open."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from omni.errors import InputError
from omni.media import Audio, Video
from omni.server.errors import ApiError
from omni.server.jobs import QueueFull
from omni.server.media_inputs import MediaReader
from omni.server.media_room import bytes_of
from omni.server.settings import ServerSettings
from tests.server import bombs

PNG = bombs.picture()  # 6x4


def test_bytes() -> None:
    assert bytes_of(Image.new("RGBA", (3, 2))) == 24
    assert bytes_of(Video(np.zeros((2, 3, 4, 3), np.uint8), 8.0)) == 72
    assert bytes_of(Audio(np.zeros((2, 5), np.float32), 8000)) == 40
    assert bytes_of(np.zeros(3)) == 24


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_media": 3}, "the request has more than 3 pictures, clips, sounds and tensors"),
        ({"max_request_pixels": 72}, "the request's pictures have more than 72 pixels in all"),
        ({"max_decoded_bytes": 216}, "the request's media have more than 216 bytes decoded, in all"),
    ],
)
async def test_fields_are_counted_together(limits: dict[str, int], message: str) -> None:
    reader = MediaReader(ServerSettings(**limits))  # type: ignore[arg-type]
    counted = reader.open()
    await reader.resolve([PNG, PNG], "image", "first", counted)
    await reader.resolve(PNG, "image", "second", counted)
    with pytest.raises(InputError, match=message):
        await reader.resolve(PNG, "image", "third", counted)


async def test_requests_share_the_room_until_they_close() -> None:
    reader = MediaReader(ServerSettings(max_held_bytes=150))
    first, second, third = (reader.open() for _ in range(3))
    await reader.resolve([PNG, PNG], "image", "a", first)
    with pytest.raises(ApiError, match="take all the memory") as caught:
        await reader.resolve(PNG, "image", "a", second)
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "5")
    first.close()
    first.close()
    second.close()
    await reader.resolve([PNG, PNG], "image", "a", third)


async def test_a_full_queue_is_told_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise QueueFull("full", 1.0)

    monkeypatch.setattr(Image, "open", None)
    reader = MediaReader(ServerSettings())
    with pytest.raises(QueueFull):
        await reader.resolve(PNG, "image", "a", reader.open(check))
