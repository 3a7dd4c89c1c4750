"""Stores and servers that the tests of the service share."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

from omni import AsyncOmni
from omni.server.app import build_app
from omni.server.files import FileStore
from omni.server.service import Service
from omni.server.service_settings import ServiceSettings
from omni.server.settings import ServerSettings
from omni.server.store import JobStore
from omni.server.tables import METADATA
from tests.server.app_site import Site, client_of
from tests.server.postgres import running_postgres

HERE = Path(__file__).parent
WAIT_SECONDS = 60
QUICK = ServiceSettings(poll_seconds=0.02, heartbeat_seconds=0.1, lease_seconds=30.0)
"""Looks often, so that tests need not wait; leases are long, so that a busy machine ends none."""


def graph_of(function: str) -> dict[str, Any]:
    """A graph of one function stage."""
    return {"stages": {"work": {"kind": "function", "call": f"tests.server.functions:{function}"}}}


MakeService = Callable[..., Service]


@pytest.fixture
async def make_service(tmp_path: Path) -> AsyncIterator[MakeService]:
    """Makes services over one store, and stops them: `make_service({"g": "echo"}, max_running=1)`."""
    services: list[Service] = []

    def make(
        graphs: dict[str, Any], *, url: str | None = None, files: str | Path | None = None, **limits: Any
    ) -> Service:
        omnis = {
            name: AsyncOmni(graph_of(graph) if isinstance(graph, str) else graph, runner="inline")
            for name, graph in graphs.items()
        }
        options = {name: limits.pop(name) for name in ("check_address", "render_job") if name in limits}
        values = {name: getattr(QUICK, name) for name in QUICK.__struct_fields__} | limits
        store = JobStore(url or f"sqlite:///{tmp_path}/jobs.db", retry_seconds=1.0)
        service = Service(omnis, store, FileStore(files or tmp_path / "files"), ServiceSettings(**values), **options)
        services.append(service)
        return service

    yield make
    for service in services:
        async with asyncio.timeout(WAIT_SECONDS):
            await service.stop(0)


@pytest.fixture
async def serve(make_service: MakeService) -> AsyncIterator[Callable[..., Awaitable[Site]]]:
    """Starts a site: `await serve("echo", max_running=1)`; `settings` are the server's."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(graph: Any, settings: ServerSettings | None = None, **limits: Any) -> Site:
            service = make_service({"g": graph}, **limits)
            await service.start()
            app = build_app(service, settings or ServerSettings())
            client = await stack.enter_async_context(client_of(app))
            return Site(service, app, client)

        yield start


@pytest.fixture
def started() -> list[str]:
    """Prompts that the graph has begun to work on."""
    found: list[str] = importlib.import_module("tests.server.functions").started
    found.clear()
    return found


class ServerProcess:
    """tests/server/server_process.py, running."""

    def __init__(self, url: str, folder: Path) -> None:
        command = [sys.executable, str(HERE / "server_process.py"), url, str(folder)]
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}  # for tests.server.functions
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def tell(self, *commands: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{command}\n" for command in commands))
        self.process.stdin.flush()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it prints, until it ends."""
        while (line := self._lines.get(timeout=WAIT_SECONDS)) is not None:
            yield line

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_SECONDS)

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("}\n"):  # a killed process may leave half a line
                self._lines.put(json.loads(line))
        self._lines.put(None)


StartServer = Callable[..., ServerProcess]


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts server processes over one store, and ends them."""
    started: list[ServerProcess] = []

    def start(url: str | None = None) -> ServerProcess:
        server = ServerProcess(url or f"sqlite:///{tmp_path}/jobs.db", tmp_path / "files")
        started.append(server)
        return server

    yield start
    for server in started:
        server.kill()
        server._thread.join(WAIT_SECONDS)
        server.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a Postgres database of the tests' own; they fail where its programs are not installed."""
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty store of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/jobs.db"
        return
    url: str = request.getfixturevalue("postgres")
    yield url
    engine = create_engine(url)
    METADATA.drop_all(engine)
    engine.dispose()
