"""One request's way through a graph, as a pure state machine: event in, actions out.

No asyncio, no Ray, no I/O: both runners feed it and carry out what it answers, so they cannot drift apart. It keeps
three promises, whatever the order of events: no stage runs before its inputs are there, every payload is freed once,
when its last reader is done, and the request ends in exactly one `Finish`, after which nothing of it is running.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from omni.errors import StageError
from omni.graph import Graph

# Actions: what the runner must do next --------------------------------------------------------------------------


class RunStage(msgspec.Struct, frozen=True):
    """Start `stage`; the payloads it reads exist until it ends."""

    stage: str


class AbortStage(msgspec.Struct, frozen=True):
    """Make the running `stage` stop; its end must still be reported."""

    stage: str


class FreePayload(msgspec.Struct, frozen=True):
    """Drop the payload of `stage`: nobody will read it any more."""

    stage: str


class Finish(msgspec.Struct, frozen=True):
    """The request is over. On `done` the payloads of the output stages are still there and are to be read now;
    the FreePayload actions for them follow in the same answer."""

    outcome: Literal["done", "failed", "aborted"]
    error: StageError | None = None
    reason: str = ""


Action = RunStage | AbortStage | FreePayload | Finish


class Flow:
    """The state of one request. Call `start` once, then report what happens; calls answer with actions in order."""

    def __init__(self, graph: Graph) -> None:
        self._upstream = {stage: frozenset(graph.upstream(stage)) for stage in graph.order}
        self._order = graph.order
        self._outputs = frozenset(graph.output_stages())
        self._readers_left = {stage: set(graph.readers(stage)) for stage in graph.order}
        self._running: set[str] = set()
        self._done: set[str] = set()
        self._held: set[str] = set()
        self._ending: Finish | None = None
        self._started = False
        self.finished = False

    def start(self) -> list[Action]:
        """Begin: the stages that need no other stage."""
        if self._started or self.finished:
            return []
        self._started = True
        return self._advance()

    def stage_done(self, stage: str) -> list[Action]:
        """`stage` ended well and its payload exists."""
        self._end_run(stage)
        self._done.add(stage)
        self._held.add(stage)
        actions: list[Action] = []
        for source in self._order:
            self._readers_left[source].discard(stage)
        if self._ending is None:
            actions += self._free_unread()
        return actions + self._advance()

    def stage_failed(self, stage: str, error: StageError) -> list[Action]:
        """`stage` ended with an error and left no payload."""
        self._end_run(stage)
        return self._end(Finish("failed", error=error))

    def stage_aborted(self, stage: str) -> list[Action]:
        """`stage` stopped because of an AbortStage and left no payload."""
        self._end_run(stage)
        return self._end(Finish("aborted", reason="a stage was aborted"))

    def abort(self, reason: str = "aborted by the caller") -> list[Action]:
        """The caller has lost interest. Ignored when the request is already ending."""
        if self.finished or self._ending is not None:
            return []
        return self._end(Finish("aborted", reason=reason))

    def _end_run(self, stage: str) -> None:
        if stage not in self._running:
            raise AssertionError(f"stage '{stage}' reported an end but was not running")
        self._running.discard(stage)

    def _end(self, finish: Finish) -> list[Action]:
        actions: list[Action] = []
        if self._ending is None:
            self._ending = finish
            actions += [AbortStage(stage) for stage in self._order if stage in self._running]
        return actions + self._advance()

    def _advance(self) -> list[Action]:
        if self._ending is not None:
            return self._finish(self._ending) if not self._running else []
        if len(self._done) == len(self._order):
            return self._finish(Finish("done"))
        ready = [s for s in self._order if s not in self._running | self._done and self._upstream[s] <= self._done]
        self._running.update(ready)
        return [RunStage(stage) for stage in ready]

    def _free_unread(self) -> list[Action]:
        unread = [s for s in self._order if s in self._held - self._outputs and not self._readers_left[s]]
        self._held.difference_update(unread)
        return [FreePayload(stage) for stage in unread]

    def _finish(self, finish: Finish) -> list[Action]:
        self.finished = True
        freed = [FreePayload(stage) for stage in self._order if stage in self._held]
        self._held.clear()
        return [finish, *freed]
