"""What the tables of hostile requests are made of: a row is a request, its exact status and its exact error message.

`{job}` and `{video}` stand for the ids of a finished job and video of anna's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.server import bombs
from tests.server.raw_http import post, request

ANNA = "anna-" + "0123456789abcdef"
BEN = "ben-" + "0123456789abcdef"

IMAGES = "/v1/images/generations"
EDITS = "/v1/images/edits"
CHAT = "/v1/chat/completions"
VIDEOS = "/v1/videos"
SPEECH = "/v1/audio/speech"
PNG = bombs.picture()
CHUNKED = b"\r\n".join(
    (
        f"POST {IMAGES} HTTP/1.1".encode(),
        b"Host: localhost",
        b"Connection: close",
        f"Authorization: Bearer {ANNA}".encode(),
        b"Transfer-Encoding: chunked",
        b"",
        b"",
    )
)
"""The head of a request whose body comes in chunks."""

NO_KEY = "an API key is missing: send the header 'Authorization: Bearer SECRET'"
WRONG_KEY = "the API key is not one of this server: 'Authorization: Bearer SECRET' needs the secret of a key"
FOREIGN_HOST = (
    "this server does not go by the name in the header Host; reach it by its own name, or start it with "
    "--trusted-host NAME"
)
FOREIGN_ORIGIN = "web pages of other origins may not call this server; start it with --cors-origin ORIGIN"
NO_HTTP = "Invalid HTTP request received."
NOWHERE = "there is no such address here"
NO_JOB = "there is no job '{job}'"
SERVED = "(served: echo, film, looker, painter, retoucher, singer)"
PAINTER_TAKES = "(this graph takes: height, num_inference_steps, prompt, width)"
NO_FILE = "must be a data URL, an http(s) URL or an upload; no file of the server is opened"
NOT_A_NUMBER = "Input should be a valid integer, unable to parse string as an integer"
PRIVATE = "is on a private, local or reserved network; no request is sent there"
NO_MEDIA = "is not a clip or sound that can be read (mov, mp4, matroska, webm, gif, wav, mp3, flac, ogg)"
NO_HOST = "is not a host that this server sends requests to; start the server with --allow-host HOST"
NO_EVENT = "Last-Event-ID must be the number of an event"
TOO_LARGE = "the body is larger than 399999 bytes, the limit of this server"
TOO_SLOW = "the body came too slowly: 0.5 s and 65536 bytes/s more are allowed"
NUMBERS = "which is too large or none; numbers have up to 64 bits"


class Case(NamedTuple):
    """One request. `message` is None when it does no harm and is carried out."""

    name: str
    request: bytes
    status: int
    message: str | None


def get(target: str, headers: dict[str, str] | None = None) -> bytes:
    """With anna's key."""
    return request("GET", target, key=ANNA, headers=headers)


def send(target: str, body: Any, headers: dict[str, str] | None = None) -> bytes:
    """JSON with anna's key."""
    return post(target, body, key=ANNA, headers=headers)


def draw(**fields: Any) -> bytes:
    """A picture."""
    return send(IMAGES, {"model": "painter", "prompt": "x"} | fields)


def talk(content: Any = "x", **fields: Any) -> bytes:
    """A chat completion."""
    return send(CHAT, {"model": "echo", "messages": [{"role": "user", "content": content}]} | fields)


def film(**fields: Any) -> bytes:
    """A video."""
    return send(VIDEOS, {"model": "film", "prompt": "x"} | fields)


def make(graph: str, body: Any, headers: dict[str, str] | None = None) -> bytes:
    """A job."""
    return send(f"/v1/graphs/{graph}/jobs", body, headers)


def echo(headers: dict[str, str] | None = None, **fields: Any) -> bytes:
    """A job that gives its prompt back."""
    return make("echo", {"inputs": {"prompt": "x"}} | fields, headers)


def look(image: Any, **inputs: Any) -> bytes:
    """A job that looks at a picture."""
    return make("looker", {"inputs": {"image": image} | inputs})
