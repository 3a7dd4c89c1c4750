"""Media that a request brings, as data URLs, uploads or allowed URLs: bounded before they are decoded."""

from __future__ import annotations

from typing import Any, Literal

from omni.server.addresses import AddressRules
from omni.server.settings import ServerSettings

MediaType = Literal["image", "video", "audio", "tensor"]


class MediaReader:
    """Turns what a client sent for a media input into the value that a graph takes.

    One for each app: it bounds how many media are decoded at the same time.
    """

    def __init__(self, settings: ServerSettings, rules: AddressRules | None = None) -> None:
        """`rules`: what may be fetched; left out, what `settings.allowed_hosts` says."""

    async def resolve(self, value: Any, media_type: MediaType, name: str, *, alpha: bool = False) -> Any:
        """A PIL image, omni.media.Video, omni.media.Audio or tensor, or a list of them for a list.

        `value` is bytes, a starlette UploadFile, a data URL, an allowed http(s) URL, or a list of these; `name` is the
        field, for messages; `alpha` keeps the transparency of a picture (RGBA, else RGB). Raises InputError.
        """
        raise NotImplementedError


def parse_data_url(text: str, max_bytes: int) -> tuple[str, bytes]:
    """Media type (lower case, may be empty) and content of `data:image/png;base64,...`. Raises InputError."""
    raise NotImplementedError


def decode_media(data: bytes, media_type: MediaType, settings: ServerSettings, name: str, alpha: bool = False) -> Any:
    """The value of one encoded picture, clip, sound or tensor; its format is told by its content. Blocks."""
    raise NotImplementedError
