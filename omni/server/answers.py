"""What the OpenAI routes answer, as structs. A field that keeps its default is not sent; bytes are sent as base64."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from fastapi import Response

from omni.server.encoding import ImageFormat


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all answers."""


def json_answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An HTTP answer with a JSON body."""
    return Response(msgspec.json.encode(body), status, headers, "application/json")


# Models -----------------------------------------------------------------------------------------------------------


class Model(Answer, frozen=True, kw_only=True, tag_field="object", tag="model"):
    """A graph as a model."""

    id: str
    created: int
    owned_by: str
    description: str = ""


class ModelList(Answer, frozen=True, kw_only=True, tag_field="object", tag="list"):
    """GET /v1/models."""

    data: list[Model]


# Images -----------------------------------------------------------------------------------------------------------


class TokenDetails(Answer, frozen=True, kw_only=True, omit_defaults=False):
    """Of a usage."""

    image_tokens: int = 0
    text_tokens: int = 0


class ImageUsage(Answer, frozen=True, kw_only=True, omit_defaults=False):
    """Tokens of a picture. Input tokens are not counted; output tokens are what language models of the graph wrote."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class Image(Answer, frozen=True, kw_only=True):
    """One picture, as base64 or as an address."""

    b64_json: bytes | None = None
    url: str | None = None
    revised_prompt: str | None = None
    """What a language model of the graph made of the prompt, where that is an output of the graph."""


class ImagesAnswer(Answer, frozen=True, kw_only=True):
    """POST /v1/images/generations and /v1/images/edits."""

    created: int
    data: list[Image]
    background: Literal["transparent", "opaque"] | None = None
    output_format: ImageFormat | None = None
    size: str | None = None
    usage: ImageUsage | None = None


class ImageEvent(Answer, frozen=True, kw_only=True, omit_defaults=False):
    """An event of a streamed picture: `image_generation.partial_image`, `image_edit.completed` and their like."""

    type: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    b64_json: bytes
    created_at: int
    size: str
    quality: str
    background: str
    output_format: ImageFormat
    partial_image_index: int | msgspec.UnsetType = msgspec.UNSET
    """Of a partial image, from 0."""
    usage: ImageUsage | msgspec.UnsetType = msgspec.UNSET
    """Of a completed one."""


# Videos -----------------------------------------------------------------------------------------------------------


class VideoError(Answer, frozen=True, kw_only=True):
    """Why a video failed."""

    code: str
    message: str


class Video(Answer, frozen=True, kw_only=True, tag_field="object", tag="video", omit_defaults=False):
    """A video, made or still to be made."""

    id: str
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    """Percent."""
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str | None = None
    size: str
    seconds: str
    seed: int
    remixed_from_video_id: str | None = None
    error: VideoError | None = None


class VideoList(Answer, frozen=True, kw_only=True, tag_field="object", tag="list", omit_defaults=False):
    """GET /v1/videos."""

    data: list[Video]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class VideoDeleted(Answer, frozen=True, kw_only=True, tag_field="object", tag="video.deleted"):
    """DELETE /v1/videos/{id}."""

    id: str
    deleted: bool


# Audio ------------------------------------------------------------------------------------------------------------


class SpeechDelta(Answer, frozen=True, kw_only=True, tag_field="type", tag="speech.audio.delta"):
    """Sound of a streamed speech."""

    audio: bytes


class SpeechDone(Answer, frozen=True, kw_only=True, tag_field="type", tag="speech.audio.done"):
    """The end of a streamed speech."""

    usage: dict[str, int]


# Chat -------------------------------------------------------------------------------------------------------------


class Usage(Answer, frozen=True, kw_only=True, omit_defaults=False):
    """Tokens of a completion; those of the prompt are not counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


Content = str | list[dict[str, Any]]
"""Text, or parts: `{"type": "text", "text"}` and `{"type": "image_url", "image_url": {"url"}}`."""


class AnswerMessage(Answer, frozen=True, kw_only=True, omit_defaults=False):
    """What the graph says."""

    role: Literal["assistant"] = "assistant"
    content: Content | None
    refusal: str | None = None


class Choice(Answer, frozen=True, kw_only=True, omit_defaults=False):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"] = "stop"
    logprobs: None = None


class ChatCompletion(Answer, frozen=True, kw_only=True, tag_field="object", tag="chat.completion"):
    """POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(Answer, frozen=True, kw_only=True):
    """What is new of a message."""

    role: Literal["assistant"] | None = None
    content: Content | None = None


class ChunkChoice(Answer, frozen=True, kw_only=True, omit_defaults=False):
    """A piece of an answer."""

    index: int = 0
    delta: Delta = Delta()
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class ChatChunk(Answer, frozen=True, kw_only=True, tag_field="object", tag="chat.completion.chunk"):
    """An event of a streamed completion."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
