"""What metrics and tracing hear of the service."""

from __future__ import annotations

from omni.messages import Event


class Observer:
    """Overrides what it wants to hear; all are called on the event loop, and must be quick and not raise.

    `request_id` is the job's id for a stored job, and the request's own for `Service.stream`. `kind` is the API that
    made it.
    """

    def accepted(self, request_id: str, graph: str, kind: str) -> None:
        """It waits for its turn now."""

    def refused(self, graph: str, kind: str, reason: str) -> None:
        """An order was not taken: `reason` is the name of the error's class."""

    def started(self, request_id: str, graph: str, kind: str, waited_seconds: float) -> None:
        """Its turn has come."""

    def event(self, request_id: str, graph: str, event: Event) -> None:
        """The runner reports; the last event is final."""

    def finished(self, request_id: str, graph: str, kind: str, outcome: str, seconds: float) -> None:
        """It is over since `started`: done, failed, aborted, restarted (back in the queue) or lost (to another)."""


class Observers(Observer):
    """Tells several."""

    def __init__(self) -> None:
        self.members: list[Observer] = []

    def accepted(self, request_id: str, graph: str, kind: str) -> None:
        for member in self.members:
            member.accepted(request_id, graph, kind)

    def refused(self, graph: str, kind: str, reason: str) -> None:
        for member in self.members:
            member.refused(graph, kind, reason)

    def started(self, request_id: str, graph: str, kind: str, waited_seconds: float) -> None:
        for member in self.members:
            member.started(request_id, graph, kind, waited_seconds)

    def event(self, request_id: str, graph: str, event: Event) -> None:
        for member in self.members:
            member.event(request_id, graph, event)

    def finished(self, request_id: str, graph: str, kind: str, outcome: str, seconds: float) -> None:
        for member in self.members:
            member.finished(request_id, graph, kind, outcome, seconds)
