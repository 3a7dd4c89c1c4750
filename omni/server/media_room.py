"""How much decoded media one request may bring, and all requests together may hold in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omni.errors import InputError
from omni.media import Audio, Video
from omni.server.errors import ApiError
from omni.server.settings import ServerSettings
from omni.transport.payload import is_image

RETRY_SECONDS = 5
"""When another try is worth it while the requests of others hold the room."""


class MediaRoom:
    """The bytes of decoded media that all requests of a process hold now.

    What is being decoded is counted when it is there: for so long, `max_decoders` media more may be held.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.max_bytes = settings.max_held_bytes
        self.num_bytes = 0

    def check(self, more: int = 0) -> None:
        """Raise ApiError (503) when there is no room for `more` bytes, or for anything."""
        if self.num_bytes + more > self.max_bytes or self.num_bytes == self.max_bytes:
            raise ApiError(
                503,
                "the pictures, clips and sounds of other requests take all the memory that there is for them",
                None,
                "media_busy",
                {"Retry-After": str(RETRY_SECONDS)},
            )


class RequestMedia:
    """The media of one request, counted over all its fields. `close` gives their room back, when it is over."""

    def __init__(self, settings: ServerSettings, room: MediaRoom, check_queue: Callable[[], None]) -> None:
        """`check_queue` raises when the request could not wait in the queue: then nothing is decoded."""
        self._settings = settings
        self._room = room
        self._check_queue = check_queue
        self._num_media = 0
        self._num_pixels = 0
        self._num_bytes = 0

    def begin(self) -> None:
        """Before a medium is fetched or decoded. Raises InputError or ApiError, and what `check_queue` raises."""
        self._num_media += 1
        if self._num_media > (most := self._settings.max_media):
            raise InputError(f"the request has more than {most} pictures, clips, sounds and tensors")
        self._check_queue()
        self._room.check()

    def add(self, value: Any) -> None:
        """Count a decoded medium. Raises InputError or ApiError."""
        settings, num_bytes = self._settings, bytes_of(value)
        if is_image(value):
            self._num_pixels += value.width * value.height
        if self._num_pixels > settings.max_request_pixels:
            raise InputError(f"the request's pictures have more than {settings.max_request_pixels} pixels in all")
        if self._num_bytes + num_bytes > settings.max_decoded_bytes:
            raise InputError(f"the request's media have more than {settings.max_decoded_bytes} bytes decoded, in all")
        self._room.check(num_bytes)
        self._num_bytes += num_bytes
        self._room.num_bytes += num_bytes

    def close(self) -> None:
        """Give the room back."""
        self._room.num_bytes -= self._num_bytes
        self._num_bytes = 0


def bytes_of(value: Any) -> int:
    """Memory that a decoded medium takes, in bytes."""
    if isinstance(value, Video):
        return value.frames.nbytes
    if isinstance(value, Audio):
        return value.samples.nbytes
    if is_image(value):
        return int(value.width * value.height * len(value.getbands()))
    return int(value.nbytes)
