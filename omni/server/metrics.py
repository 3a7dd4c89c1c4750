"""Prometheus metrics of one app, in a registry of its own: what to count, how it is heard, and `GET /metrics`.

Labels come from the graphs and from route templates, never from what a client sends, so that their number is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
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
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni.messages import (
    Done,
    Event,
    HopFinished,
    LoadProgress,
    StageFinished,
    StageProgress,
)
from omni.server.jobs import StoreError
from omni.server.observer import Observer

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


class Load(msgspec.Struct, frozen=True):
    """How busy a service is now."""

    graphs: Mapping[str, GraphLoad]
    num_listeners: int
    """Clients that listen to a job's events."""
    num_events: int
    """Events of jobs that this process has stored so far."""


ReadLoad = Callable[[], Load]
"""Called for each scrape, in a thread."""
CountJobs = Callable[[], Awaitable[Mapping[tuple[str, str], int]]]
"""(Graph, state) -> number of stored jobs. Raises StoreError."""


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
        kind = ("graph", "kind")
        self.requests = counter("omni_requests_total", "Requests to graphs that are over", *kind, "outcome")
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
        self.restarts = counter("omni_restarts_total", "Jobs that went back to the queue", "graph")
        self.jobs = gauge("omni_jobs", "Stored jobs of all servers", "graph", "state")

    def watch(self, read: ReadLoad) -> None:
        """Show how busy a service is."""
        self.registry.register(_LoadCollector(read))

    def set_jobs(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Show how many jobs there are of each graph, in each state."""
        self.jobs.clear()
        for labels, number in counts.items():
            self.jobs.labels(*labels).set(number)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics as text, and its media type: OpenMetrics when the header `accept` asks for it."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


class _LoadCollector(Collector):
    """Reads how busy a service is when it is asked, so that no count can drift."""

    def __init__(self, read: ReadLoad) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return self._families(Load({}, 0, 0))

    def collect(self) -> Iterable[Metric]:
        return self._families(self._read())

    def _families(self, load: Load) -> list[Metric]:
        queued = GaugeMetricFamily("omni_queue_length", "Requests that wait", labels=["graph"])
        running = GaugeMetricFamily("omni_requests_running", "Requests that run", labels=["graph"])
        for graph, found in load.graphs.items():
            queued.add_metric([graph], found.num_queued)
            running.add_metric([graph], found.num_running)
        listeners = GaugeMetricFamily(
            "omni_event_listeners", "Clients that listen to a job's events", load.num_listeners
        )
        return [
            queued,
            running,
            listeners,
            CounterMetricFamily("omni_job_events", "Events of jobs that were stored", load.num_events),
        ]


class _GraphMetrics:
    """The label values of one graph, looked up once: a request costs some microseconds so."""

    def __init__(self, metrics: Metrics, graph: str) -> None:
        self._metrics = metrics
        self._graph = graph
        self.seconds = metrics.request_seconds.labels(graph)
        self.waiting_seconds = metrics.waiting_seconds.labels(graph)
        self.aborts = metrics.aborts.labels(graph)
        self.restarts = metrics.restarts.labels(graph)
        self._children: dict[tuple[str, ...], Any] = {}

    def outcome(self, kind: str, outcome: str) -> Counter:
        """The counter of an end."""
        key = ("outcome", kind, outcome)
        if key not in self._children:
            self._children[key] = self._metrics.requests.labels(self._graph, kind, outcome)
        child: Counter = self._children[key]
        return child

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


class MetricsObserver(Observer):
    """Counts what the service tells."""

    def __init__(self, metrics: Metrics, graphs: Iterable[str] = ()) -> None:
        self._metrics = metrics
        self._graphs = {graph: _GraphMetrics(metrics, graph) for graph in graphs}

    def refused(self, graph: str, kind: str, reason: str) -> None:
        if graph in self._graphs:  # a name that a client made up is no label
            self._metrics.refused.labels(graph, reason).inc()

    def started(self, request_id: str, graph: str, kind: str, waited_seconds: float) -> None:
        self._graphs[graph].waiting_seconds.observe(waited_seconds)

    def event(self, request_id: str, graph: str, event: Event) -> None:
        found = self._graphs[graph]
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
                found.seconds.observe(event.seconds)

    def finished(self, request_id: str, graph: str, kind: str, outcome: str, seconds: float) -> None:
        found = self._graphs[graph]
        found.outcome(kind, outcome).inc()
        if outcome == "aborted":
            found.aborts.inc()
        elif outcome == "restarted":
            found.restarts.inc()

    def loaded(self, graph: str, progress: LoadProgress) -> None:
        """Note how a stage's loading ended; from any thread."""
        if progress.state == "ready":
            self._metrics.load_seconds.labels(graph, progress.stage).set(progress.load_seconds)
            self._note_peaks(graph, progress)

    def _note_peaks(self, graph: str, event: StageFinished | LoadProgress) -> None:
        if event.peak_device_bytes:
            self._metrics.device_bytes.labels(graph, event.stage).set(event.peak_device_bytes)
        if event.peak_host_bytes:
            self._metrics.host_bytes.labels(graph, event.stage).set(event.peak_host_bytes)


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


def build_router(metrics: Metrics, count_jobs: CountJobs | None = None) -> APIRouter:
    """`GET /metrics`. Without an answer of `count_jobs`, because the store is away, all else is still shown."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response, summary="Metrics for Prometheus", tags=["health"])
    async def show_metrics(request: Request) -> Response:
        if count_jobs is not None:
            try:
                metrics.set_jobs(await count_jobs())
            except StoreError:
                metrics.set_jobs({})
        text, media_type = await run_in_threadpool(metrics.render, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": media_type})

    return router
