"""Bounds on a request as bytes: its body, headers and JSON, and the pace at which its answer is read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn

from starlette.requests import ClientDisconnect

from omni.errors import InputError
from omni.server.access import AccessGuard
from omni.server.refusal import App, Message, Receive, Scope, Send, header, refuse
from omni.server.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_guards(app: FastAPI, settings: ServerSettings) -> None:
    """Put body limits, access and CORS around an app; call it last in `build_app`.

    `request.state.key` is then the name of the caller's API key, or an empty string.
    """
    from starlette.middleware.cors import CORSMiddleware

    # The last one added is outermost: a browser asks for CORS without a key, and reads an error only with its headers.
    app.add_middleware(BodyGuard, settings=settings)
    app.add_middleware(AccessGuard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "last-event-id", "prefer", "range"],
            expose_headers=["content-range", "retry-after"],
        )


# Bodies ------------------------------------------------------------------------------------------------------------


class BodyGuard:
    """ASGI middleware: 413 for a body that is too large, with or without Content-Length, 408 for one too slow,
    431 for headers that are too large in all.

    The app sees its client leave, and whatever it still sends goes nowhere. `request.state.held` is an ExitStack that
    is closed when the answer has been sent, or never will be.
    """

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.settings.max_header_bytes:
            most = self.settings.max_header_bytes
            message = f"the headers are larger than {most} bytes, the limit of this server"
            await refuse(send, 431, message, "headers_too_large")
            return
        length = header(scope, b"content-length") or b""
        if length.isdigit() and int(length) > self.settings.max_body_bytes:
            await refuse(send, 413, self._too_large(), "body_too_large")
            return
        exchange = _Exchange(self, receive, send)
        with contextlib.ExitStack() as held, contextlib.suppress(ClientDisconnect):
            scope.setdefault("state", {})["held"] = held
            await self.app(scope, exchange.receive, exchange.send)

    def _too_large(self) -> str:
        return f"the body is larger than {self.settings.max_body_bytes} bytes, the limit of this server"


class _Exchange:
    """One request and its answer; `receive` and `send` are what the app is given."""

    def __init__(self, guard: BodyGuard, receive: Receive, send: Send) -> None:
        self._guard = guard
        self._receive = receive
        self._send = send
        self._num_bytes = 0
        self._started_at = asyncio.get_running_loop().time()
        self._whole = False
        self._answered = False
        self._refused = False

    async def receive(self) -> Message:
        if self._refused:
            return {"type": "http.disconnect"}
        if self._whole:
            return await self._receive()  # waits for the client to leave, which has no deadline
        settings = self._guard.settings
        deadline = self._started_at + settings.body_seconds + self._num_bytes / settings.min_body_rate
        try:
            async with asyncio.timeout_at(deadline):
                message = await self._receive()
        except TimeoutError:
            text = f"the body came too slowly: {settings.body_seconds:g} s and {settings.min_body_rate} bytes/s more"
            return await self._refuse(408, f"{text} are allowed", "body_too_slow")
        self._num_bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._num_bytes > settings.max_body_bytes:
            return await self._refuse(413, self._guard._too_large(), "body_too_large")
        return message

    async def _refuse(self, status: int, message: str, code: str) -> Message:
        self._refused = True
        if not self._answered:
            await refuse(self._send, status, message, code, ((b"x-should-retry", b"false"),))
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self._refused:
            self._answered = True
            await self._send(message)


def form_limits(settings: ServerSettings) -> dict[str, int]:
    """Bounds on multipart bodies, for `FastAPI(form_limits=...)` and `request.form(...)`."""
    return {
        "max_files": settings.max_files,
        "max_fields": settings.max_fields,
        "max_part_size": settings.max_field_bytes,
    }


# Connections -------------------------------------------------------------------------------------------------------

WRITE_STEP = 64 * 1024
"""Bytes of an answer that a client must read in `write_seconds`."""


def uvicorn_options(settings: ServerSettings) -> dict[str, Any]:
    """Keyword arguments of uvicorn.Config that bound headers, idle connections, their number, and slow readers."""
    return {
        "http": _build_protocol(settings.header_seconds, settings.write_seconds),
        "ws": "none",
        "h11_max_incomplete_event_size": settings.max_header_bytes,
        "timeout_keep_alive": settings.keep_alive_seconds,
        "limit_concurrency": settings.max_connections,
        "server_header": False,
    }


class _Reader:
    """The client as one who reads an answer: too slowly, and it is cut off."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, seconds: float) -> None:
        self._loop = loop
        self._transport = transport
        self._seconds = seconds
        self._deadline: asyncio.TimerHandle | None = None

    def watch(self, left: float = math.inf) -> None:
        """Look again in a while; cut the connection off when by then too little of what is `left` has gone out."""
        now = self._transport.get_write_buffer_size()
        if now and now > left - WRITE_STEP:
            self._transport.abort()
        elif now:
            self.forget()
            self._deadline = self._loop.call_later(self._seconds, self.watch, now)

    def forget(self) -> None:
        """It has read all that was sent, or it has left."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _build_protocol(header_seconds: float, write_seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with deadlines for a request's headers and for the client to read the answer.

    uvicorn itself waits for both for ever. A connection that is cut off wakes whoever sends or waits for it to end.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class PunctualProtocol(H11Protocol):
        header_deadline: asyncio.TimerHandle | None = None
        reader: _Reader

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.header_deadline = self.loop.call_later(header_seconds, transport.close)
            self.reader = _Reader(self.loop, transport, write_seconds)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch_headers()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch_headers()

        def watch_headers(self) -> None:
            """Start the clock with the first byte of a request's headers, and stop it after the last."""
            is_idle = self.cycle is None or self.cycle.response_complete
            begun = is_idle and bool(self.conn.trailing_data[0])
            if not begun and self.header_deadline is not None:
                self.header_deadline.cancel()
                self.header_deadline = None
            elif begun and self.header_deadline is None:
                self.header_deadline = self.loop.call_later(header_seconds, self.transport.close)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.reader.watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self.reader.forget()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self.reader.watch()  # closing waits for the client to read what is left

        def connection_lost(self, exc: Exception | None) -> None:
            if self.header_deadline is not None:
                self.header_deadline.cancel()
            self.reader.forget()
            super().connection_lost(exc)

    return PunctualProtocol


# JSON --------------------------------------------------------------------------------------------------------------

TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
"""Texts, and the brackets between them. Nothing is read twice: a text without an end goes to the end of the body."""
MAX_NUMBER = 2**63
"""What stores, indexes and arrays hold."""


class NotJson(InputError):
    """A text is no JSON at all."""


class _Fault(Exception):
    """What is wrong with a JSON text, to be said of it."""


class JsonTexts:
    """Reads all JSON texts of one request, which together may have `max_json_items` values."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._items_left = settings.max_json_items

    def decode(self, text: str, where: str) -> Any:
        """The value of a text. Raises InputError, NotJson for a text that is none; both begin with `where`."""
        try:
            return self._decode(text)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise NotJson(f"{where} is not JSON: {error.msg}, {place}") from None
        except _Fault as fault:
            raise InputError(f"{where} has {fault}") from None

    def _decode(self, text: str) -> Any:
        # Counted before the parser runs: it would take minutes and gigabytes, or run out of stack.
        brackets = text.count("[") + text.count("{")
        self._items_left -= brackets + text.count(",")
        if self._items_left < 0:
            raise _Fault(f"more than {self._settings.max_json_items} JSON values, the limit of this server")
        if brackets > self._settings.max_json_depth:
            _check_depth(text, self._settings.max_json_depth)
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_number, parse_int=_whole, parse_float=_real
        )
        # The only way for lone surrogates: UTF-8 has none. One character is found ten times as fast as two.
        if "\\" in text and "\\u" in text:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise _Fault("half a surrogate pair (\\ud800 to \\udfff), which is no character") from None
        return value


def decode_json(body: bytes, settings: ServerSettings) -> Any:
    """A JSON body: UTF-8, no NaN, no key twice, no lone surrogates, bounded depth and items. Raises InputError."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8 text, at byte {error.start}") from error
    return JsonTexts(settings).decode(text, "the body")


def _check_depth(text: str, max_depth: int) -> None:
    depth = 0
    for found in TOKENS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if depth > max_depth:
            raise _Fault(f"brackets inside brackets, more than {max_depth} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _Fault(f"the field {twice[:60]!a} twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -MAX_NUMBER <= int(digits) < MAX_NUMBER:
        _refuse_number(digits)
    return int(digits)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse_number(text)
    return value


def _refuse_number(text: str) -> NoReturn:
    raise _Fault(f"the number {text[:40]}, which is too large or none; numbers have up to 64 bits")
