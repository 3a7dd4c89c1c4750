"""Prometheus metrics of one app, in a registry of its own: what to count, how it is heard, and `GET /metrics`.

Labels come from the graphs and from route templates, never from what a client sends, so that their number is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni.messages import (
    Aborted,
    Done,
    Event,
    Failed,
    HopFinished,
    LoadProgress,
    StageFinished,
    StageProgress,
)

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 300.0, 600.0, 1800.0, 3600.0),
)
"""Upper bounds of the histograms' buckets: from a hop of a millisecond to a film of an hour."""
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
NO_ROUTE = "none"
"""The route of requests that no route took."""
DISCONNECTED = "disconnected"
"""The status of requests whose client left before the answer was complete."""


class GraphLoad(msgspec.Struct, frozen=True):
    """How busy a graph is now."""

    num_queued: int
    num_running: int


Loads = Callable[[], Mapping[str, GraphLoad]]
"""Graph -> how busy it is; called for each scrape, in a thread."""
JobCounts = Callable[[], Mapping[tuple[str, str], int]]
"""(Graph, state) -> number of stored jobs; called for each scrape, in a thread."""


class Metrics:
    """The metrics of one app. `registry` holds them all."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        for build in (ProcessCollector, PlatformCollector, GCCollector):
            build(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=SECONDS)

        route = ("method", "route")
        self.http_requests = counter("omni_http_requests_total", "HTTP requests that are over", *route, "status")
        self.http_seconds = histogram("omni_http_request_seconds", "From a request's head to its answer's end", *route)
        self.http_running = gauge("omni_http_requests_running", "HTTP requests under way")
        self.requests = counter("omni_requests_total", "Requests to graphs that are over", "graph", "outcome")
        self.request_seconds = histogram("omni_request_seconds", "A done request's time in its graph", "graph")
        self.refused = counter("omni_requests_refused_total", "Requests that were not queued", "graph", "reason")
        self.waiting_seconds = histogram("omni_waiting_seconds", "From a request's arrival to its start", "graph")
        stage = ("graph", "stage")
        self.stage_seconds = histogram("omni_stage_seconds", "A stage's work on one request", *stage)
        self.payload_bytes = counter("omni_stage_payload_bytes_total", "Payloads that stages have made", *stage)
        self.steps = counter("omni_steps_total", "Steps of stages: denoise steps, tokens, items", *stage, "unit")
        self.load_seconds = gauge("omni_stage_load_seconds", "What loading the stage took", *stage)
        self.device_bytes = gauge("omni_stage_peak_device_bytes", "Most GPU memory of the stage's process", *stage)
        self.host_bytes = gauge("omni_stage_peak_host_bytes", "Most memory of the stage's process", *stage)
        hop = ("graph", "source", "target", "transport")
        self.hop_seconds = histogram("omni_hop_seconds", "A payload's way from stage to stage", *hop)
        self.hop_bytes = counter("omni_hop_bytes_total", "Bytes that crossed an edge", *hop)
        self.aborts = counter("omni_aborts_total", "Requests that were aborted", "graph")
        self.restarts = counter("omni_restarts_total", "Attempts at a job after its first", "graph")
        self.job_events = counter("omni_job_events_total", "Events of jobs that are stored")
        self.listeners = gauge("omni_event_listeners", "Clients that listen to a job's events")

    def watch_loads(self, loads: Loads) -> None:
        """Show how busy graphs are."""
        self.registry.register(_Loads(loads))

    def watch_jobs(self, counts: JobCounts) -> None:
        """Show how many jobs there are in each state."""
        self.registry.register(_Jobs(counts))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics as text, and its media type: OpenMetrics when the header `accept` asks for it."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


class _Loads(Collector):
    """Reads how busy graphs are when it is asked, so that no count can drift."""

    def __init__(self, loads: Loads) -> None:
        self._loads = loads

    def describe(self) -> Iterable[Metric]:
        return self._families({})

    def collect(self) -> Iterable[Metric]:
        return self._families(self._loads())

    def _families(self, loads: Mapping[str, GraphLoad]) -> list[Metric]:
        queued = GaugeMetricFamily("omni_queue_length", "Requests that wait", labels=["graph"])
        running = GaugeMetricFamily("omni_requests_running", "Requests that run", labels=["graph"])
        for graph, load in loads.items():
            queued.add_metric([graph], load.num_queued)
            running.add_metric([graph], load.num_running)
        return [queued, running]


class _Jobs(Collector):
    """Asks the store, which all servers that share it have in common."""

    def __init__(self, counts: JobCounts) -> None:
        self._counts = counts

    def describe(self) -> Iterable[Metric]:
        return self._families({})

    def collect(self) -> Iterable[Metric]:
        return self._families(self._counts())

    def _families(self, counts: Mapping[tuple[str, str], int]) -> list[Metric]:
        family = GaugeMetricFamily("omni_jobs", "Stored jobs of all servers", labels=["graph", "state"])
        for key, number in counts.items():
            family.add_metric(key, number)
        return [family]


class _GraphMetrics:
    """The label values of one graph, looked up once: a request costs some microseconds so."""

    def __init__(self, metrics: Metrics, graph: str) -> None:
        self._metrics = metrics
        self._graph = graph
        self.outcomes = {name: metrics.requests.labels(graph, name) for name in ("done", "failed", "aborted")}
        self.seconds = metrics.request_seconds.labels(graph)
        self.aborts = metrics.aborts.labels(graph)
        self.waiting_seconds = metrics.waiting_seconds.labels(graph)
        self.restarts = metrics.restarts.labels(graph)
        self._children: dict[tuple[str, ...], Any] = {}

    def steps(self, stage: str, unit: str) -> Counter:
        """The counter of a stage's steps."""
        key = ("steps", stage, unit)
        if key not in self._children:
            self._children[key] = self._metrics.steps.labels(self._graph, stage, unit)
        child: Counter = self._children[key]
        return child

    def stage(self, stage: str) -> tuple[Histogram, Counter]:
        """Seconds and payload bytes of a stage."""
        key = ("stage", stage)
        if key not in self._children:
            labels = (self._graph, stage)
            found = (self._metrics.stage_seconds.labels(*labels), self._metrics.payload_bytes.labels(*labels))
            self._children[key] = found
        pair: tuple[Histogram, Counter] = self._children[key]
        return pair

    def hop(self, event: HopFinished) -> tuple[Histogram, Counter]:
        """Seconds and bytes of an edge."""
        key = (event.source, event.target, event.transport)
        if key not in self._children:
            labels = (self._graph, *key)
            found = (self._metrics.hop_seconds.labels(*labels), self._metrics.hop_bytes.labels(*labels))
            self._children[key] = found
        pair: tuple[Histogram, Counter] = self._children[key]
        return pair


class MetricsListener:
    """Counts what happens to requests. Every request must end in one final event, also when its client left."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._graphs: dict[str, _GraphMetrics] = {}

    def add_graph(self, graph: str) -> None:
        """Make the graph's metrics, so that they are there with 0 before its first request."""
        self._graph(graph)

    def observe(self, graph: str, event: Event) -> None:
        """Count one event of a request to `graph`."""
        found = self._graph(graph)
        match event:
            case StageProgress():
                found.steps(event.stage, event.unit).inc()
            case StageFinished():
                seconds, num_bytes = found.stage(event.stage)
                seconds.observe(event.seconds)
                num_bytes.inc(event.bytes)
                self._note_peaks(graph, event)
            case HopFinished():
                seconds, num_bytes = found.hop(event)
                seconds.observe(event.seconds)
                num_bytes.inc(event.bytes)
            case Done():
                found.outcomes["done"].inc()
                found.seconds.observe(event.seconds)
            case Failed():
                found.outcomes["failed"].inc()
            case Aborted():
                found.outcomes["aborted"].inc()
                found.aborts.inc()

    def loaded(self, graph: str, progress: LoadProgress) -> None:
        """Note how a stage's loading ended; from any thread."""
        if progress.state == "ready":
            self._metrics.load_seconds.labels(graph, progress.stage).set(progress.load_seconds)
            self._note_peaks(graph, progress)

    def waited(self, graph: str, seconds: float) -> None:
        """Note how long a request has waited before it began."""
        self._graph(graph).waiting_seconds.observe(seconds)

    def refused(self, graph: str, reason: str) -> None:
        """Count a request that was not queued; `reason` is one of a few short words."""
        self._metrics.refused.labels(graph, reason).inc()

    def restarted(self, graph: str) -> None:
        """Count another attempt at a job."""
        self._graph(graph).restarts.inc()

    def _note_peaks(self, graph: str, event: StageFinished | LoadProgress) -> None:
        if event.peak_device_bytes:
            self._metrics.device_bytes.labels(graph, event.stage).set(event.peak_device_bytes)
        if event.peak_host_bytes:
            self._metrics.host_bytes.labels(graph, event.stage).set(event.peak_host_bytes)

    def _graph(self, graph: str) -> _GraphMetrics:
        found = self._graphs.get(graph)
        if found is None:
            found = self._graphs[graph] = _GraphMetrics(self._metrics, graph)
        return found


class MetricsMiddleware:
    """Counts HTTP requests by route, method and status. Pure ASGI: it adds some microseconds and no task."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, and count it when its answer is complete or its client has left."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, is_complete = "500", False

        async def watch_receive() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect" and not is_complete:
                status = DISCONNECTED
            return message

        async def watch_send(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start" and status != DISCONNECTED:
                status = str(message["status"])
            elif message["type"] == "http.response.body":
                is_complete = is_complete or not message.get("more_body", False)
            await send(message)

        begin = time.perf_counter()
        self._metrics.http_running.inc()
        try:
            await self._app(scope, watch_receive, watch_send)
        finally:
            labels = (scope["method"] if scope["method"] in METHODS else "OTHER", route_of(scope))
            self._metrics.http_running.dec()
            self._metrics.http_requests.labels(*labels, status).inc()
            self._metrics.http_seconds.labels(*labels).observe(time.perf_counter() - begin)


def route_of(scope: Scope) -> str:
    """The template of the route that took a request, `/v1/jobs/{job_id}`; the raw path has no bound."""
    return getattr(scope.get("route"), "path", "") or NO_ROUTE


def build_router(metrics: Metrics) -> APIRouter:
    """`GET /metrics`."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response, summary="Metrics for Prometheus", tags=["health"])
    def show_metrics(request: Request) -> Response:
        text, media_type = metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": media_type})

    return router
