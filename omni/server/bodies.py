"""What the OpenAI routes take besides the parameters of omni/server/fields.py: one struct for each route."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from omni.server.encoding import AudioFormat, ImageFormat

Count = Annotated[int, Meta(ge=1)]
ExtraBody = Annotated[
    dict[str, Any], Meta(description="Further parameters; those that the graph does not know are ignored.")
]


class ApiRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What every OpenAI route takes."""

    model: str | None = None
    """Name of the graph, as /v1/models lists it; may be left out where only one graph fits."""
    seed: int | None = None
    """Makes the answer repeatable, 0 to 4294967295; drawn at random when left out."""
    extra_body: ExtraBody = {}


class ImageRequest(ApiRequest, frozen=True, kw_only=True):
    """POST /v1/images/generations."""

    n: Count = 1
    """Pictures; they are drawn with the seeds `seed`, `seed` + 1, ..."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: ImageFormat = "png"
    output_compression: Annotated[int, Meta(ge=0, le=100)] = 95
    """Quality of JPEG and WebP pictures, in percent."""
    background: Literal["auto", "opaque", "transparent"] = "auto"
    stream: bool = False
    partial_images: Annotated[int, Meta(ge=0, le=3)] = 0
    """With `stream`: how many pictures to show on the way."""


class ImageEditRequest(ImageRequest, frozen=True, kw_only=True):
    """POST /v1/images/edits. Pictures are files of a form, or data URLs and allowed URLs."""

    image: Any = None
    """The picture to edit, or a list of pictures."""
    images: Any = None
    """The same in JSON: a list of `{"image_url": ...}` objects or URLs."""
    mask: Any = None
    """A picture of the same size: where it is transparent (or, without transparency, white) the picture may change."""


class VideoRequest(ApiRequest, frozen=True, kw_only=True):
    """POST /v1/videos."""

    input_reference: Any = None
    """A picture (or clip) to start from: a file, a URL, or `{"image_url": ...}`."""
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    """Higher runs first."""
    webhook: str | None = None
    """An allowed address that is told when the video is over."""


class SpeechRequest(ApiRequest, frozen=True, kw_only=True):
    """POST /v1/audio/speech."""

    response_format: AudioFormat = "mp3"
    stream_format: Literal["audio", "sse"] = "audio"


class SoundRequest(ApiRequest, frozen=True, kw_only=True):
    """POST /v1/audio/generations."""

    response_format: AudioFormat = "wav"


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Of a streamed chat completion."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ImageUrl(msgspec.Struct, frozen=True, kw_only=True):
    """A picture in a message."""

    url: str
    detail: str | None = None


class TextPart(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Text in a message."""

    text: str


class ImagePart(msgspec.Struct, frozen=True, kw_only=True, tag="image_url"):
    """A picture in a message: a data URL or an allowed URL."""

    image_url: ImageUrl


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart] | None = None
    """None, or left out: an answer of the assistant that said nothing."""
    name: str | None = None


class ChatRequest(ApiRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    n: Count = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    modalities: list[Literal["text", "image"]] | None = None
    """Kinds of answer that are wanted, among those that the graph gives; left out, all of them."""
