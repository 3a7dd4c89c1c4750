"""A whole server in a thread: the real app on a real socket, with graphs of functions that need no torch."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni import AsyncOmni
from omni.server.addresses import WEBHOOK_REMEDY, AddressRules, checked_address
from omni.server.app import build_app
from omni.server.files import FileStore
from omni.server.hosting import Hosting, bind
from omni.server.service import Service
from omni.server.settings import ServerSettings
from omni.server.store import JobStore
from tests.server.conftest import QUICK

WAIT_SECONDS = 60


def build_service(graphs: dict[str, Any], folder: Path, webhook_hosts: tuple[str, ...] = ()) -> Service:
    """The service of these graphs, with its stores in `folder`."""
    rules = AddressRules(webhook_hosts, WEBHOOK_REMEDY)
    return Service(
        {name: AsyncOmni(graph, runner="inline") for name, graph in graphs.items()},
        JobStore(f"sqlite:///{folder}/jobs.db"),
        FileStore(folder / "files"),
        QUICK,
        check_address=lambda url: checked_address(url, rules),
    )


@contextlib.contextmanager
def live_server(graphs: dict[str, Any], settings: ServerSettings, folder: Path) -> Iterator[int]:
    """The port of a server that runs inside the block."""
    bound = bind("127.0.0.1", 0)
    ready = threading.Event()
    hostings: list[Hosting] = []

    async def run() -> None:
        service = build_service(graphs, folder, settings.webhook_hosts)
        hostings.append(Hosting(service, build_app(service, settings), settings, bound, drain_seconds=0))
        await hostings[0].run(ready.set)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(WAIT_SECONDS)
        yield bound.getsockname()[1]
    finally:
        if hostings:
            hostings[0].stop()
        thread.join(WAIT_SECONDS)


def say(port: int, *parts: bytes) -> bytes:
    """Send bytes, part by part, and read until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), WAIT_SECONDS) as connection:
        for part in parts:
            connection.sendall(part)
        answer = bytearray()
        with contextlib.suppress(ConnectionResetError):  # it closed before it had read all
            while chunk := connection.recv(65536):
                answer += chunk
    return bytes(answer)
