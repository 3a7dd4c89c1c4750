"""Every limit of the job service, with its default."""

from __future__ import annotations

import msgspec

from omni.errors import UsageError

POSITIVE = (
    "max_running",
    "graph_max_running",
    "max_running_per_key",
    "max_queued_per_key",
    "keep_seconds",
    "sweep_seconds",
    "poll_seconds",
    "heartbeat_seconds",
    "lease_seconds",
    "max_deaths",
    "max_events",
    "store_retry_seconds",
    "webhook_tries",
    "webhook_seconds",
)


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests run and wait, how long jobs are kept, and how servers watch over each other."""

    max_running: int = 4
    """Requests of one graph that run at once, in this process."""
    graph_max_running: dict[str, int] = {}
    """Graph -> the same, where it differs."""
    max_queued: int = 256
    """Requests of one graph that may wait; one more is refused with QueueFull."""
    max_running_per_key: int | None = None
    """Requests of one API key that run at once in this process, over all graphs; None: no cap."""
    max_queued_per_key: int | None = None
    """Requests of one API key and one graph that may wait; None: no cap of its own."""
    keep_seconds: float = 7 * 24 * 3600.0
    """How long a finished job is kept."""
    keep_bytes: int = 20 * 1024**3
    """Size of all finished jobs' files and events above which the oldest go."""
    sweep_seconds: float = 60.0
    """How often retention looks."""
    poll_seconds: float = 0.25
    """How often the store is asked for what other servers wrote: new jobs, aborts, events."""
    heartbeat_seconds: float = 2.0
    """How often this server says that it lives."""
    lease_seconds: float = 15.0
    """A server that has not said so for this long is dead, and its jobs go back to the queue."""
    max_deaths: int = 3
    """A job during which so many servers died fails as poisoned."""
    max_events: int = 100_000
    """Events of one job; past it, further texts, previews and progress are dropped."""
    store_retry_seconds: float = 30.0
    """How long a write waits for a database that does not answer, before it fails."""
    webhook_secret: str = ""
    """Signs webhooks, see omni/server/webhook.py; empty: unsigned."""
    webhook_tries: int = 6
    """Deliveries of one webhook before it is given up."""
    webhook_seconds: float = 10.0
    """How long one delivery may take."""

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            for number in value.values() if isinstance(value, dict) else [value]:
                if number is not None and number <= 0:
                    raise UsageError(f"{name} must be above 0, not {number}")
        if self.max_queued < 0 or self.keep_bytes < 0:
            raise UsageError("max_queued and keep_bytes cannot be below 0")
        if self.lease_seconds < 2 * self.heartbeat_seconds:
            raise UsageError("lease_seconds must be at least twice heartbeat_seconds, else live servers count as dead")
