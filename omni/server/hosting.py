"""Runs an app on a socket: starts the service, serves, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from omni.errors import UsageError
from omni.server.limits import uvicorn_options
from omni.server.service import Service
from omni.server.settings import ServerSettings

BACKLOG = 2048
CLOSE_SECONDS = 3
"""How long answers that are still being sent may take, after all requests are over."""


class _Server(uvicorn.Server):
    """uvicorn, which leaves signals to the command: there may be none in this thread, or others' in this process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket for the server, before models load. `port` 0 takes a free one. Raises UsageError."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port}: ports go from 0 to 65535")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host}: there is no such address: {error}") from error
    family, kind, protocol, _, address = places[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Where a client on this machine reaches the socket: `http://127.0.0.1:8000`."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if bound.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Hosting:
    """One server on one socket. `run` ends after `stop`, or raises what kept it from starting."""

    def __init__(
        self,
        service: Service,
        app: FastAPI,
        settings: ServerSettings,
        bound: socket.socket,
        *,
        drain_seconds: float = 30.0,
        access_log: bool = False,
    ) -> None:
        self.service = service
        self._bound = bound
        self._drain_seconds = drain_seconds
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=access_log,
            lifespan="off",
            backlog=BACKLOG,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            **uvicorn_options(settings),
        )
        self._server = _Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Load the graphs, call `on_ready`, and serve until `stop`; then drain, for `drain_seconds` at most.

        While it drains, what runs goes on and the server answers, but new requests get 503.
        """
        self._loop = asyncio.get_running_loop()
        try:
            await self.service.start()
            serving = asyncio.create_task(self._server.serve([self._bound]))
            stopping = asyncio.create_task(self._stopping.wait())
            try:
                await self._started(serving)
                on_ready()
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.cancel()
                try:
                    await self.service.finish(self._drain_seconds)
                finally:
                    self._server.should_exit = True  # only then do the stores close: nobody asks them any more
                    await serving
        finally:
            await self.service.close()
            self._bound.close()

    def stop(self) -> None:
        """Let `run` drain and end; from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def _started(self, serving: asyncio.Task[None]) -> None:
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
