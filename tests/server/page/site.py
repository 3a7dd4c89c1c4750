"""A server in a thread of the test, and a cable to it that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI

T = TypeVar("T")
START_SECONDS = 60.0
CALL_SECONDS = 30.0
Apps = Callable[[], AbstractAsyncContextManager[dict[str, FastAPI]]]


def listen() -> socket.socket:
    """A socket on a free port; who connects before a server runs waits for it."""
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    return server


def url_of(server: socket.socket) -> str:
    """Where a browser finds it."""
    return f"http://127.0.0.1:{server.getsockname()[1]}"


class Cable:
    """A TCP proxy: `cut` breaks all connections and refuses new ones until `mend`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.whole = True
        self.writers: set[asyncio.StreamWriter] = set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, both ways."""
        if not self.whole:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        pair = {writer, far_writer}
        self.writers |= pair
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.pump(reader, far_writer))
                group.create_task(self.pump(far_reader, writer))
        finally:
            self.writers -= pair
            for end in pair:
                end.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes one way, until the end or a cut."""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

    def cut(self) -> None:
        """Break all connections."""
        self.whole = False
        for writer in self.writers:
            writer.transport.abort()

    def mend(self) -> None:
        """Let connections through again."""
        self.whole = True


class Site:
    """Apps on one event loop in a thread. `urls[name]` leads to an app, `cable_urls[name]` through `cables[name]`."""

    def __init__(self, apps: Apps) -> None:
        self.apps = apps
        self.urls: dict[str, str] = {}
        self.cables: dict[str, Cable] = {}
        self.cable_urls: dict[str, str] = {}
        self.ready = threading.Event()

    async def serve(self) -> None:
        """Run everything until `stop`."""
        self.loop = asyncio.get_running_loop()
        self.over = asyncio.Event()
        try:
            async with self.apps() as apps, contextlib.AsyncExitStack() as stack:
                for name, app in apps.items():
                    await stack.enter_async_context(self.one(name, app))
                self.ready.set()
                await self.over.wait()
        finally:
            self.ready.set()

    @contextlib.asynccontextmanager
    async def one(self, name: str, app: FastAPI) -> AsyncIterator[None]:
        """Serve one app, directly and through a cable."""
        door, far_door = listen(), listen()
        config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[door]))
        cable = Cable(door.getsockname()[1])
        async with await asyncio.start_server(cable.carry, sock=far_door):
            self.urls[name], self.cable_urls[name], self.cables[name] = url_of(door), url_of(far_door), cable
            yield
            cable.cut()
        server.should_exit = True
        await serving

    def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run something on the site's loop."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(CALL_SECONDS)

    def do(self, work: Callable[[], None]) -> None:
        """Do something on the site's loop, and wait until it is done."""

        async def doing() -> None:
            work()

        self.call(doing)

    @contextlib.contextmanager
    def running(self) -> Iterator[Site]:
        """Serve inside the block; raises what kept the site from starting."""
        with ThreadPoolExecutor(1, "site") as pool:
            serving = pool.submit(lambda: asyncio.run(self.serve()))
            assert self.ready.wait(START_SECONDS)
            if not self.urls:
                serving.result(START_SECONDS)
            try:
                yield self
            finally:
                self.loop.call_soon_threadsafe(self.over.set)
                serving.result(START_SECONDS)
