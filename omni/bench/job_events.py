"""Jobs of a server under measurement: submits them, and hears their events as they come, with the time of each."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from omni.errors import OmniError

if TYPE_CHECKING:
    from omni.bench.server_process import Server

WAIT_SECONDS = 600.0
FINAL = ("done", "failed", "aborted")


class Heard(msgspec.Struct, frozen=True):
    """One event of a job."""

    at: float
    """`time.monotonic()` when it was here."""
    type: str
    data: dict[str, Any]


class WatchedJob:
    """A job and its events, read by a thread."""

    def __init__(self, server: Server, graph: str, inputs: dict[str, Any]) -> None:
        self._server = server
        self.id: str = server.ask("POST", f"/v1/graphs/{graph}/jobs", {"inputs": inputs})["id"]
        self._news = threading.Condition()
        self.heard: list[Heard] = []
        self._over = False
        self._connection = http.client.HTTPConnection(server.host, server.port, timeout=WAIT_SECONDS)
        self._connection.request("GET", f"/v1/jobs/{self.id}/events", headers=server.headers)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self, wanted: Callable[[Heard], bool], seconds: float = WAIT_SECONDS) -> Heard:
        """The first event that `wanted` accepts. Raises OmniError when the job ends without it, or after `seconds`."""
        deadline = time.monotonic() + seconds
        with self._news:
            while True:
                found = next((event for event in self.heard if wanted(event)), None)
                if found is not None:
                    return found
                ends = [event for event in self.heard if event.type in FINAL]
                if ends or self._over:
                    raise OmniError(f"{self.id} ended without the event that was waited for: {ends}")
                if not self._news.wait(deadline - time.monotonic()):
                    raise OmniError(f"{self.id}: no such event within {seconds:g} s")

    def wait_for(self, event_type: str) -> Heard:
        """The first event of a type."""
        return self.wait(lambda event: event.type == event_type)

    def wait_for_end(self) -> Heard:
        """The final event."""
        return self.wait(lambda event: event.type in FINAL)

    def delete(self) -> None:
        """Abort it."""
        self._server.ask("DELETE", f"/v1/jobs/{self.id}")

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(self._connection):
            answer = self._connection.getresponse()
            event_type, data = "", ""
            while line := answer.readline():
                field, _, value = line.decode().strip().partition(": ")
                if field == "event":
                    event_type = value
                elif field == "data":
                    data = value
                elif not field and event_type:
                    self._hear(Heard(time.monotonic(), event_type, json.loads(data or "{}")))
                    event_type, data = "", ""
        with self._news:
            self._over = True
            self._news.notify_all()

    def _hear(self, event: Heard) -> None:
        with self._news:
            self.heard.append(event)
            self._news.notify_all()
