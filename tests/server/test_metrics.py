"""What Prometheus gets: names with units, bounded labels, right counts."""

from __future__ import annotations

import re

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni.messages import (
    Done,
    Event,
    HopFinished,
    LoadProgress,
    Queued,
    StageFinished,
    StageProgress,
    StageStarted,
)
from omni.server.jobs import StoreError
from omni.server.metrics import GraphLoad, Load, Metrics, MetricsMiddleware, MetricsObserver, build_router

EVENTS: tuple[Event, ...] = (
    Queued(request_id="a"),
    StageStarted(request_id="a", stage="rewrite"),
    *(StageProgress(request_id="a", stage="rewrite", step=step, num_steps=3, unit="token") for step in (1, 2, 3)),
    StageFinished(request_id="a", stage="rewrite", seconds=0.2, bytes=40, peak_host_bytes=5000),
    HopFinished(request_id="a", source="rewrite", target="draw", transport="object_store", seconds=0.002, bytes=40),
    StageStarted(request_id="a", stage="draw"),
    *(StageProgress(request_id="a", stage="draw", step=s, num_steps=2, unit="denoise step") for s in (1, 2)),
    StageFinished(request_id="a", stage="draw", seconds=1.5, bytes=12288, peak_device_bytes=7000),
    Done(request_id="a", outputs={}, seconds=1.8),
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def samples(metrics: Metrics) -> dict[str, float]:
    """`name{label="value"}` -> value, as Prometheus reads them."""
    text, _ = metrics.render()
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def app_of(metrics: Metrics) -> ASGIApp:
    app = FastAPI()
    app.include_router(build_router(metrics))

    @app.get("/jobs/{job_id}")
    def show(job_id: str) -> str:
        return job_id

    @app.get("/broken")
    def broken() -> None:
        raise ZeroDivisionError

    return MetricsMiddleware(app, metrics)


async def ask(app: ASGIApp, method: str, path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, headers=headers)


def test_a_request_is_counted_by_graph_stage_and_hop(metrics: Metrics) -> None:
    observer = MetricsObserver(metrics, ["demo"])
    observer.accepted("a", "demo", "image")
    observer.started("a", "demo", "image", 0.3)
    for event in EVENTS:
        observer.event("a", "demo", event)
    observer.finished("a", "demo", "image", "done", 1.9)
    found = samples(metrics)
    expected = {
        "omni_requests_total{graph=demo,kind=image,outcome=done}": 1,
        "omni_request_seconds_sum{graph=demo}": 1.8,
        "omni_waiting_seconds_sum{graph=demo}": 0.3,
        "omni_stage_seconds_sum{graph=demo,stage=draw}": 1.5,
        "omni_stage_seconds_count{graph=demo,stage=rewrite}": 1,
        "omni_stage_payload_bytes_total{graph=demo,stage=draw}": 12288,
        "omni_steps_total{graph=demo,stage=rewrite,unit=token}": 3,
        "omni_steps_total{graph=demo,stage=draw,unit=denoise step}": 2,
        "omni_hop_seconds_count{graph=demo,source=rewrite,target=draw,transport=object_store}": 1,
        "omni_hop_bytes_total{graph=demo,source=rewrite,target=draw,transport=object_store}": 40,
        "omni_stage_peak_host_bytes{graph=demo,stage=rewrite}": 5000,
        "omni_stage_peak_device_bytes{graph=demo,stage=draw}": 7000,
        "omni_aborts_total{graph=demo}": 0,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_failures_aborts_refusals_and_restarts_are_counted(metrics: Metrics) -> None:
    observer = MetricsObserver(metrics, ["demo"])
    for outcome in ("failed", "aborted", "aborted", "restarted"):
        observer.finished("b", "demo", "job", outcome, 1.0)
    observer.refused("demo", "job", "QueueFull")
    observer.refused("what a client wrote", "job", "InputError")
    found = samples(metrics)
    expected = {
        "omni_requests_total{graph=demo,kind=job,outcome=failed}": 1,
        "omni_requests_total{graph=demo,kind=job,outcome=aborted}": 2,
        "omni_aborts_total{graph=demo}": 2,
        "omni_restarts_total{graph=demo}": 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    refused = {name: value for name, value in found.items() if name.startswith("omni_requests_refused_total")}
    assert refused == {"omni_requests_refused_total{graph=demo,reason=QueueFull}": 1}


def test_loading_is_noted_when_it_is_done(metrics: Metrics) -> None:
    observer = MetricsObserver(metrics, ["demo"])
    observer.loaded("demo", LoadProgress(stage="draw", component="vae", done_bytes=1, total_bytes=2))
    assert not any(name.startswith("omni_stage_load") for name in samples(metrics))
    ready = LoadProgress(
        stage="draw",
        component="",
        done_bytes=2,
        total_bytes=2,
        state="ready",
        load_seconds=2.5,
        peak_device_bytes=10,
        peak_host_bytes=20,
    )
    observer.loaded("demo", ready)
    found = samples(metrics)
    assert found["omni_stage_load_seconds{graph=demo,stage=draw}"] == 2.5
    assert found["omni_stage_peak_device_bytes{graph=demo,stage=draw}"] == 10
    assert found["omni_stage_peak_host_bytes{graph=demo,stage=draw}"] == 20


def test_the_load_is_read_at_each_scrape(metrics: Metrics) -> None:
    graphs = {"demo": GraphLoad(num_queued=5, num_running=4)}
    metrics.watch(lambda: Load(graphs, num_listeners=2, num_events=70))
    found = samples(metrics)
    assert found["omni_queue_length{graph=demo}"] == 5
    assert found["omni_requests_running{graph=demo}"] == 4
    assert found["omni_event_listeners{}"] == 2
    assert found["omni_job_events_total{}"] == 70
    graphs["demo"] = GraphLoad(num_queued=0, num_running=1)
    assert samples(metrics)["omni_queue_length{graph=demo}"] == 0


async def test_jobs_are_counted_at_each_scrape_while_the_store_answers(metrics: Metrics) -> None:
    answers = iter([{("demo", "queued"): 3, ("demo", "done"): 1}, {("demo", "done"): 4}, None])

    async def count() -> dict[tuple[str, str], int]:
        answer = next(answers)
        if answer is None:
            raise StoreError("away")
        return answer

    app = FastAPI()
    app.include_router(build_router(metrics, count))
    expected = [{"queued": 3.0, "done": 1.0}, {"done": 4.0}, {}]
    for states in expected:
        answer = await ask(app, "GET", "/metrics")
        assert answer.status_code == 200
        found = samples(metrics)
        jobs = {name: value for name, value in found.items() if name.startswith("omni_jobs")}
        assert jobs == {f"omni_jobs{{graph=demo,state={state}}}": number for state, number in states.items()}


def test_names_have_the_prefix_and_a_unit(metrics: Metrics) -> None:
    metrics.watch(lambda: Load({}, 0, 0))
    text, _ = metrics.render()
    names = re.findall(r"^# TYPE (\S+)", text.decode(), re.MULTILINE)
    ours = [name for name in names if not name.startswith(("python_", "process_")) and not name.endswith("_created")]
    assert len(ours) >= 20
    units = re.compile(r"omni_\w+_(seconds|bytes|total|running|length|listeners)|omni_jobs")
    assert [name for name in ours if not units.fullmatch(name)] == []
    assert "process_resident_memory_bytes" in names


async def test_routes_are_templates_and_bounded(metrics: Metrics) -> None:
    app = app_of(metrics)
    for path in ("/jobs/job_1", "/jobs/job_2", "/nowhere/1", "/nowhere/2"):
        await ask(app, "GET", path)
    await ask(app, "BREW", "/jobs/job_1")
    await ask(app, "GET", "/broken")
    found = samples(metrics)
    counts = {name: value for name, value in found.items() if name.startswith("omni_http_requests_total")}
    assert counts == {
        "omni_http_requests_total{method=GET,route=/jobs/{job_id},status=200}": 2,
        "omni_http_requests_total{method=GET,route=none,status=404}": 2,
        "omni_http_requests_total{method=OTHER,route=/jobs/{job_id},status=405}": 1,
        "omni_http_requests_total{method=GET,route=/broken,status=500}": 1,
    }
    assert found["omni_http_request_seconds_count{method=GET,route=/jobs/{job_id}}"] == 2
    assert found["omni_http_requests_running{}"] == 0


@pytest.mark.parametrize(
    ("accept", "media_type", "end"),
    [
        ("", "text/plain", b""),
        ("application/openmetrics-text;version=1.0.0", "application/openmetrics-text", b"# EOF\n"),
    ],
)
async def test_the_format_is_what_was_asked_for(metrics: Metrics, accept: str, media_type: str, end: bytes) -> None:
    answer = await ask(app_of(metrics), "GET", "/metrics", accept=accept)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(media_type)
    assert answer.content.endswith(end)
    assert b"omni_http_requests_running 1.0" in answer.content


async def test_a_client_that_left_is_told_from_an_answer(metrics: Metrics) -> None:
    async def leave(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await receive()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        """Nobody is there."""

    scope = {"type": "http", "method": "POST", "path": "/x"}
    await MetricsMiddleware(leave, metrics)(scope, receive, send)
    assert samples(metrics)["omni_http_requests_total{method=POST,route=none,status=disconnected}"] == 1


def test_two_apps_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    MetricsObserver(one, ["demo"]).finished("a", "demo", "job", "aborted", 1.0)
    assert "omni_aborts_total{graph=demo}" in samples(one)
    assert "omni_aborts_total{graph=demo}" not in samples(other)
