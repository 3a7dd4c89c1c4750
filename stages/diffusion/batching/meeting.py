"""Where requests meet: calls of a stage's denoisers from many threads, and one of the threads that works for all.

A thread that brings a call when nobody works becomes the host. It lets those that are about to come arrive, takes the
group of calls whose turn it is, runs it as one call, hands the answers out, and goes on until its own answer is there;
then the next waiting thread is host. So a request that is alone pays nothing, and no thread has to be kept.
Nobody waits for requests that are in their text encoder or VAE.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from stages.diffusion.batching.batch import BatchRunner
from stages.diffusion.batching.fairness import RoundRobin
from stages.diffusion.batching.join import Form

WAIT_SHARE = 0.1
"""Of the last call's time: it pays to wait so long, where that is longer than `wait_seconds`."""
LOOK_SECONDS = 0.04
"""How often a waiting request looks whether it was aborted."""


class Guest(Protocol):
    """A request that brings calls, one at a time."""

    priority: int
    """Calls of a higher one run first."""

    def raise_if_aborted(self) -> None:
        """Raise when the request was aborted."""


class Call:
    """One call of a denoiser, from its arrival to its answer."""

    def __init__(
        self,
        guest: Guest,
        denoiser: Hashable,
        form: Form | None,
        forward: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        num_pixels: float,
        lock: threading.Lock,
    ) -> None:
        self.guest = guest
        self.denoiser = denoiser
        self.form = form
        self.forward = forward
        self.num_pixels = num_pixels
        self.answer: Any = None
        self.error: BaseException | None = None
        self.is_done = False
        self.changed = threading.Condition(lock)
        self._arguments = arguments
        self.group: Hashable = (denoiser, id(self) if form is None else form.key)

    def call(self) -> Any:
        """Run it by itself."""
        args, kwargs = self._arguments
        return self.forward(*args, **kwargs)

    def end(self, error: BaseException | None = None) -> None:
        """The answer is there, or the error."""
        self.error = self.error or error
        self.is_done = True
        self.changed.notify()


class Meeting:
    """The meeting point of one stage's requests."""

    def __init__(self, max_requests: int, max_pixels: float, wait_seconds: float) -> None:
        """`max_requests`, `max_pixels`: in one call; `wait_seconds`: how long to wait for the next one to arrive."""
        self.batches = BatchRunner()
        self._max_requests, self._max_pixels, self._wait_seconds = max_requests, max_pixels, wait_seconds
        self._lock = threading.Lock()
        self._turns = RoundRobin()
        self._waiting: list[Call] = []
        self._coming: set[Guest] = set()
        """Requests between two denoise steps."""
        self._host: Call | None = None
        self._patience_ends = 0.0
        self._last_seconds = 0.0
        """What the last call took."""

    def run(
        self,
        guest: Guest,
        denoiser: Hashable,
        form: Form | None,
        forward: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        num_pixels: float,
    ) -> Any:
        """The answer of `forward`, called with `arguments` or, joined with others, as `form` says.

        Raises what the call raised, and what `guest` raises when it was aborted.
        """
        call = Call(guest, denoiser, form, forward, arguments, num_pixels, self._lock)
        with self._lock:
            self._coming.discard(guest)
            self._waiting.append(call)
            self._renew_patience()
            if self._host is not None:
                self._host.changed.notify()
            try:
                self._attend(call)
            finally:
                if call in self._waiting:
                    self._waiting.remove(call)
            if call.error is None:
                self._coming.add(guest)
        if call.error is not None:
            raise call.error
        return call.answer

    def leave(self, guest: Guest) -> None:
        """Nobody needs to wait for the guest: its loop of denoise steps has ended."""
        with self._lock:
            if guest in self._coming:
                self._coming.discard(guest)
                if self._host is not None:
                    self._host.changed.notify()

    def _attend(self, call: Call) -> None:
        """Wait for the answer, or work for all while nobody does."""
        while not call.is_done:
            call.guest.raise_if_aborted()
            if self._host is not None:
                call.changed.wait(LOOK_SECONDS)
                continue
            self._host = call
            try:
                self._serve(call)
            finally:
                self._host = None
                if self._waiting:
                    self._waiting[0].changed.notify()

    def _serve(self, host: Call) -> None:
        while not host.is_done:
            host.guest.raise_if_aborted()
            groups = self._groups()
            patience = self._patience_ends - time.monotonic()
            if self._coming and patience > 0 and not self._is_full(groups):
                host.changed.wait(min(patience, LOOK_SECONDS))
                continue
            if patience <= 0:
                self._coming.clear()  # whoever is late is not waited for again before its next call
            batch = self._choose(groups)
            self._waiting = [call for call in self._waiting if call not in batch]
            error: BaseException | None = RuntimeError("the thread that ran a joined call was stopped")
            self._lock.release()
            begin = time.monotonic()
            try:
                self.batches.run(batch[0].denoiser, batch)
                error = None
            finally:
                self._lock.acquire()
                for call in batch:
                    call.end(error)
                self._last_seconds = time.monotonic() - begin
                self._renew_patience()

    def _renew_patience(self) -> None:
        self._patience_ends = time.monotonic() + max(self._wait_seconds, WAIT_SHARE * self._last_seconds)

    def _groups(self) -> dict[Hashable, list[Call]]:
        """What could run as one call, of each kind that waits; only kinds in which one of the highest priority is."""
        groups: dict[Hashable, list[Call]] = {}
        top = max(call.guest.priority for call in self._waiting)
        for call in sorted(self._waiting, key=lambda call: -call.guest.priority):
            if call.guest.priority == top or call.group in groups:
                groups.setdefault(call.group, []).append(call)
        return {group: self._fitting(calls) for group, calls in groups.items()}

    def _most(self, call: Call) -> int:
        """How many calls like this one may be joined."""
        return min(self._max_requests, self.batches.limit(call.denoiser, call.form) or self._max_requests)

    def _fitting(self, calls: list[Call]) -> list[Call]:
        taken, pixels = calls[:1], calls[0].num_pixels
        for call in calls[1 : self._most(calls[0])]:
            pixels += call.num_pixels
            if pixels > self._max_pixels:
                break
            taken.append(call)
        return taken

    def _is_full(self, groups: dict[Hashable, list[Call]]) -> bool:
        """Whether a group is as large as it may become."""
        return any(
            len(taken) >= self._most(taken[0]) or len(taken) < sum(call.group == group for call in self._waiting)
            for group, taken in groups.items()
        )

    def _choose(self, groups: dict[Hashable, list[Call]]) -> list[Call]:
        costs = {group: max(1.0, sum(call.num_pixels for call in calls)) for group, calls in groups.items()}
        return groups[self._turns.choose(costs)]
