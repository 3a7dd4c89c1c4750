"""Spans of calls, requests, stages and hops; and nothing at all when nobody collects them."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from omni.errors import StageError, UsageError
from omni.messages import Aborted, Done, Event, Failed, HopFinished, Queued, StageFinished, StageStarted
from omni.server.tracing import Tracing, build_tracing, telemetry_of

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
EVENTS: tuple[Event, ...] = (
    Queued(request_id="a"),
    StageStarted(request_id="a", stage="rewrite"),
    StageFinished(request_id="a", stage="rewrite", seconds=0.2, bytes=40),
    HopFinished(request_id="a", source="rewrite", target="draw", transport="object_store", seconds=0.002, bytes=40),
    StageStarted(request_id="a", stage="draw"),
    StageFinished(request_id="a", stage="draw", seconds=1.5, bytes=99),
)
DONE = Done(request_id="a", outputs={}, seconds=1.8)
WAITED = 0.25


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    found = build_tracing({}, provider)
    assert found is not None
    return found


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


def parent_of(span: ReadableSpan) -> str:
    return f"{span.parent.span_id:016x}" if span.parent else ""


def id_of(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


def play(tracing: Tracing, events: tuple[Event, ...], outcome: str, request_id: str = "a") -> None:
    """What the service tells of one request after its acceptance."""
    tracing.started(request_id, "demo", "image", WAITED)
    for event in events:
        tracing.event(request_id, "demo", event)
    tracing.finished(request_id, "demo", "image", outcome, 1.0)


def seconds_of(span: ReadableSpan) -> float:
    return ((span.end_time or 0) - (span.start_time or 0)) / 1e9


async def call(tracing: Tracing, path: str, events: tuple[Event, ...] = (), **headers: str) -> None:
    """One HTTP call of an app, whose request has these events."""
    app = FastAPI(telemetry=telemetry_of(tracing))

    @app.post("/v1/things/{thing}")
    async def make(thing: str) -> str:
        if events:
            tracing.accepted("a", "demo", "image")
            await asyncio.create_task(asyncio.to_thread(play, tracing, events, "done"), context=contextvars.Context())
        return thing

    @app.post("/v1/broken")
    async def broken() -> None:
        raise ZeroDivisionError

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post(path, headers=headers)


async def test_a_call_has_spans_of_its_request_stages_and_hops(tracing: Tracing, spans: InMemorySpanExporter) -> None:
    await call(tracing, "/v1/things/7", (*EVENTS, DONE), traceparent=TRACEPARENT)
    found = by_name(spans)
    assert set(found) == {
        "POST /v1/things/{thing}",
        "request demo",
        "wait",
        "stage rewrite",
        "stage draw",
        "hop rewrite to draw",
    }
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    http, request = found["POST /v1/things/{thing}"], found["request demo"]
    assert (parent_of(http), parent_of(request)) == (PARENT, id_of(http))
    for name in ("wait", "stage rewrite", "stage draw", "hop rewrite to draw"):
        assert parent_of(found[name]) == id_of(request)
    assert http.kind is SpanKind.SERVER
    facts = {"http.request.method": "POST", "http.route": "/v1/things/{thing}", "http.response.status_code": 200}
    assert facts.items() <= dict(http.attributes or {}).items()
    assert dict(request.attributes or {}) == {
        "omni.graph": "demo",
        "omni.request_id": "a",
        "omni.kind": "image",
        "omni.outcome": "done",
    }
    assert seconds_of(found["stage draw"]) == pytest.approx(1.5)
    assert seconds_of(found["wait"]) == pytest.approx(WAITED)
    assert request.start_time == found["wait"].start_time


async def test_a_call_without_traceparent_begins_a_trace(tracing: Tracing, spans: InMemorySpanExporter) -> None:
    await call(tracing, "/v1/things/7", traceparent="not-a-traceparent")
    (span,) = spans.get_finished_spans()
    assert span.parent is None


async def test_faults_of_ours_are_errors_and_other_paths_have_no_span(
    tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    await call(tracing, "/health")
    assert spans.get_finished_spans() == ()
    await call(tracing, "/v1/broken")
    (span,) = spans.get_finished_spans()
    assert (span.name, span.status.status_code) == ("POST /v1/broken", StatusCode.ERROR)


def test_a_job_whose_call_is_long_gone_begins_a_trace(tracing: Tracing, spans: InMemorySpanExporter) -> None:
    play(tracing, (DONE,), "done")
    assert by_name(spans)["request demo"].parent is None
    tracing.event("gone", "demo", DONE)
    tracing.finished("gone", "demo", "job", "lost", 0.0)
    assert len(spans.get_finished_spans()) == 2, "nothing is told of what was never started"


@pytest.mark.parametrize(
    ("final", "status", "outcome"),
    [
        (Failed(request_id="a", error=StageError("draw", "out of paint")), StatusCode.ERROR, "failed"),
        (Aborted(request_id="a", reason="the client left"), StatusCode.UNSET, "aborted"),
        (None, StatusCode.UNSET, "aborted"),
    ],
)
def test_stages_that_did_not_finish_have_spans_too(
    tracing: Tracing, spans: InMemorySpanExporter, final: Event | None, status: StatusCode, outcome: str
) -> None:
    play(tracing, (*EVENTS[:-1], *((final,) if final else ())), outcome)
    found = by_name(spans)
    assert found["request demo"].status.status_code is status
    assert (found["request demo"].attributes or {})["omni.outcome"] == outcome
    assert (found["stage draw"].attributes or {})["omni.finished"] is False


def test_a_request_that_has_only_waited_leaves_nothing(tracing: Tracing, spans: InMemorySpanExporter) -> None:
    tracing.accepted("a", "demo", "job")
    tracing.finished("a", "demo", "job", "aborted", 0.0)
    assert spans.get_finished_spans() == ()
    assert not vars(tracing)["_parents"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"},
    ],
)
def test_nothing_is_traced_unless_asked_for(environment: dict[str, str]) -> None:
    assert build_tracing(environment) is None


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "no"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "smoke"}, "smoke"),
    ],
)
def test_an_exporter_that_is_not_installed_is_named(environment: dict[str, str], name: str) -> None:
    with pytest.raises(UsageError, match=f"the exporter '{name}' of traces, which is not installed: pip install"):
        build_tracing(environment)


def test_the_environment_configures_an_exporter() -> None:
    code = """
import sys
import omni.server.metrics, omni.server.tracing
assert omni.server.tracing.build_tracing({}) is None
assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")], "FastAPI has the rest"
tracing = omni.server.tracing.build_tracing({"OTEL_TRACES_EXPORTER": "console"})
tracing.started("a", "demo", "job", 0.0)
tracing.finished("a", "demo", "job", "done", 0.0)
tracing.stop()
assert not {"torch", "ray", "diffusers"} & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert '"name": "request demo"' in ran.stdout
    assert '"service.name": "omni"' in ran.stdout
