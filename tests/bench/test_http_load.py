"""The load generator: arrivals, latency from when a request was due, errors by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import mean

import msgspec
import pytest

from omni.bench.http_load import LoadJob, WrongAnswer, _Work, arrivals, open_connections, run


class Clock:
    """A clock that only sleeping and asking move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_arrivals_are_a_poisson_process() -> None:
    dues = [due for due in arrivals(5000, 200.0, seed=3) if due is not None]
    gaps = [after - before for before, after in zip([0.0, *dues], dues, strict=False)]
    assert dues == sorted(dues)
    assert mean(gaps) == pytest.approx(1 / 200, rel=0.05)
    assert sum(gap > 1 / 200 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03), "exponential gaps"
    assert arrivals(5, 200.0, seed=3) == dues[:5]
    assert arrivals(3, 0.0) == [None] * 3


def test_a_stalled_server_is_charged_for_all_who_came_meanwhile() -> None:
    clock = Clock()

    def ask(number: int) -> None:
        clock.now += 10.0 if number == 0 else 0.0

    work = _Work([0.0, 1.0, 2.0, 3.0], 0.0, clock, clock.sleep)
    work.run(ask)
    assert [sample.latency for sample in work.samples] == [10.0, 9.0, 8.0, 7.0]


def test_a_closed_loop_counts_from_the_sending() -> None:
    clock = Clock()

    def ask(number: int) -> None:
        clock.now += 2.0

    work = _Work([None, None], 0.0, clock, clock.sleep)
    work.run(ask)
    assert [(sample.begin, sample.latency) for sample in work.samples] == [(0.0, 2.0), (2.0, 2.0)]


def test_errors_have_no_sample() -> None:
    def ask(number: int) -> float:
        if number == 1:
            raise WrongAnswer("status 503")
        if number == 2:
            raise ConnectionResetError
        return 0.5

    work = _Work([None] * 4, 0.0)
    work.run(ask)
    assert dict(work.errors) == {"status 503": 1, "ConnectionResetError": 1}
    assert [sample.own_seconds for sample in work.samples] == [0.5, 0.5]


@pytest.mark.parametrize(("rate", "connections"), [(1.0, 16), (100.0, 100), (5000.0, 256)])
def test_open_loops_have_connections_to_spare(rate: float, connections: int) -> None:
    assert open_connections(rate) == connections


@pytest.fixture
def port() -> Iterator[int]:
    """A server that hands the body back, and refuses those with a 3 in them."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(503 if b"3" in body else 200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Server-Timing", "queue;dur=3, graph;dur=1.5")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_requests_are_numbered_and_answers_checked(port: int) -> None:
    job = LoadJob(
        host="127.0.0.1",
        port=port,
        path="/",
        body="is {number}",
        expect="is {number}",
        num_requests=8,
        rate=400.0,
        connections=2,
        first_number=1,
    )
    result = run(msgspec.to_builtins(job))
    assert result.errors == {"status 503": 1}
    assert len(result.samples) == 7
    assert {sample.own_seconds for sample in result.samples} == {0.0015}
    assert all(0 < sample.latency < result.seconds + 1 for sample in result.samples)
    wrong = run(msgspec.to_builtins(msgspec.structs.replace(job, expect="was {number}", num_requests=1)))
    assert wrong.errors == {"wrong content": 1}


def test_a_server_that_is_not_there_is_an_error(port: int) -> None:
    job = LoadJob(host="127.0.0.1", port=1, path="/", body="", num_requests=2, connections=1)
    assert run(msgspec.to_builtins(job)).errors == {"ConnectionRefusedError": 2}
