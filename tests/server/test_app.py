"""The app around a service: each error's status and shape, jobs, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest

from omni.server.access import parse_api_keys
from omni.server.jobs import JobOrder
from omni.server.settings import ServerSettings
from tests.server.app_site import (
    CHAT,
    HOOK,
    IMAGES,
    JOBS,
    LONG_KEY,
    PLAIN,
    Serve,
    chat,
    until,
)

# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code", "param"),
    [
        ("POST", CHAT, {"content": b"{"}, 400, "invalid_value", None),
        ("POST", CHAT, {"content": b"[1]"}, 400, "invalid_json", None),
        ("POST", CHAT, {"json": {}}, 400, "missing_required_parameter", "messages"),
        ("POST", CHAT, {"json": chat("x", modle="g")}, 400, "unknown_parameter", "modle"),
        ("POST", CHAT, {"json": chat("x", seed=2**32)}, 400, "invalid_value", "seed"),
        ("POST", CHAT, {"json": chat("x") | {"model": "h"}}, 404, "model_not_found", "model"),
        ("POST", CHAT, PLAIN, 415, "unsupported_media_type", "Content-Type"),
        ("POST", CHAT, {"json": chat("x"), "headers": LONG_KEY}, 400, "invalid_value", "Idempotency-Key"),
        ("POST", IMAGES, {"json": {"prompt": "x"}}, 404, "model_not_found", "model"),
        ("POST", IMAGES, {"json": {"model": "g", "prompt": "x"}}, 400, "model_not_supported", "model"),
        ("POST", JOBS, {"json": {"inputs": {}}}, 400, "invalid_value", "prompt"),
        ("POST", JOBS, {"json": {"inputs": {"promt": "x"}}}, 400, "unknown_parameter", "promt"),
        ("POST", JOBS, {"json": {"input": {}}}, 400, "invalid_value", None),
        ("POST", JOBS, {"json": HOOK}, 400, "invalid_value", None),
        ("POST", "/v1/graphs/h/jobs", {"json": {}}, 404, "graph_not_found", None),
        ("GET", "/v1/jobs/job_1", {}, 404, "job_not_found", "id"),
        ("GET", "/v1/jobs?after=job_1", {}, 404, "job_not_found", "id"),
        ("GET", "/v1/jobs?state=lost", {}, 400, "invalid_value", "state"),
        ("GET", "/v1/videos/job_1/content", {}, 404, "video_not_found", "id"),
        ("GET", "/v1/models/h", {}, 404, "model_not_found", "model"),
        ("GET", "/nowhere", {}, 404, "not_found", None),
        ("PUT", "/health", {}, 405, "method_not_allowed", None),
    ],
)  # fmt: skip
async def test_wrong_requests(
    serve: Serve, method: str, path: str, options: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    site = await serve("echo")
    found, error, _ = await site.error(method, path, **options)
    assert (found, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"


async def test_a_failed_stage_is_named(serve: Serve) -> None:
    site = await serve("fail")
    status, error, _ = await site.error("POST", CHAT, json=chat("x"))
    assert (status, error["code"], error["stage"], error["type"]) == (500, "stage_failed", "work", "server_error")
    assert "ValueError: no luck with x" in error["message"]


async def test_a_stream_that_fails_ends_with_the_error(serve: Serve) -> None:
    site = await serve("fail")
    answer = await site.client.post(CHAT, json=chat("x", stream=True))
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-2])["error"]["stage"] == "work"
    assert events[-1] == "[DONE]"


async def test_keys_are_asked_for_and_own_their_jobs(serve: Serve) -> None:
    keys = parse_api_keys(["ann=0123456789abcdef", "bob=fedcba9876543210"])
    site = await serve("echo", ServerSettings(api_keys=keys))
    status, error, _ = await site.error("GET", "/v1/models")
    assert (status, error["code"]) == (401, "invalid_api_key")
    ann, bob = ({"Authorization": f"Bearer {secret}"} for secret in ("0123456789abcdef", "fedcba9876543210"))
    body = {"inputs": {"prompt": "x"}}
    job = (await site.client.post(JOBS, json=body, headers=ann)).json()["id"]
    assert (await site.client.get(f"/v1/jobs/{job}", headers=ann)).status_code == 200
    assert (await site.error("GET", f"/v1/jobs/{job}", headers=bob))[0] == 404
    assert (await site.error("DELETE", f"/v1/jobs/{job}", headers=bob))[0] == 404
    assert (await site.client.get("/v1/jobs", headers=bob)).json()["data"] == []
    assert (await site.client.get("/ready")).status_code == 200


async def test_bodies_are_bounded(serve: Serve) -> None:
    site = await serve("echo", ServerSettings(max_body_bytes=1000))
    status, error, _ = await site.error("POST", CHAT, json=chat("x" * 2000))
    assert (status, error["code"]) == (413, "body_too_large")


async def test_a_full_queue_says_when_to_come_back(serve: Serve, started: list[str]) -> None:
    site = await serve("hold", max_running=1, max_queued=0)
    held = asyncio.ensure_future(site.client.post(CHAT, json=chat("hold")))
    await until(lambda: started == ["hold"])
    for path, body in (
        (CHAT, chat("x")),
        (CHAT, chat("x", stream=True)),
        (JOBS, {"inputs": {"prompt": "x"}}),
    ):
        status, error, headers = await site.error("POST", path, json=body)
        assert (status, error["code"], error["type"]) == (429, "queue_full", "rate_limit_error")
        assert int(headers["retry-after"]) >= 1
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)


async def test_a_server_that_drains_says_so(serve: Serve) -> None:
    site = await serve("echo")
    site.service.drain()
    for method, path, body in (("POST", CHAT, chat("x")), ("GET", "/ready", None)):
        status, error, headers = await site.error(method, path, json=body)
        assert (status, error["code"], "retry-after" in headers) == (503, "draining", True)
    assert (await site.client.get("/health")).json() == {"status": "ok"}


async def test_a_synchronous_request_has_a_deadline(serve: Serve) -> None:
    site = await serve("hold", ServerSettings(request_seconds=0.2))
    status, error, _ = await site.error("POST", CHAT, json=chat("hold"))
    assert (status, error["code"]) == (504, "timeout")
    await until(lambda: site.service.running("g") == 0)


async def test_faults_of_ours_tell_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    site = await serve("echo")

    def break_down(order: object, request: object = None) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(site.service, "stream", break_down)
    status, error, _ = await site.error("POST", CHAT, json=chat("x"))
    assert (status, error["code"]) == (500, "server_error")
    assert "secret" not in error["message"]


# Idempotency -------------------------------------------------------------------------------------------------------


async def test_idempotency_keys(serve: Serve, started: list[str]) -> None:
    site = await serve("note")
    headers = {"Idempotency-Key": "one"}
    first = (await site.client.post(CHAT, json=chat("x", seed=1), headers=headers)).json()
    again = (await site.client.post(CHAT, json=chat("x", seed=1), headers=headers)).json()
    assert first["choices"] == again["choices"]
    streamed = await site.client.post(CHAT, json=chat("x", seed=1, stream=True), headers=headers)
    assert '"content":"x"' in streamed.text
    assert started == ["x"]
    status, error, _ = await site.error("POST", CHAT, json=chat("y", seed=1), headers=headers)
    assert (status, error["code"]) == (409, "idempotency_conflict")


# Jobs --------------------------------------------------------------------------------------------------------------


async def test_jobs(serve: Serve) -> None:
    site = await serve("echo")
    body = {"inputs": {"prompt": "hello"}, "seed": 7, "priority": 3}
    answer = await site.client.post(JOBS, json=body, headers={"Prefer": "wait=30"})
    job = answer.json()
    assert (answer.status_code, job["state"], job["progress"], job["seed"]) == (200, "done", 1.0, 7)
    ((name, (output,)),) = job["outputs"].items()
    assert (output["type"], output["text"]) == ("text", "hello")
    assert (await site.client.get(output["url"])).text == "hello"
    assert (await site.error("GET", f"/v1/jobs/{job['id']}/outputs/{name}?index=1"))[0] == 404
    events = (await site.client.get(f"/v1/jobs/{job['id']}/events")).text.split("\n\n")
    kinds = [event.split("\n")[0].removeprefix("event: ") for event in events if event]
    assert (kinds[0], kinds[-1]) == ("queued", "done")
    rest = await site.client.get(f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": str(len(kinds) - 1)})
    assert rest.text.split("\n")[0] == "event: done"
    rest = await site.client.get(f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": str(len(kinds))})
    assert (rest.status_code, rest.content) == (204, b"")
    assert (await site.error("GET", f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": "x"}))[0] == 400
    listed = (await site.client.get("/v1/jobs", params={"graph": "g", "state": "done"})).json()
    assert [found["id"] for found in listed["data"]] == [job["id"]]
    deleted = await site.client.delete(f"/v1/jobs/{job['id']}")
    assert deleted.json() == {"object": "job.deleted", "id": job["id"], "deleted": True}


async def test_a_running_job_is_aborted(serve: Serve, started: list[str]) -> None:
    site = await serve("hold")
    form = {"request": '{"seed": 3}', "prompt": "hold"}
    files: Sequence[Any] = [(name, (None, value)) for name, value in form.items()]
    job = (await site.client.post(JOBS, files=files)).json()
    await until(lambda: started == ["hold"])
    answer = await site.client.delete(f"/v1/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["object"]) == (202, "job")
    text = (await site.client.get(f"/v1/jobs/{job['id']}/events")).text
    assert "event: aborted" in text
    found = (await site.client.get(f"/v1/jobs/{job['id']}")).json()
    assert (found["state"], found["seed"], found["inputs"]) == ("aborted", 3, {"prompt": "hold"})


ROUTES = """\
DELETE /v1/jobs/{job_id}
DELETE /v1/videos/{video_id}
GET /health
GET /metrics
GET /ready
GET /v1/graphs
GET /v1/graphs/{name}
GET /v1/graphs/{name}/plan.svg
GET /v1/jobs
GET /v1/jobs/{job_id}
GET /v1/jobs/{job_id}/events
GET /v1/jobs/{job_id}/inputs/{name}
GET /v1/jobs/{job_id}/outputs/{name}
GET /v1/models
GET /v1/models/{model}
GET /v1/videos
GET /v1/videos/{video_id}
GET /v1/videos/{video_id}/content
POST /v1/audio/generations
POST /v1/audio/speech
POST /v1/chat/completions
POST /v1/graphs/{name}/jobs
POST /v1/images/edits
POST /v1/images/generations
POST /v1/videos"""


# The document ------------------------------------------------------------------------------------------------------


async def test_the_document_is_whole(serve: Serve) -> None:
    site = await serve("echo")
    document = (await site.client.get("/openapi.json")).json()
    described = {f"{method.upper()} {path}" for path, found in document["paths"].items() for method in found}
    assert described == set(ROUTES.split("\n"))
    for path, found in document["paths"].items():
        for method, operation in found.items():
            answers = operation["responses"]
            assert not {"422"} & set(answers), (path, method)
            assert path in ("/health", "/metrics") or any(status >= "400" for status in answers), (path, method)
            assert (method == "post") == ("requestBody" in operation), (path, method)
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    names = {reference.rpartition("/")[2] for reference in references(document)}
    assert names <= set(document["components"]["schemas"])


def references(value: Any) -> set[str]:
    """Every `$ref` of a document."""
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(item) for item in value.values()))
    return set().union(*(references(item) for item in value)) if isinstance(value, list) else set()


async def test_lists_show_the_callers_jobs_alone(serve: Serve) -> None:
    """Who has no key is someone of its own, and not everyone."""
    site = await serve("echo")
    mine, _ = [
        await site.service.submit(JobOrder(graph="g", inputs={"prompt": "x"}, kind="video", key=key))
        for key in ("", "alice")
    ]
    for path in ("/v1/jobs", "/v1/videos"):
        listed = (await site.client.get(path)).json()["data"]
        assert [job["id"] for job in listed] == [mine.id]
