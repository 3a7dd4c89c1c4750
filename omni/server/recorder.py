"""Writes a running job's events, in order and in groups, while it goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from omni.server.hub import Hub
from omni.server.jobs import StoreError
from omni.server.store import Draft, Fence, JobStore

DROPPED_WHEN_MANY = ("text", "preview", "progress")


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

    def hear(self, draft: Draft, progress: float) -> None:
        """Record an event; pieces of text that wait become one."""
        self._progress = progress
        last = self._pending[-1] if self._pending else None
        if last and last.type == draft.type == "text" and last.data["stage"] == draft.data["stage"]:
            self._pending[-1] = Draft("text", last.data | {"text": last.data["text"] + draft.data["text"]})
            return
        if self._num_events >= self._max_events and draft.type in DROPPED_WHEN_MANY:
            return
        self._num_events += 1
        self._pending.append(draft)
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def settle(self) -> None:
        """Until all that was heard is committed."""
        while self._flushing is not None:
            await asyncio.wait([self._flushing])

    async def _flush(self) -> None:
        try:
            while self._pending:
                drafts, self._pending = self._pending, []
                events = await self._store.append(self.fence, drafts, self._progress)
                if events is None:
                    self._pending.clear()
                    self._lost()
                    return
                self._hub.publish(events)
        except StoreError:
            self._pending.clear()
            self._lost()
        finally:
            self._flushing = None


async def cancel(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait for its end."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
