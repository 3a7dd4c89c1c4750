"""Which servers of a store live: heartbeats, and what a dead one leaves behind.

A server is dead when its heartbeat is older than the lease. Beside SQLite it also holds a lock on a file for as long as
its process lives, so that a restart after a kill finds out at once.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, and_, delete, false, func, insert, literal, or_, select, update
from sqlalchemy.sql.elements import ColumnElement

from omni.server.changes import Fence, end_aborted, poison, requeue
from omni.server.jobs import JobEvent
from omni.server.service_settings import ServiceSettings
from omni.server.store import JobStore
from omni.server.tables import JOBS, SERVERS

try:
    import fcntl
except ImportError:  # Windows: heartbeats alone tell
    fcntl = None  # type: ignore[assignment]


_LEFT_BEHIND = (JOBS.c.state == "running", JOBS.c.owner.not_in(select(SERVERS.c.id)))
"""Jobs whose server is buried."""


class Lease:
    """This process's life as a server. `on_lost` is called, in the store's thread, when others took it for dead."""

    def __init__(self, store: JobStore, settings: ServiceSettings, on_lost: Callable[[], None]) -> None:
        self._store = store
        self._settings = settings
        self._on_lost = on_lost
        self._postgres = store.engine.dialect.name == "postgresql"
        database = None if self._postgres else store.url.database
        self._locks = None if database is None or fcntl is None else Path(f"{database}.servers")
        self._lock: IO[bytes] | None = None
        self._patient_until = 0.0
        self.server_id = ""

    async def begin(self) -> None:
        """Register this server under a new name, and send heartbeats from now on."""
        server_id = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        if self._locks is not None:
            self._release_lock()
            self._locks.mkdir(exist_ok=True)
            self._lock = (self._locks / server_id).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        statement = insert(SERVERS).values(id=server_id, heartbeat_at=self._now())
        await self._store.write(lambda connection: connection.execute(statement))
        self.server_id = server_id
        self._store.writer.set_heartbeat(self._beat, self._settings.heartbeat_seconds)

    async def end(self) -> None:
        """Leave in good order."""
        self._store.writer.set_heartbeat(None, 0.0)
        statement = delete(SERVERS).where(SERVERS.c.id == self.server_id)
        await self._store.write(lambda connection: connection.execute(statement))
        self._release_lock()

    async def reap(self) -> list[list[JobEvent]]:
        """Put the jobs of dead servers back into the queue; returns the events, by job.

        A server whose own heartbeats failed does not judge others by theirs: after the database was away, it says that
        it lives, and gives them one lease to do the same.
        """
        writer = self._store.writer
        if time.monotonic() - writer.alive_at > 2 * self._settings.heartbeat_seconds:
            await self._store.write(self._beat)
            writer.alive_at = time.monotonic()
            self._patient_until = writer.alive_at + self._settings.lease_seconds
        servers, any_dead = await self._store.read(self._survey)
        killed = [server for server in servers if server != self.server_id and self._is_unlocked(server)]
        if not killed and not any_dead:
            return []
        events = await self._store.write(lambda connection: self._bury(connection, killed))
        for server in killed:
            if self._locks is not None:
                (self._locks / server).unlink(missing_ok=True)
        return events

    def _now(self) -> ColumnElement[Any]:
        """By the database's clock, where servers may be on several hosts."""
        return func.extract("epoch", func.clock_timestamp()) if self._postgres else literal(time.time())

    def _beat(self, connection: Connection) -> None:
        statement = update(SERVERS).where(SERVERS.c.id == self.server_id).values(heartbeat_at=self._now())
        if connection.execute(statement).rowcount == 0:
            self._on_lost()

    def _survey(self, connection: Connection) -> tuple[list[str], bool]:
        """The servers, and whether there is one to bury, or jobs of one that is buried."""
        servers = list(connection.execute(select(SERVERS.c.id)).scalars())
        late = connection.execute(select(SERVERS.c.id).where(self._is_late()).limit(1)).first()
        left = connection.execute(select(JOBS.c.id).where(*_LEFT_BEHIND).limit(1)).first()
        return servers, late is not None or left is not None

    def _is_late(self) -> ColumnElement[bool]:
        if time.monotonic() < self._patient_until:
            return false()
        expired = SERVERS.c.heartbeat_at < self._now() - self._settings.lease_seconds
        return and_(expired, SERVERS.c.id != self.server_id)

    def _bury(self, connection: Connection, killed: list[str]) -> list[list[JobEvent]]:
        connection.execute(delete(SERVERS).where(or_(self._is_late(), SERVERS.c.id.in_(killed))))
        statement = select(JOBS.c.id, JOBS.c.owner, JOBS.c.attempt, JOBS.c.deaths).where(*_LEFT_BEHIND)
        buried = [
            self._put_back(connection, Fence(job_id, owner, attempt), deaths, "its server died")
            for job_id, owner, attempt, deaths in connection.execute(statement).all()
        ]
        return [events for events in buried if events]

    def _put_back(self, connection: Connection, fence: Fence, deaths: int, reason: str) -> list[JobEvent] | None:
        if deaths + 1 >= self._settings.max_deaths:
            return end_aborted(connection, fence) or poison(connection, fence, deaths + 1)
        return requeue(connection, fence, reason, deaths=1)

    def _is_unlocked(self, server: str) -> bool:
        """Whether the process of a server is certainly gone."""
        if self._locks is None:
            return False
        with contextlib.suppress(OSError), (self._locks / server).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def _release_lock(self) -> None:
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
