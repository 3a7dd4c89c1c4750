"""A service of one function with its app and a client, for tests of the app."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
from fastapi import FastAPI

from omni.server.service import Service

WAIT_SECONDS = 60
CHAT, JOBS, IMAGES = "/v1/chat/completions", "/v1/graphs/g/jobs", "/v1/images/generations"
PLAIN = {"content": b"a", "headers": {"content-type": "text/plain"}}
LONG_KEY = {"idempotency-key": "k" * 300}
HOOK = {"inputs": {"prompt": "x"}, "webhook": "http://a.example"}


def chat(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": "g", "messages": [{"role": "user", "content": prompt}], **fields}


@contextlib.asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


class Site:
    """A started service of one function, its app, and a client."""

    def __init__(self, service: Service, app: FastAPI, client: httpx.AsyncClient) -> None:
        self.service, self.app, self.client = service, app, client

    async def error(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any], httpx.Headers]:
        answer = await self.client.request(method, path, **options)
        assert answer.status_code >= 400, answer.text
        error = answer.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"}
        assert "Traceback" not in answer.text
        return answer.status_code, error, answer.headers


Serve = Callable[..., Awaitable[Site]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def post_scope(path: str) -> dict[str, Any]:
    """The ASGI scope of a JSON request."""
    return {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"test")], "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "root_path": "", "http_version": "1.1",
    }  # fmt: skip
