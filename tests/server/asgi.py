"""A client for ASGI apps that the tests write themselves: says what it sends, part by part, and collects the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from omni.server.refusal import App

HELD = None
"""A part that never comes: the client has stopped sending, and stays."""


class Answer(NamedTuple):
    """What came back; `status` is 0 when nothing did."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error of OpenAI's shape."""
        return dict(json.loads(self.body)["error"])


async def call(
    app: App,
    path: str = "/",
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    parts: Sequence[bytes | None] = (b"",),
    scope_type: str = "http",
) -> Answer:
    """One request, its body in parts."""
    left = asyncio.Event()
    waiting = list(parts)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if waiting and waiting[0] is HELD:
            await left.wait()
        if not waiting:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope = {"type": scope_type, "path": path, "method": method, "headers": pairs, "query_string": b""}
    await app(scope, receive, send)
    if not sent:
        return Answer(0, {}, b"")
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers with the key's name and the size of the body."""
    size = 0
    while (message := await receive())["type"] == "http.request":
        size += len(message["body"])
        if not message["more_body"]:
            break
    key = scope.get("state", {}).get("key")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{key} {size}".encode()})
