"""Who leaves, who does not read, and who waits too long: each frees what it held."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from omni.messages import Done, Event, Queued, StageProgress
from omni.server import media_inputs
from omni.server.settings import ServerSettings
from tests.server import bombs
from tests.server.app_site import (
    CHAT,
    JOBS,
    WAIT_SECONDS,
    Serve,
    chat,
    post_scope,
    until,
)


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
async def test_leaving_aborts_at_once(serve: Serve, started: list[str], fields: dict[str, Any]) -> None:
    """The client is gone while the stage works: the request is over without a further look at the clock."""
    site = await serve("hold", max_running=1)
    left = asyncio.Event()
    body = json.dumps(chat("hold", **fields)).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    call = asyncio.ensure_future(site.app(post_scope(CHAT), receive, send))
    await until(lambda: started == ["hold"])
    assert site.service.running("g") == 1
    left.set()
    async with asyncio.timeout(WAIT_SECONDS):
        await call
    assert site.service.running("g") == 0


async def test_a_reader_who_does_not_read_holds_its_slot_until_the_deadline(serve: Serve) -> None:
    site = await serve("hold", ServerSettings(request_seconds=0.2), max_running=1)
    messages = [{"type": "http.request", "body": json.dumps(chat("hold", stream=True)).encode(), "more_body": False}]
    sending = asyncio.Event()

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else await asyncio.Future()

    async def send(message: Any) -> None:
        sending.set()
        await asyncio.Event().wait()

    call = asyncio.ensure_future(site.app(post_scope(CHAT), receive, send))
    await sending.wait()
    assert site.service.running("g") == 1
    async with asyncio.timeout(WAIT_SECONDS):
        await call
    assert site.service.running("g") == 0


async def test_leaving_while_media_are_decoded_ends_the_request(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """As does the deadline; a decoder's slot is free for others then."""
    begun = asyncio.Event()

    async def decode(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(media_inputs, "decode_apart", decode)
    stages = {"work": {"kind": "function", "call": "tests.server.functions:watch"}}
    settings = ServerSettings(request_seconds=0.3, max_decoders=1)
    site = await serve({"inputs": {"clip": "video"}, "stages": stages}, settings)
    body = {"inputs": {"clip": "data:video/mp4;base64,AAAA"}}
    for _ in range(2):
        status, error, _ = await site.error("POST", JOBS, json=body)
        assert (status, error["code"]) == (504, "timeout")
    begun.clear()
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await left.wait()
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    call = asyncio.ensure_future(site.app(post_scope(JOBS), receive, send))
    async with asyncio.timeout(WAIT_SECONDS):
        await begun.wait()
        left.set()
        await call


async def test_media_are_not_decoded_for_a_full_queue(serve: Serve, started: list[str]) -> None:
    stages = {"work": {"kind": "function", "call": "tests.server.functions:hold_picture"}}
    graph = {"inputs": {"prompt": "text", "image": "image"}, "stages": stages}
    site = await serve(graph, max_running=1, max_queued=0)
    picture = f"data:image/png;base64,{base64.b64encode(bombs.picture()).decode()}"
    held = await site.client.post(JOBS, json={"inputs": {"prompt": "hold", "image": picture}})
    assert held.status_code == 202
    await until(lambda: started == ["hold"])
    broken = {"inputs": {"prompt": "x", "image": "data:image/png;base64,AAAA"}}
    status, error, _ = await site.error("POST", JOBS, json=broken)
    assert (status, error["code"]) == (429, "queue_full")


@pytest.mark.parametrize(("step", "reason"), [(3, "length"), (2, "stop")])
async def test_both_ways_tell_how_a_text_ended(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, step: int, reason: str
) -> None:
    site = await serve("echo")

    async def stream(order: object, request: object = None) -> AsyncIterator[Event]:
        yield Queued(request_id="r")
        yield StageProgress(request_id="r", stage="work", step=step, num_steps=3, unit="token")
        yield Done(request_id="r", outputs={"text": "x"})

    monkeypatch.setattr(site.service, "stream", stream)
    answer = (await site.client.post(CHAT, json=chat("x"))).json()
    assert answer["choices"][0]["finish_reason"] == reason
    streamed = await site.client.post(CHAT, json=chat("x", stream=True))
    assert f'"finish_reason":"{reason}"' in streamed.text
