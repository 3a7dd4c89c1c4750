"""The graph's own time in an answer's header."""

from __future__ import annotations

import asyncio

import httpx
from fastapi import FastAPI

from omni.server.timing import TimingMiddleware, note_graph_seconds


async def seconds_of(*seconds: float) -> str | None:
    """The header of a call whose tasks note these seconds."""
    app = FastAPI()

    async def note(number: float) -> None:
        note_graph_seconds(number)

    @app.get("/")
    async def answer() -> None:
        await asyncio.gather(*(asyncio.create_task(note(number)) for number in seconds))

    transport = httpx.ASGITransport(TimingMiddleware(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return (await client.get("/")).headers.get("server-timing")


async def test_the_longest_time_is_told() -> None:
    assert await seconds_of(0.25, 1.5) == "graph;dur=1500.000"


async def test_calls_without_a_graph_have_no_header() -> None:
    note_graph_seconds(3.0)
    assert await seconds_of() is None


async def test_calls_at_the_same_time_do_not_mix() -> None:
    found = await asyncio.gather(*(seconds_of(number / 10) for number in range(1, 6)))
    assert found == [f"graph;dur={number}00.000" for number in range(1, 6)]
