"""What a whole app tells of itself: metrics and spans of real requests, and the graph's time in the answer's header."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from omni.server.app import build_app
from omni.server.service import Service
from omni.server.settings import ServerSettings
from omni.server.tracing import Tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
CHAT = {"model": "g", "messages": [{"role": "user", "content": "a"}]}


class Site(NamedTuple):
    """An app, and what its exporter got."""

    client: httpx.AsyncClient
    spans: InMemorySpanExporter

    async def metrics(self) -> dict[str, float]:
        """`name{label="value"}` -> value."""
        text = (await self.client.get("/metrics")).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        labels = [",".join(f"{key}={value}" for key, value in sorted(sample.labels.items())) for sample in samples]
        return {f"{sample.name}{{{text}}}": sample.value for sample, text in zip(samples, labels, strict=True)}


@pytest.fixture
async def site(make_service: Callable[..., Service]) -> AsyncIterator[Site]:
    service = make_service({"g": "echo"})
    await service.start()
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    app = build_app(service, ServerSettings(), tracing=Tracing(provider))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield Site(client, spans)


async def test_a_synchronous_call(site: Site) -> None:
    answer = await site.client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": TRACEPARENT})
    assert answer.status_code == 200
    name, _, milliseconds = answer.headers["server-timing"].partition(";dur=")
    assert name == "graph"
    assert float(milliseconds) > 0
    found = await site.metrics()
    expected = {
        "omni_http_requests_total{method=POST,route=/v1/chat/completions,status=200}": 1,
        "omni_requests_total{graph=g,kind=chat,outcome=done}": 1,
        "omni_stage_seconds_count{graph=g,stage=work}": 1,
        "omni_waiting_seconds_count{graph=g}": 1,
        "omni_queue_length{graph=g}": 0,
        "omni_requests_running{graph=g}": 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    spans = {span.name: span for span in site.spans.get_finished_spans()}
    assert set(spans) == {"POST /v1/chat/completions", "request g", "wait", "stage work"}
    assert {f"{span.context.trace_id:032x}" for span in spans.values() if span.context} == {TRACE}


async def test_a_job(site: Site) -> None:
    headers = {"traceparent": TRACEPARENT, "prefer": "wait=60"}
    answer = await site.client.post("/v1/graphs/g/jobs", json={"inputs": {"prompt": "a"}}, headers=headers)
    assert (answer.status_code, answer.json()["state"]) == (200, "done")
    assert answer.headers["server-timing"].startswith("graph;dur=")
    events = (await site.client.get(f"/v1/jobs/{answer.json()['id']}/events")).text
    found = await site.metrics()
    assert found["omni_jobs{graph=g,state=done}"] == 1
    assert found["omni_job_events_total{}"] == events.count("event: ")
    assert found["omni_requests_total{graph=g,kind=job,outcome=done}"] == 1
    assert found["omni_event_listeners{}"] == 0
    (span,) = [span for span in site.spans.get_finished_spans() if span.name == "request g"]
    assert f"{span.context.trace_id:032x}" == TRACE


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {**CHAT, "nothing": 1}, 400),
        ("/v1/graphs/another/jobs", {"inputs": {}}, 404),
        ("/v1/nowhere/at-all", {}, 404),
    ],
)
async def test_what_is_refused_makes_no_labels(site: Site, path: str, body: Any, status: int) -> None:
    assert (await site.client.post(path, json=body)).status_code == status
    found = {key: value for key, value in (await site.metrics()).items() if key.startswith("omni_http_requests_total")}
    (key,) = found
    assert f"status={status}" in key
    assert "another" not in key
    assert "at-all" not in key
