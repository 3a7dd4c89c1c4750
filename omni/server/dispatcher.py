"""Who may run now: the fair queue, with what is to be done when an entry's turn comes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from omni.server.fair_queue import Entry, FairQueue
from omni.server.jobs import Draining, QueueFull
from omni.server.service_settings import ServiceSettings

FIRST_GUESS_SECONDS = 1.0
"""What a run takes, before one has been seen."""
MAX_RETRY_SECONDS = 60.0
SMOOTHING = 0.2


class Dispatcher:
    """Slots of this process. `enter` calls back when it is the entry's turn; every turn ends with `leave`."""

    def __init__(self, graphs: Mapping[str, object], settings: ServiceSettings) -> None:
        self._settings = settings
        self._slots = {graph: settings.graph_max_running.get(graph, settings.max_running) for graph in graphs}
        self.queue = FairQueue(self._slots, settings.max_running_per_key)
        self._starts: dict[str, Callable[[], None]] = {}
        self._started_at: dict[str, tuple[str, float]] = {}
        self._run_seconds = dict.fromkeys(graphs, FIRST_GUESS_SECONDS)
        self._reserved: Counter[tuple[str, str]] = Counter()
        self.turns: set[Turn] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.draining = False

    # room ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reserve(self, graph: str, key: str) -> Iterator[None]:
        """Hold a place in the queue while an order is stored. Raises QueueFull or Draining."""
        self.check(graph, key)
        self._reserved[graph, key] += 1
        try:
            yield
        finally:
            self._reserved[graph, key] -= 1
            if not self._reserved[graph, key]:
                del self._reserved[graph, key]

    def check(self, graph: str, key: str) -> None:
        """Raise QueueFull or Draining when no further request of a graph and key can wait."""
        if self.draining:
            raise Draining("the server is stopping; send the request to another, or again later")
        coming = sum(number for (name, _), number in self._reserved.items() if name == graph)
        waiting = self.queue.waiting(graph) + coming
        free = max(self._slots[graph] - self.queue.running(graph), 0)
        if waiting >= self._settings.max_queued + free:
            raise QueueFull(f"graph '{graph}': {waiting} requests wait, and no more may", self.retry_after(graph))
        of_key = self.queue.waiting_of(graph, key) + self._reserved.get((graph, key), 0)
        most = self._settings.max_queued_per_key
        if most is not None and of_key >= most + free:
            text = f"graph '{graph}': {of_key} requests of this API key wait, and no more may"
            raise QueueFull(text, self.retry_after(graph))

    def retry_after(self, graph: str) -> float:
        """Seconds until a request that waits now will have left the queue, as far as one can tell; 1 to 60."""
        rounds = (self.queue.waiting(graph) + 1) / max(self._slots[graph], 1)
        return min(max(rounds * self._run_seconds[graph], 1.0), MAX_RETRY_SECONDS)

    # turns --------------------------------------------------------------------------------------------------------

    def enter(self, entry: Entry, start: Callable[[], None]) -> None:
        """Let an entry wait; `start` is called when it may run, maybe at once."""
        self.queue.add(entry)
        self._starts[entry.id] = start
        self._empty.clear()
        self._pump()

    def withdraw(self, entry_id: str) -> bool:
        """Take a waiting entry out. False when it does not wait."""
        if not self.queue.discard(entry_id):
            return False
        del self._starts[entry_id]
        self._note_empty()
        return True

    def leave(self, entry_id: str) -> None:
        """The entry's run has ended."""
        graph, started_at = self._started_at.pop(entry_id)
        seconds = time.monotonic() - started_at
        self._run_seconds[graph] += SMOOTHING * (seconds - self._run_seconds[graph])
        self.queue.release(entry_id)
        self._note_empty()
        self._pump()

    def join(self, entry: Entry) -> Turn:
        """Let an entry wait; see Turn."""
        return Turn(self, entry)

    def refuse_waiting(self) -> None:
        """Let every Turn that still waits raise Draining."""
        for turn in list(self.turns):
            turn.refuse()

    async def empty(self) -> None:
        """Until nothing waits and nothing runs."""
        await self._empty.wait()

    def _pump(self) -> None:
        while (entry := self.queue.take()) is not None:
            self._started_at[entry.id] = (entry.graph, time.monotonic())
            self._starts.pop(entry.id)()

    def _note_empty(self) -> None:
        if not self._starts and not self._started_at:
            self._empty.set()


class Turn:
    """A request's place in the queue, then its run. Ends with `leave`, whatever has happened."""

    def __init__(self, dispatcher: Dispatcher, entry: Entry) -> None:
        self._dispatcher = dispatcher
        self._entry = entry
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        dispatcher.turns.add(self)
        dispatcher.enter(entry, self._begin)

    async def wait(self) -> None:
        """Until it may run. Raises Draining when the server stops first."""
        await self._future

    def leave(self) -> None:
        """Give up the place, or end the run."""
        self._dispatcher.turns.discard(self)
        if not self._dispatcher.withdraw(self._entry.id):
            self._dispatcher.leave(self._entry.id)
        if self._future.done() and not self._future.cancelled():
            self._future.exception()  # refused, but nobody waited

    def refuse(self) -> None:
        """Let `wait` raise Draining, if it still waits."""
        if not self._future.done():
            self._future.set_exception(Draining("the server is stopping; send the request again"))

    def _begin(self) -> None:
        if not self._future.done():
            self._future.set_result(None)
