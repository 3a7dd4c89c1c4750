"""Writes a running job's events, in order and in groups, while it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from omni.server.changes import Draft, Fence
from omni.server.hub import Hub
from omni.server.jobs import StoreError
from omni.server.store import JobStore

DROPPED_WHEN_MANY = ("text", "preview", "progress")
MERGED = ("text", "progress")
MANY = 32
LINGER_SECONDS = 0.02
"""After a commit the next one waits so long for company: tokens come by the hundred a second."""
CANCEL_SECONDS = 3.0
log = logging.getLogger(__name__)


class Recorder:
    """Takes drafts from a run. What comes while a commit is under way goes into the next one.

    `lost` is called when this server may no longer write to the job, or cannot.
    """

    def __init__(self, store: JobStore, hub: Hub, fence: Fence, max_events: int, lost: Callable[[], None]) -> None:
        self._store = store
        self._hub = hub
        self.fence = fence
        self._max_events = max_events
        self._num_events = 0
        self._lost = lost
        self._pending: list[Draft] = []
        self._progress = 0.0
        self._flushing: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def hear(self, draft: Draft, progress: float) -> None:
        """Record an event; pieces of text that wait become one, and so does progress when much waits."""
        self._progress = progress
        if self._merge(draft) or (self._num_events >= self._max_events and draft.type in DROPPED_WHEN_MANY):
            return
        self._num_events += 1
        self._pending.append(draft)
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def settle(self) -> None:
        """Until all that was heard is committed."""
        self._hurry.set()
        while self._flushing is not None:
            await asyncio.wait([self._flushing])
        self._hurry.clear()

    def _merge(self, draft: Draft) -> bool:
        """Add to what waits of the same type and stage, if nothing but text and progress has come since."""
        if draft.type not in MERGED or (draft.type == "progress" and len(self._pending) < MANY):
            return False
        for place in range(len(self._pending) - 1, -1, -1):
            other = self._pending[place]
            if other.type not in MERGED or other.data["stage"] != draft.data["stage"]:
                return False
            if other.type == draft.type:
                joined = {"text": other.data["text"] + draft.data["text"]} if draft.type == "text" else {}
                self._pending[place] = Draft(draft.type, draft.data | joined)
                return True
        return False

    async def _flush(self) -> None:
        written = False
        try:
            while self._pending:
                drafts, self._pending = self._pending, []
                events = await self._store.append(self.fence, drafts, self._progress)
                if events is None:
                    return
                self._hub.publish(events)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        await self._hurry.wait()
            written = True
        except StoreError as error:
            log.warning("job %s: %s", self.fence.job_id, error)
        finally:
            self._flushing = None
            if not written:
                self._pending.clear()
                self._lost()


async def cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait for their ends, CANCEL_SECONDS at most; a fault of one is logged."""
    for task in tasks:
        task.cancel()
    if tasks:
        done, _ = await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.warning("a task ended with an error while the server stopped", exc_info=error)
