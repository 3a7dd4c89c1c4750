"""OpenTelemetry spans of HTTP calls, requests, stages and hops, for whoever collects them.

`build_tracing` gives None unless a tracer provider is given or the standard environment variables name an exporter;
then nothing of its SDK is imported. FastAPI makes the spans of HTTP calls, below the caller's own where the client
sends a W3C `traceparent`; the spans below those are made here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from fastapi.telemetry import TelemetryConfig

from omni.errors import UsageError
from omni.messages import Aborted, Event, Failed, HopFinished, StageFinished, StageStarted
from omni.server.observer import Observer

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

API_PREFIX = "/v1/"
"""Calls of paths below it get spans; health checks and scrapes do not."""
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
OTLP = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
"""Protocol by its standard name -> exporter by its entry point."""
DEFAULT_PROTOCOL = "http/protobuf"
NEEDED = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"


class _RequestSpans:
    """The open span of a request, and when its stages began, in nanoseconds since the epoch."""

    def __init__(self, span: Span, context: Context) -> None:
        self.span = span
        self.context = context
        self.begins: dict[str, int] = {}


class Tracing(Observer):
    """Makes spans out of what the service tells: a request from its acceptance on, its wait, its stages and hops."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, trace

        self._trace = trace
        self._current = context.get_current
        self.provider = provider
        self._tracer = provider.get_tracer("omni")
        self._parents: dict[str, Context] = {}
        """Of requests that wait: the context of the call that made them."""
        self._requests: dict[str, _RequestSpans] = {}

    def accepted(self, request_id: str, graph: str, kind: str) -> None:
        self._parents[request_id] = self._current()

    def started(self, request_id: str, graph: str, kind: str, waited_seconds: float) -> None:
        now = time.time_ns()
        begin = now - _nanoseconds(waited_seconds)
        attributes = {"omni.graph": graph, "omni.request_id": request_id, "omni.kind": kind}
        parent = self._parents.pop(request_id, None) or self._empty()
        span = self._tracer.start_span(f"request {graph}", parent, attributes=attributes, start_time=begin)
        found = self._requests[request_id] = _RequestSpans(span, self._trace.set_span_in_context(span))
        self._add(found, "wait", begin, now, {})

    def event(self, request_id: str, graph: str, event: Event) -> None:
        found, now = self._requests.get(request_id), time.time_ns()
        if found is None:
            return
        match event:
            case StageStarted():
                found.begins[event.stage] = now
            case StageFinished():
                found.begins.pop(event.stage, None)
                sizes = {"omni.payload_bytes": event.bytes, "omni.peak_device_bytes": event.peak_device_bytes}
                self._add(found, f"stage {event.stage}", now - _nanoseconds(event.seconds), now, sizes)
            case HopFinished():
                facts = {"omni.transport": event.transport, "omni.bytes": event.bytes}
                name = f"hop {event.source} to {event.target}"
                self._add(found, name, now - _nanoseconds(event.seconds), now, facts)
            case Failed():
                found.span.set_status(self._trace.StatusCode.ERROR, str(event.error))
            case Aborted():
                found.span.set_attribute("omni.reason", event.reason)

    def finished(self, request_id: str, graph: str, kind: str, outcome: str, seconds: float) -> None:
        found, now = self._requests.pop(request_id, None), time.time_ns()
        self._parents.pop(request_id, None)
        if found is None:  # it has only waited
            return
        for stage, begin in found.begins.items():  # those that did not finish
            self._add(found, f"stage {stage}", begin, now, {"omni.finished": False})
        found.span.set_attribute("omni.outcome", outcome)
        found.span.end(now)

    def stop(self) -> None:
        """Send what is still here. Blocks."""
        self.provider.shutdown()

    def _empty(self) -> Context:
        """The context of no span, for jobs whose call is long gone."""
        return self._trace.set_span_in_context(self._trace.INVALID_SPAN)

    def _add(self, found: _RequestSpans, name: str, begin: int, end: int, attributes: Mapping[str, Any]) -> None:
        """A span that is over."""
        self._tracer.start_span(name, found.context, attributes=attributes, start_time=begin).end(end)


def telemetry_of(tracing: Tracing | None) -> TelemetryConfig:
    """What `FastAPI(telemetry=...)` shall do: a span around each call of the API, or nothing at all."""
    return {
        "tracing": tracing is not None,
        "tracer_provider": None if tracing is None else tracing.provider,
        "operation_spans": False,
        "metrics": False,  # ours are in omni/server/metrics.py
        "logs": False,
        "auto_configure": False,
        "exclude": lambda scope: not scope["path"].startswith(API_PREFIX),
    }


def build_tracing(
    environment: Mapping[str, str] = os.environ, provider: TracerProvider | None = None
) -> Tracing | None:
    """Tracing by `provider`, or by what the environment configures; None without both.

    The variables are OpenTelemetry's: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_EXPORTER, OTEL_SERVICE_NAME and so on.
    Raises UsageError when they ask for an exporter that is not installed.
    """
    if provider is not None:
        return Tracing(provider)
    names = _exporter_names(environment)
    if not names or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider as SdkProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(f"traces are asked for (OTEL_...), which needs the SDK: {NEEDED}") from error
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    built = SdkProvider(resource=Resource.create({} if named else {"service.name": "omni"}))
    for name in names:
        built.add_span_processor(BatchSpanProcessor(_find_exporter(name)()))
    return Tracing(built)


def _exporter_names(environment: Mapping[str, str]) -> list[str]:
    """Entry points of the exporters that the environment asks for."""
    default = "otlp" if any(environment.get(name) for name in ENDPOINTS) else "none"
    names = [name.strip() for name in (environment.get("OTEL_TRACES_EXPORTER") or default).split(",")]
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    otlp = OTLP.get(protocol or DEFAULT_PROTOCOL, "otlp")
    return [otlp if name == "otlp" else name for name in names if name not in ("", "none")]


def _find_exporter(name: str) -> Any:
    for entry in entry_points(group="opentelemetry_traces_exporter", name=name):
        return entry.load()
    raise UsageError(
        f"the environment (OTEL_...) asks for the exporter '{name}' of traces, which is not installed: {NEEDED}, or "
        "set OTEL_TRACES_EXPORTER=none"
    )


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
