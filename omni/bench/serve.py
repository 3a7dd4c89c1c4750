"""A real `omni serve` process under load: latency, what the server adds to the graph's time, the highest rate, memory.

Without GRAPH the server runs a graph whose only stage hands its prompt back, so that all time is the server's. Requests
come from a process of their own. At each --rate they arrive at random (Poisson), and latency counts from when they were
due. Then --connections connections ask as fast as they are answered, for the highest rate. At last the server's memory
is watched over --soak requests.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni.bench.http_load import LoadResult
    from omni.bench.report import Report, Section, Table, Target
    from omni.bench.serve_api import Api
    from omni.bench.server_process import Server

MAX_OVERHEAD_MS = 5.0
MIN_RATE = 300.0
SHARES = (0.5, 0.9, 0.99, 1.0)
NOOP_GRAPH = 'name: noop\nstages:\n  echo: {kind: function, call: "omni.bench.noop:echo"}\n'
CLOSED = "as fast as answered"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni bench serve`."""
    parser.add_argument("graph", metavar="GRAPH", nargs="?", help="default: a graph whose stage hands its prompt back")
    parser.add_argument("--url", metavar="URL", help="measure a server that runs already; GRAPH is then a name")
    parser.add_argument("--api", choices=("auto", "chat", "image", "job"), default="auto", help="which API is asked")
    parser.add_argument("--rate", metavar="R[,R]", default="100,300", help="requests per second (default: 100,300)")
    parser.add_argument("--requests", metavar="N", type=int, default=1000, help="at each rate (default: 1000)")
    parser.add_argument("--connections", metavar="N", type=int, default=16, help="of the closed loop (default: 16)")
    parser.add_argument(
        "--soak", metavar="N", type=int, default=5000, help="watched for memory (default: 5000; 0: none)"
    )
    parser.add_argument("--warmup", metavar="N", type=int, default=500, help="that do not count (default: 500)")
    parser.add_argument("--repeat", metavar="N", type=int, default=1, help="rounds of all rates (default: 1)")
    parser.add_argument("--input", metavar="NAME=VALUE", action="append", default=[], help="an input, for --api job")
    parser.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="change the graph")
    parser.add_argument("--plot", metavar="FILE", help="draw latencies and memory: .png or .svg")


def measure(args: argparse.Namespace) -> Report:
    """Run the bench. Raises UsageError for wrong arguments, OmniError when the server does not come up."""
    from omni.bench.memory_slope import Memory, read_memory
    from omni.bench.serve_api import choose_api
    from omni.bench.server_process import MemoryWatch

    rates = _check(args)
    rows: dict[str, list[LoadResult]] = {}
    cpu: dict[str, list[float]] = {}
    memory: Memory | None = None
    with _server(args) as server:
        api = choose_api(server, args.graph if args.url else None, args.api, args.input)
        load = _Loader(server, api)
        load(args.warmup, connections=args.connections)
        for _ in range(args.repeat):
            for rate in (*rates, 0.0):
                name = f"{rate:g}/s" if rate else CLOSED
                before = server.cpu_seconds()
                result = load(args.requests, rate, args.connections)
                rows.setdefault(name, []).append(result)
                after = server.cpu_seconds()
                if before is not None and after is not None and result.samples:
                    cpu.setdefault(name, []).append((after - before) / len(result.samples))
        if args.soak and server.rss_bytes() is not None:
            with MemoryWatch(server) as watch:
                result = load(args.soak, connections=args.connections)
            rows.setdefault("soak", []).append(result)
            memory = read_memory(watch.samples, [sample.end for sample in result.samples])
    if args.plot:
        from omni.bench.serve_plot import draw

        draw(args.plot, {name: _latencies(results) for name, results in rows.items() if name != "soak"}, memory)
    return _report(args, api, rows, cpu, memory)


class _Loader:
    """Sends load, numbering the requests throughout."""

    def __init__(self, server: Server, api: Api) -> None:
        self._server = server
        self._api = api
        self._number = 0

    def __call__(self, num_requests: int, rate: float = 0.0, connections: int = 16) -> LoadResult:
        from omni.bench.fresh import run_fresh
        from omni.bench.http_load import LoadJob, LoadResult, open_connections

        if not num_requests:
            return LoadResult(samples=[], errors={}, seconds=0.0, cpu_seconds=0.0)
        import msgspec

        job = LoadJob(
            host=self._server.host,
            port=self._server.port,
            path=self._api.path,
            body=self._api.body,
            headers={**self._server.headers, **self._api.headers},
            expect=self._api.expect,
            num_requests=num_requests,
            rate=rate,
            connections=open_connections(rate) if rate else connections,
            first_number=self._number,
            seed=self._number,
        )
        self._number += num_requests
        return msgspec.convert(run_fresh("omni.bench.http_load:run", job), LoadResult)


def _check(args: argparse.Namespace) -> list[float]:
    """The rates. Raises UsageError before anything starts."""
    from omni.errors import UsageError

    try:
        rates = [float(text) for text in args.rate.split(",")]
    except ValueError:
        raise UsageError(f"--rate {args.rate}: give requests per second, as 100 or 50,100,200") from None
    if min(rates) <= 0 or min(args.requests, args.connections, args.repeat) < 1 or min(args.soak, args.warmup) < 0:
        raise UsageError("--rate must be above 0, --requests, --connections and --repeat at least 1")
    if args.plot:
        from omni.bench.serve_plot import check

        check(args.plot)
    if args.url and args.set:
        raise UsageError("--set changes the graph of a server that this bench starts; leave it out with --url")
    return rates


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[Server]:
    import tempfile
    from pathlib import Path

    from omni.bench.server_process import running, started

    if args.url:
        yield running(args.url)
        return
    options = [part for text in args.set for part in ("--set", text)]
    with tempfile.TemporaryDirectory(prefix="omni-bench-") as folder:
        graph = args.graph
        if graph is None:
            graph = f"{folder}/noop.yaml"
            Path(graph).write_text(NOOP_GRAPH)
        with started(graph, options) as server:
            yield server


def _latencies(results: list[LoadResult]) -> list[float]:
    return [sample.latency for result in results for sample in result.samples]


def _overheads(results: list[LoadResult]) -> list[float]:
    """What is left of the latencies without the graph's own time."""
    samples = [sample for result in results for sample in result.samples]
    return [sample.latency - sample.own_seconds for sample in samples if sample.own_seconds is not None]


def _report(
    args: argparse.Namespace, api: Api, rows: dict[str, list[LoadResult]], cpu: dict[str, list[float]], memory: Any
) -> Report:
    from omni.bench.report import Report, describe_machine

    errors = {name: sum(sum(result.errors.values()) for result in results) for name, results in rows.items()}
    kinds = sorted({kind for results in rows.values() for result in results for kind in result.errors})
    correct = not any(errors.values()) and all(map(_latencies, rows.values())) and (memory is None or memory.is_flat)
    sections, tables = _numbers(rows, cpu, errors, memory)
    notes = [f"errors: {', '.join(kinds) or 'none'}"]
    if memory is not None:
        notes.append(f"memory flat: {'yes' if memory.is_flat else 'NO'} ({memory.words})")
    elif args.soak:
        notes.append("memory: not judged; --soak is too small, or the server is no process of this machine's")
    return Report(
        bench="serve",
        settings={"graph": args.graph or "no-op", "api": api.name, "requests": args.requests, "repeat": args.repeat},
        machine=describe_machine(("fastapi", "uvicorn", "uvloop", "httptools")),
        sections=sections,
        targets=() if api.name == "job" else _targets(rows),  # a stored job is written several times
        correct=correct,
        notes=tuple(notes),
        tables=tables,
    )


def _numbers(
    rows: dict[str, list[LoadResult]], cpu: dict[str, list[float]], errors: dict[str, int], memory: Any
) -> tuple[tuple[Section, ...], tuple[Table, ...]]:
    """All that was measured, for the report."""
    from omni.bench.report import Table, build_section, percentile

    def percentiles(values: list[float]) -> tuple[float | None, ...]:
        return tuple(percentile(values, share) * 1000 if values else None for share in SHARES)

    def build(title: str, values: dict[str, list[float]]) -> tuple[Section, ...]:
        found = {name: row for name, row in values.items() if row}
        return (build_section(title, next(iter(found)), found),) if found else ()

    shown = {name: results for name, results in rows.items() if name != "soak"}
    latency = {name: _latencies(results) for name, results in shown.items()}
    overhead = {name: _overheads(results) for name, results in shown.items()}
    columns = ("p50", "p90", "p99", "max")
    facts: dict[str, tuple[float | None, ...]] = {
        name: (
            _rate(results),
            float(errors[name]),
            median(cpu[name]) * 1000 if name in cpu else None,
            sum(r.cpu_seconds for r in results) / max(len(_latencies(results)), 1) * 1000,
        )
        for name, results in rows.items()
    }
    tables = [
        Table(title="latency, ms", columns=columns, rows={n: percentiles(v) for n, v in latency.items()}),
        Table(
            title="added to the graph's own time, ms",
            columns=columns,
            rows={n: percentiles(v) for n, v in overhead.items()},
        ),
        Table(title="per row", columns=("requests/s", "errors", "server CPU ms", "client CPU ms"), rows=facts),
    ]
    if memory is not None:
        tables.append(memory.table())
    return build("latency", latency) + build("added to the graph's own time", overhead), tuple(tables)


def _rate(results: list[LoadResult]) -> float:
    seconds = sum(result.seconds for result in results)
    return len(_latencies(results)) / seconds if seconds else 0.0


def _targets(rows: dict[str, list[LoadResult]]) -> tuple[Target, ...]:
    from omni.bench.report import build_target

    first = next(iter(rows))
    overheads = _overheads(rows[first])
    targets = [build_target(f"requests, {CLOSED}", _rate(rows[CLOSED]), MIN_RATE, "/s", at_most=False)]
    if overheads:
        limit = MAX_OVERHEAD_MS
        targets.insert(0, build_target(f"added at {first}, p50", median(overheads) * 1000, limit, "ms"))
    return tuple(targets)
