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


class Listener:
    """Who waits for the events of one job."""

    def __init__(self) -> None:
        self.pending: deque[JobEvent] = deque(maxlen=MAX_PENDING)
        self._news = asyncio.Event()

    def hear(self, events: Iterable[JobEvent]) -> None:
        """Take events; the oldest are lost when there are too many."""
        self.pending.extend(events)
        self._news.set()

    async def wait(self, seconds: float) -> None:
        """Until there are events, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()


class Hub:
    """The listeners of this process, by job."""

    def __init__(self) -> None:
        self._listeners: dict[str, set[Listener]] = {}
        self.num_events = 0
        """Events published so far."""

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

    @contextlib.contextmanager
    def listen(self, job_id: str) -> Iterator[Listener]:
        """Hear of a job's events inside the block."""
        listener = Listener()
        self._listeners.setdefault(job_id, set()).add(listener)
        try:
            yield listener
        finally:
            self._listeners[job_id].discard(listener)
            if not self._listeners[job_id]:
                del self._listeners[job_id]


async def follow(
    store: JobStore, hub: Hub, job_id: str, after: int, poll_seconds: float
) -> AsyncGenerator[JobEvent, None]:
    """A job's events from number `after` + 1 on: stored ones, then live ones, up to the final one.

    Live events are used where they are the next in number; otherwise, and every `poll_seconds`, the store is read: it
    has what other servers wrote. Ends without a final event when the job is gone.
    """
    last = after
    with hub.listen(job_id) as listener:
        while True:
            events = await store.events_after(job_id, last, PAGE)
            for event in events:
                yield event
                last = event.sequence
                if event.is_final:
                    return
            if len(events) == PAGE:
                continue
            if not events and await _is_over(store, job_id, last):
                return
            heard = True
            while heard:
                if not listener.pending:
                    await listener.wait(poll_seconds)
                heard = False
                while listener.pending:
                    event = listener.pending.popleft()
                    if event.sequence == last + 1:
                        heard = True
                        yield event
                        last = event.sequence
                        if event.is_final:
                            return
                    elif event.sequence > last:
                        heard = False  # some were lost; the store has them
                        listener.pending.clear()


async def _is_over(store: JobStore, job_id: str, last: int) -> bool:
    """Whether nothing can come: no such job, or all its events are seen."""
    job = await store.get(job_id)
    return job is None or (job.is_final and not await store.events_after(job_id, last, 1))
