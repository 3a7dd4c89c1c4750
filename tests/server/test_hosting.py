"""A server on a real socket: who closes a connection aborts, a stop drains, and a wrong address is one clear error."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from omni.errors import UsageError
from omni.messages import Event, StageText
from omni.server.app import build_app
from omni.server.hosting import Hosting, address_of, bind
from omni.server.service import Service
from omni.server.settings import ServerSettings

WAIT_SECONDS = 60
CHAT = "/v1/chat/completions"
MakeService = Callable[..., Service]


@contextlib.asynccontextmanager
async def hosted(
    service: Service, drain_seconds: float = 0, settings: ServerSettings | None = None
) -> AsyncIterator[tuple[Hosting, str]]:
    """A running server, and its address."""
    bound = bind("127.0.0.1", 0)
    settings = settings or ServerSettings()
    hosting = Hosting(service, build_app(service, settings), settings, bound, drain_seconds=drain_seconds)
    ready = asyncio.Event()
    url = address_of(bound)
    running = asyncio.create_task(hosting.run(ready.set))
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            await ready.wait()
        yield hosting, url
    finally:
        hosting.stop()
        async with asyncio.timeout(WAIT_SECONDS):
            await running


def body(prompt: str, stream: bool = False) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": prompt}], "stream": stream}).encode()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def started() -> list[str]:
    """Prompts that the graph has begun to work on."""
    found: list[str] = importlib.import_module("tests.server.functions").started
    found.clear()
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_a_closed_connection_aborts(make_service: MakeService, started: list[str], stream: bool) -> None:
    service = make_service({"g": "hold"}, max_running=1)
    async with hosted(service) as (_, url):
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        data = body("hold", stream)
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        await until(lambda: started == ["hold"])
        assert service.running("g") == 1
        writer.close()
        await until(lambda: service.running("g") == 0)
        async with httpx.AsyncClient(base_url=url) as client:  # the slot is free again
            answer = await client.post(CHAT, content=body("pass"), headers={"Content-Type": "application/json"})
        assert answer.json()["choices"][0]["message"]["content"] == "pass"


async def test_a_stop_drains(make_service: MakeService, tmp_path: Path) -> None:
    service = make_service({"g": "pass_gate"})
    headers = {"Content-Type": "application/json"}
    async with hosted(service, drain_seconds=WAIT_SECONDS) as (hosting, url), httpx.AsyncClient(base_url=url) as client:
        gate = tmp_path / "gate"
        slow = asyncio.create_task(client.post(CHAT, content=body(f"slow {gate}"), headers=headers, timeout=60))
        await until(lambda: service.running("g") == 1)
        hosting.stop()
        await until(lambda: service.draining)
        refused = await client.post(CHAT, content=body("x"), headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert (await client.get("/health")).status_code == 200
        gate.touch()
        assert (await slow).status_code == 200


async def test_a_stop_ends_streams_in_good_order(make_service: MakeService) -> None:
    """A listener's stream ends whole and without an error; the job goes on with the next server."""
    service = make_service({"g": "hold"})
    async with hosted(service) as (hosting, url), httpx.AsyncClient(base_url=url, timeout=WAIT_SECONDS) as client:
        made = await client.post("/v1/graphs/g/jobs", json={"inputs": {"prompt": "hold"}})
        path = f"/v1/jobs/{made.json()['id']}/events"
        told = []
        async with client.stream("GET", path) as answer:
            async for line in answer.aiter_lines():
                told.append(line)
                if line == "event: stage_started":
                    hosting.stop()
        types = [line.removeprefix("event: ") for line in told if line.startswith("event: ")]
        assert types == ["queued", "stage_started", "restarted"]
    app = build_app(service, ServerSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        late = await client.get(path.removesuffix("/events"))
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")


async def test_who_waits_for_a_stored_job_is_told_of_a_stop(make_service: MakeService) -> None:
    service = make_service({"g": "hold"})
    async with hosted(service) as (hosting, url), httpx.AsyncClient(base_url=url, timeout=WAIT_SECONDS) as client:
        waits = {"Prefer": "wait=60"}
        call = client.post("/v1/graphs/g/jobs", json={"inputs": {"prompt": "hold"}}, headers=waits)
        waiting = asyncio.create_task(call)
        await until(lambda: service.running("g") == 1 and service.num_listeners == 1)
        hosting.stop()
        answer = await waiting
        assert (answer.status_code, answer.json()["state"]) == (202, "queued")


def test_wrong_places_are_named() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose"):
            bind("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"--host no\.such\.host\.invalid: there is no such address"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(UsageError, match="--port 99999: ports go from 0 to 65535"):
        bind("127.0.0.1", 99999)


def test_addresses_are_those_that_clients_use() -> None:
    with bind("0.0.0.0", 0) as bound:
        assert address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    if socket.has_ipv6:
        with contextlib.suppress(UsageError), bind("::1", 0) as bound:  # a machine may have no such address
            assert address_of(bound) == f"http://[::1]:{bound.getsockname()[1]}"


async def test_a_stream_that_nobody_reads_gives_its_slot_back(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real connection whose client takes nothing, long before the request's own deadline."""
    service = make_service({"g": "echo"}, max_running=1)

    async def events(request: object) -> AsyncIterator[Event]:
        while True:
            yield StageText(request_id="r", stage="work", text="x" * 100_000)

    monkeypatch.setattr(service.graphs["g"], "stream", events)
    async with hosted(service, settings=ServerSettings(write_seconds=0.2)) as (_, url):
        content = body("x", stream=True)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            await until(lambda: service.running("g") == 1)
            await until(lambda: service.running("g") == 0)
