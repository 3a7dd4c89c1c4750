"""The header `Server-Timing: graph;dur=MILLISECONDS`: what of an answer's time was the graph's own.

Whoever waits for an answer notes the graph's seconds; the middleware around all routes puts them into the header.
"""

from __future__ import annotations

from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_noted: ContextVar[list[float] | None] = ContextVar("omni_graph_seconds", default=None)
"""Seconds of the graphs behind the call that is being answered; the call's tasks share the list."""


def note_graph_seconds(seconds: float) -> None:
    """Note how long a graph has worked for the call that is being answered; outside of one, nothing happens."""
    noted = _noted.get()
    if noted is not None:
        noted.append(seconds)


class TimingMiddleware:
    """Adds the header. Pictures of one answer are drawn side by side, so that the longest time counts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        noted: list[float] = []

        async def add_header(message: Message) -> None:
            if noted and message["type"] == "http.response.start":
                value = f"graph;dur={max(noted) * 1000:.3f}".encode()
                message = {**message, "headers": [*message.get("headers", ()), (b"server-timing", value)]}
            await send(message)

        token = _noted.set(noted)
        try:
            await self._app(scope, receive, add_header)
        finally:
            _noted.reset(token)
