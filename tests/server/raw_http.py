"""HTTP requests as bytes, also those that no client would send, and answers taken apart."""

from __future__ import annotations

import base64
import json
from typing import Any, NamedTuple

BOUNDARY = "part"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def message(self) -> str:
        """The message of an error in OpenAI's shape, else the body as text."""
        try:
            return str(json.loads(self.body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            return self.body.decode("latin-1")


def read_answer(data: bytes) -> Answer:
    """An answer, with all that came before its connection ended."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(body.split(b"\r\n")[1::2])  # of chunks without line breaks
    return Answer(int(first.split(" ")[1]) if first else 0, headers, body)


def request(
    method: str, target: str | bytes, *, key: str = "", headers: dict[str, str] | None = None, body: bytes | None = None
) -> bytes:
    """A whole request, after which the connection closes."""
    fields = {"Host": "localhost", "Connection": "close", **({"Authorization": f"Bearer {key}"} if key else {})}
    if body is not None:
        fields["Content-Length"] = str(len(body))
    fields |= headers or {}
    lines = [f"{name}: {value}".encode("latin-1") for name, value in fields.items()]
    path = target if isinstance(target, bytes) else target.encode("latin-1")
    return b"\r\n".join([method.encode() + b" " + path + b" HTTP/1.1", *lines, b"", body or b""])


def post(target: str, value: Any, *, key: str = "", headers: dict[str, str] | None = None) -> bytes:
    """JSON; bytes and text are sent as they are."""
    body = (
        value if isinstance(value, bytes) else value.encode() if isinstance(value, str) else json.dumps(value).encode()
    )
    return request("POST", target, key=key, headers={"Content-Type": "application/json", **(headers or {})}, body=body)


def part(name: str, content: bytes, file: str | None = None, headers: str = "") -> bytes:
    """One part of a form."""
    disposition = f'Content-Disposition: form-data; name="{name}"' + (
        f'; filename="{file}"' if file is not None else ""
    )
    return f"--{BOUNDARY}\r\n{disposition}\r\n{headers}\r\n".encode() + content + b"\r\n"


def form(target: str, *parts: bytes, key: str = "", end: bytes = f"--{BOUNDARY}--\r\n".encode()) -> bytes:
    """A multipart form."""
    return request("POST", target, key=key, headers=FORM, body=b"".join(parts) + end)


def data_url(data: bytes, media_type: str = "image/png") -> str:
    """`data:image/png;base64,...`."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
