"""Events on their way to listeners in this process, after they are committed."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator

from omni.server.jobs import JobEvent
from omni.server.store import JobStore

MAX_PENDING = 512
"""Events that a slow listener may be behind; past it, it reads them from the store."""
PAGE = 500
LOOK_SECONDS = 5.0
"""How long a listener waits before it reads the store, whatever it has heard."""


class Listener:
    """Who waits for the events of one job; `last` is the number of the last one that it has."""

    def __init__(self, last: int) -> None:
        self.last = last
        self._pending: deque[JobEvent] = deque(maxlen=MAX_PENDING)
        self._news = asyncio.Event()

    def hear(self, events: Iterable[JobEvent]) -> None:
        """Take events; the oldest are lost when there are too many."""
        self._pending.extend(events)
        self._news.set()

    def look(self) -> None:
        """Have the store read."""
        self._news.set()

    async def next_events(self) -> list[JobEvent]:
        """The events that come next, or none when the store has to be read for them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await self._news.wait()
        self._news.clear()
        heard: list[JobEvent] = []
        missing = False
        for event in self._pending:
            number = self.last + len(heard) + 1
            if event.sequence == number:
                heard.append(event)
            missing = missing or event.sequence > number
        self._pending.clear()
        return [] if missing else heard


class Hub:
    """The listeners of this process, by job."""

    def __init__(self) -> None:
        self._listeners: dict[str, set[Listener]] = {}
        self.num_events = 0
        """Events published so far."""
        self.closed = False
        """Whether all listeners have been sent away."""

    @property
    def num_listeners(self) -> int:
        """Who listens now."""
        return sum(map(len, list(self._listeners.values())))  # a copy: other threads ask, too

    def publish(self, events: Iterable[JobEvent] | None) -> None:
        """Hand committed events of one job to its listeners."""
        listed = list(events or ())
        self.num_events += len(listed)
        if listed:
            for listener in self._listeners.get(listed[0].job_id, ()):
                listener.hear(listed)

    def wake(self, job_id: str) -> None:
        """Let a job's listeners look into the store: someone else has written, or the job is gone."""
        for listener in self._listeners.get(job_id, ()):
            listener.look()

    def close(self) -> None:
        """End all listening in good order: what is committed is told, then each stream ends."""
        self.closed = True
        for job_id in list(self._listeners):
            self.wake(job_id)

    def positions(self) -> dict[str, int]:
        """Job -> number of the last event that all of its listeners have."""
        return {job_id: min(each.last for each in group) for job_id, group in self._listeners.items()}

    @contextlib.contextmanager
    def listen(self, job_id: str, after: int) -> Iterator[Listener]:
        """Hear of a job's events inside the block."""
        listener = Listener(after)
        self._listeners.setdefault(job_id, set()).add(listener)
        try:
            yield listener
        finally:
            self._listeners[job_id].discard(listener)
            if not self._listeners[job_id]:
                del self._listeners[job_id]


async def follow(store: JobStore, hub: Hub, job_id: str, after: int) -> AsyncGenerator[JobEvent, None]:
    """A job's events from number `after` + 1 on: stored ones, then live ones, up to the final one.

    Live events are used where they are the next in number; otherwise the store is read. Ends without a final event when
    the job is gone, and when the hub is closed.
    """
    with hub.listen(job_id, after) as listener:
        while True:
            events = await store.events_after(job_id, listener.last, PAGE)
            if not events and await _is_over(store, job_id, listener.last):
                return
            is_full = len(events) == PAGE  # the store may have more
            while True:
                for event in events:
                    listener.last = event.sequence
                    yield event
                    if event.is_final:
                        return
                if hub.closed:
                    return
                if is_full or not (events := await listener.next_events()):
                    break


async def _is_over(store: JobStore, job_id: str, last: int) -> bool:
    """Whether nothing can come: no such job, or all its events are seen."""
    job = await store.get(job_id)
    return job is None or (job.is_final and not await store.events_after(job_id, last, 1))
