"""Events of a measured server's jobs: heard as they come, and waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from omni.bench.job_events import WatchedJob
from omni.bench.server_process import Server
from omni.errors import OmniError

EVENTS = (
    b': a comment\n\nid: 1\nevent: queued\ndata: {}\n\nid: 2\nevent: progress\ndata: {"stage": "draw", "step": 3}\n\n',
    b'id: 3\nevent: aborted\ndata: {"reason": "the caller"}\n\n',
)


@pytest.fixture
def gate() -> threading.Event:
    """Open: the second part of the events is sent."""
    return threading.Event()


@pytest.fixture
def server(gate: threading.Event) -> Iterator[Server]:
    """Takes a job, and tells of it in two parts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._begin()
            self.wfile.write(b'{"id": "job_1"}')

        def do_GET(self) -> None:
            assert self.path == "/v1/jobs/job_1/events"
            self._begin()
            self.wfile.write(EVENTS[0])
            gate.wait(30)
            self.wfile.write(EVENTS[1])

        def do_DELETE(self) -> None:
            gate.set()
            self.send_error(404)

        def _begin(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield Server("127.0.0.1", http.server_port)
        gate.set()
        http.shutdown()
        thread.join()


def test_events_are_there_when_they_come(server: Server, gate: threading.Event) -> None:
    job = WatchedJob(server, "draw", {"prompt": "a"})
    step = job.wait(lambda event: event.type == "progress")
    assert step.data == {"stage": "draw", "step": 3}
    assert not gate.is_set()
    gate.set()
    end = job.wait_for_end()
    assert (end.type, end.data) == ("aborted", {"reason": "the caller"})
    assert end.at >= step.at
    assert [event.type for event in job.heard] == ["queued", "progress", "aborted"]


def test_waiting_ends(server: Server, gate: threading.Event) -> None:
    job = WatchedJob(server, "draw", {"prompt": "a"})
    with pytest.raises(OmniError, match=r"job_1: no such event within 0\.01 s"):
        job.wait(lambda event: event.type == "preview", seconds=0.01)
    gate.set()
    with pytest.raises(OmniError, match="job_1 ended without the event that was waited for"):
        job.wait_for("preview")


def test_an_answer_that_is_no_success_is_an_error(server: Server) -> None:
    job = WatchedJob(server, "draw", {"prompt": "a"})
    with pytest.raises(OmniError, match="DELETE /v1/jobs/job_1: 404"):
        job.delete()
