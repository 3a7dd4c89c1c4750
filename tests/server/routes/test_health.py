"""Whether the server lives, and which stage is not ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from omni.server.app import build_app
from omni.server.service import Service
from omni.server.settings import ServerSettings
from omni.testing import doubles
from tests.server.routes.conftest import Served

MakeService = Callable[..., Service]


@pytest.fixture
def known() -> Iterator[None]:
    with doubles():
        yield


def test_a_running_server_is_ready(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/ready").json()["graphs"] == ["draw", "edit", "video", "tell", "film", "voice"]


@pytest.mark.usefixtures("known")
async def test_a_stage_that_does_not_answer_is_named(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service({"g": {"stages": {"a": {"kind": "double"}, "b": {"kind": "double"}}}})
    transport = httpx.ASGITransport(build_app(service, ServerSettings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        early = (await client.get("/ready")).json()
        assert early["stages"] == {"g.a": "it is not loaded", "g.b": "it is not loaded"}
        await service.start()

        async def silent(seconds: float) -> dict[str, str]:
            return {"b": f"it did not answer within {seconds:g} s"}

        monkeypatch.setattr(service.graphs["g"], "check", silent)
        answer = await client.get("/ready")
        monkeypatch.undo()
        assert (await client.get("/ready")).status_code == 200
        service.store.writer.fault = "its disk is gone"
        no_store = await client.get("/ready")
        service.store.writer.fault = ""
    assert (answer.status_code, answer.json()["error"]["stage"]) == (503, "g.b")
    assert answer.json()["error"]["message"] == "stage 'g.b' is not ready: it did not answer within 5 s"
    assert (no_store.status_code, no_store.json()["error"]["code"]) == (503, "store_not_ready")
    assert no_store.json()["error"]["message"] == "the job store is not ready: its disk is gone"
