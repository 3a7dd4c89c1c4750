"""Server-sent events: one task reads the events, the connection is watched, and who leaves aborts at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Self

import msgspec
from fastapi.sse import EventSourceResponse, format_sse_event

from omni.errors import OmniError
from omni.server.calls import client_left
from omni.server.errors import as_api_error

PING_SECONDS = 15.0
"""After so long without an event comes a comment, so that proxies keep the connection."""
BUFFERED_EVENTS = 16
"""Events that wait for a slow reader; after that, their source waits."""
LAST_WORDS_SECONDS = 1.0
"""Time to say that a stream's time is over; to a client that does not read it cannot be said."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
PING = format_sse_event(comment="ping")
END = format_sse_event(data_str="[DONE]")
"""How OpenAI ends a streamed chat completion."""


class ServerEvent(msgspec.Struct, frozen=True):
    """One event: JSON data, with a type and a number where the stream has them."""

    data: Any
    type: str | None = None
    id: str | None = None

    def encode(self) -> bytes:
        """As it goes over the wire."""
        return format_sse_event(data_str=msgspec.json.encode(self.data).decode(), event=self.type, id=self.id)


class Ping(msgspec.Struct, frozen=True):
    """Nothing happened for a while."""


class EventStream(EventSourceResponse):
    """An answer of server-sent events. With `open`, what fails before the first event becomes an error answer."""

    def __init__(self, items: AsyncGenerator[ServerEvent, None], seconds: float, end: bytes = b"") -> None:
        self._items = items
        self._deadline = time.monotonic() + seconds
        self._end = end
        self._queue: asyncio.Queue[ServerEvent | BaseException | None] = asyncio.Queue(BUFFERED_EVENTS)
        self._peeked: list[ServerEvent | None] = []
        self._reader = asyncio.ensure_future(self._read())
        super().__init__(self._chunks(), headers=HEADERS)

    @classmethod
    async def open(cls, items: AsyncGenerator[ServerEvent, None], seconds: float, end: bytes = b"") -> Self:
        """The answer, when its first event is there. Raises what `items` raises before that.

        `seconds` bound the whole stream; `end` is sent after the last event.
        """
        stream = cls(items, seconds, end)
        try:
            first = await stream._queue.get()
            if isinstance(first, BaseException):
                raise first
            stream._peeked.append(first)
        except BaseException:
            await stream._stop()
            raise
        return stream

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Send the events until the last one, the deadline, or until the client leaves."""
        sending = asyncio.ensure_future(self.stream_response(send))
        leaving = asyncio.ensure_future(client_left(receive))
        try:
            left = max(self._deadline - time.monotonic(), 0) + LAST_WORDS_SECONDS
            await asyncio.wait({sending, leaving}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(OSError):  # some servers tell so that the client has left
                    sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._stop()

    async def _read(self) -> None:
        """Pass the events on; this one task reads all of them, from the first to the last."""
        try:
            async with contextlib.aclosing(self._items) as items:
                async for item in items:
                    await self._queue.put(item)
        except Exception as error:  # handed over to the answer, which raises it again
            await self._queue.put(error)
        else:
            await self._queue.put(None)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while (item := await self._next()) is not None:
            if isinstance(item, BaseException):
                yield ServerEvent(as_api_error(item).body(), "error").encode()
                if not isinstance(item, (OmniError, TimeoutError)):
                    raise item
                break
            yield item.encode() if isinstance(item, ServerEvent) else PING
        if self._end:
            yield self._end

    async def _next(self) -> ServerEvent | Ping | BaseException | None:
        """The next event, a Ping when there is none for a while, None at the end; or the error that ends it all."""
        if self._peeked:
            return self._peeked.pop()
        left = self._deadline - time.monotonic()
        if left <= 0:
            return TimeoutError()
        try:
            async with asyncio.timeout(min(left, PING_SECONDS)):
                return await self._queue.get()
        except TimeoutError:
            return Ping()

    async def _stop(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
