"""The job store: jobs and their events in SQLite or Postgres, by SQLAlchemy Core.

All writes go through one thread (omni/server/writer.py). Whoever runs a job writes under a fence: its server's name and
the attempt, so that a server that was taken for dead changes nothing any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, and_, delete, exists, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Row
from sqlalchemy.exc import SQLAlchemyError

from omni.server.changes import DICT, Draft, Fence, append, as_text, final_values, requeue, to_job, to_row
from omni.server.jobs import Draining, Job, JobError, JobEvent, JobState, OutputFile, ServiceError, StoreError
from omni.server.tables import EVENTS, JOBS, SERVERS, STORES, connect, plain
from omni.server.writer import Work, Writer

T = TypeVar("T")
NUM_READERS = 4
READ_SECONDS = 30.0
QUEUE_LIMIT = 10_000
"""Waiting jobs that a server looks at."""

_JOB_COLUMNS = tuple(JOBS.c[name] for name in Job.__struct_fields__)


class Waiting(NamedTuple):
    """What the dispatcher needs to know of a queued job."""

    id: str
    graph: str
    key: str
    priority: int
    created_at: float
    deaths: int
    kind: str


class JobStore:
    """Jobs by URL: `sqlite:///FILE` (WAL mode) or `postgresql+psycopg://...`. Raises StoreError.

    Methods that write return when it is committed. Those that add events return them with their numbers, or None when
    the job is not in the state that they need.
    """

    def __init__(self, url: str, *, retry_seconds: float = 30.0) -> None:
        self.engine, self._reading = connect(url)
        self.url = self.engine.url
        self.writer = Writer(self.engine, retry_seconds)
        self._readers = ThreadPoolExecutor(NUM_READERS, "omni-store-read")
        self._closed = False
        with self._reading.connect() as connection:
            self.store_id: str = connection.execute(select(STORES.c.id)).scalar_one()
            """Names the database; the same for all servers that share it."""

    def close(self) -> None:
        """Write what waits, and let the database go. Blocks."""
        self._closed = True
        self.writer.close()
        self._readers.shutdown()
        self.engine.dispose()
        self._reading.dispose()

    async def write(self, work: Work[T]) -> T:
        """Do `work` in a transaction; see Writer.write. Raises StoreError, or Draining after `close`."""
        self._check_open()
        return await self.writer.write(work)

    async def read(self, work: Work[T]) -> T:
        """Do `work`, which only reads, outside of any transaction. Raises StoreError, or Draining after `close`."""
        self._check_open()

        def call() -> T:
            with self._reading.connect() as connection:
                return work(connection)

        try:
            async with asyncio.timeout(READ_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._readers, call)
        except TimeoutError as error:
            text = f"the job store has not answered for {READ_SECONDS:g} s; see that its database works"
            raise StoreError(text) from error
        except SQLAlchemyError as error:
            raise StoreError(f"the job store cannot be read: {plain(error)}") from error

    async def check(self, seconds: float) -> str:
        """Why the store cannot be used, or an empty string."""
        try:
            async with asyncio.timeout(seconds):
                await self.read(lambda connection: connection.execute(select(1)).scalar())
        except TimeoutError:
            return f"the database has not answered for {seconds:g} s"
        except ServiceError as error:
            return str(error)
        return self.writer.fault

    def _check_open(self) -> None:
        if self._closed:
            raise Draining("the server has stopped; ask another, or again later")

    # for clients --------------------------------------------------------------------------------------------------

    async def insert(
        self, job: Job, *, digest: str = "", size: int = 0, webhook: str | None = None
    ) -> list[JobEvent] | None:
        """Store a new job and its event `queued`. None when its idempotency key is taken."""
        values = to_row(job) | {"digest": digest, "bytes": size, "webhook": webhook}
        dialect = postgresql if self.engine.dialect.name == "postgresql" else sqlite
        statement = dialect.insert(JOBS).on_conflict_do_nothing().returning(JOBS.c.id)

        def work(connection: Connection) -> list[JobEvent] | None:
            if connection.execute(statement, values).first() is None:
                return None
            return append(connection, job.id, [Draft("queued", {})], ())

        return await self.write(work)

    async def find(self, key: str, idempotency_key: str) -> tuple[Job, str] | None:
        """The job of an idempotency key, with the digest of its order."""
        statement = select(*_JOB_COLUMNS, JOBS.c.digest).where(
            JOBS.c.key == key, JOBS.c.idempotency_key == idempotency_key
        )

        def work(connection: Connection) -> tuple[Job, str] | None:
            row = connection.execute(statement).first()
            return None if row is None else (to_job(row), row.digest)

        return await self.read(work)

    async def get(self, job_id: str) -> Job | None:
        """A job, or None."""
        statement = select(*_JOB_COLUMNS).where(JOBS.c.id == job_id)
        return await self.read(lambda connection: _job_or_none(connection.execute(statement).first()))

    async def list_jobs(
        self,
        filters: dict[str, Any],
        *,
        limit: int = 20,
        after: str | None = None,
        descending: bool = True,
    ) -> list[Job]:
        """Jobs by time of creation; `filters` are columns and their values, `after` is the last job already seen."""
        place = (JOBS.c.created_at, JOBS.c.id)
        statement = select(*_JOB_COLUMNS).where(*(JOBS.c[name] == value for name, value in filters.items()))
        statement = statement.order_by(*(column.desc() if descending else column for column in place)).limit(limit)

        def work(connection: Connection) -> list[Job]:
            final = statement
            if after is not None:
                last = connection.execute(select(*place).where(JOBS.c.id == after)).first()
                if last is None:
                    return []
                at, job_id = last
                beyond = JOBS.c.created_at < at if descending else JOBS.c.created_at > at
                tied = JOBS.c.id < job_id if descending else JOBS.c.id > job_id
                final = statement.where(or_(beyond, and_(JOBS.c.created_at == at, tied)))
            return [to_job(row) for row in connection.execute(final)]

        return await self.read(work)

    async def events_after(self, job_id: str, sequence: int, limit: int = 500) -> list[JobEvent]:
        """The next stored events of a job, in order."""
        statement = (
            select(EVENTS)
            .where(EVENTS.c.job_id == job_id, EVENTS.c.sequence > sequence)
            .order_by(EVENTS.c.sequence)
            .limit(limit)
        )

        def work(connection: Connection) -> list[JobEvent]:
            return [
                JobEvent(job_id=row.job_id, sequence=row.sequence, type=row.type, data=DICT.decode(row.data), at=row.at)
                for row in connection.execute(statement)
            ]

        return await self.read(work)

    async def positions(self, job_ids: Iterable[str]) -> dict[str, int]:
        """Job -> number of its last event; without jobs that are gone."""
        statement = select(JOBS.c.id, JOBS.c.last_sequence).where(JOBS.c.id.in_(list(job_ids)))
        rows = await self.read(lambda connection: connection.execute(statement).all())
        return {row.id: row.last_sequence for row in rows}

    async def abort_queued(self, job_id: str, reason: str) -> list[JobEvent] | None:
        """Abort a job that waits."""
        now = time.time()
        values = final_values("aborted", now)
        draft = Draft("aborted", {"reason": reason})
        return await self.write(
            lambda connection: append(connection, job_id, [draft], [JOBS.c.state == "queued"], values)
        )

    async def ask_abort(self, job_id: str, reason: str) -> bool:
        """Ask whoever runs a job to abort it, whatever becomes of that server. False when it does not run."""
        statement = update(JOBS).where(JOBS.c.id == job_id, JOBS.c.state == "running").values(abort_reason=reason)
        return await self.write(lambda connection: connection.execute(statement).rowcount == 1)

    async def delete(self, job_ids: Iterable[str]) -> int:
        """Remove jobs and their events, whatever their state; returns how many there were."""
        ids = list(job_ids)

        def work(connection: Connection) -> int:
            connection.execute(delete(EVENTS).where(EVENTS.c.job_id.in_(ids)))
            return connection.execute(delete(JOBS).where(JOBS.c.id.in_(ids))).rowcount

        return await self.write(work)

    async def known(self, job_ids: Iterable[str]) -> set[str]:
        """Which of these jobs there are."""
        statement = select(JOBS.c.id).where(JOBS.c.id.in_(list(job_ids)))
        return set(await self.read(lambda connection: connection.execute(statement).scalars().all()))

    # for the server that runs them --------------------------------------------------------------------------------

    async def waiting(self, graphs: Iterable[str]) -> list[Waiting]:
        """The queued jobs of these graphs, of all servers."""
        columns = tuple(JOBS.c[name] for name in Waiting._fields)
        statement = select(*columns).where(JOBS.c.state == "queued", JOBS.c.graph.in_(list(graphs)))
        statement = statement.order_by(JOBS.c.priority.desc(), JOBS.c.created_at).limit(QUEUE_LIMIT)
        rows = await self.read(lambda connection: connection.execute(statement).all())
        return [Waiting(*row) for row in rows]

    async def claim(self, job_id: str, owner: str) -> Job | None:
        """Take a queued job. None when another was quicker, it was aborted, or others took the owner for dead."""
        statement = (
            update(JOBS)
            .where(JOBS.c.id == job_id, JOBS.c.state == "queued", exists().where(SERVERS.c.id == owner))
            .values(state="running", owner=owner, started_at=time.time(), progress=0.0)
            .returning(*_JOB_COLUMNS)
        )
        return await self.write(lambda connection: _job_or_none(connection.execute(statement).first()))

    async def append(self, fence: Fence, drafts: Sequence[Draft], progress: float) -> list[JobEvent] | None:
        """Add events to a running job."""
        values = {"progress": progress}
        return await self.write(lambda connection: append(connection, fence.job_id, drafts, fence.conditions, values))

    async def finish(
        self,
        fence: Fence,
        state: JobState,
        drafts: Sequence[Draft],
        *,
        outputs: Sequence[OutputFile] = (),
        error: JobError | None = None,
    ) -> list[JobEvent] | None:
        """End a running job; the last draft is the final event."""
        values = final_values(state, time.time()) | {
            "outputs": as_text(outputs),
            "error": None if error is None else as_text(error),
        }
        if state == "done":
            values["progress"] = 1.0
        size = sum(output.bytes for output in outputs)
        return await self.write(
            lambda connection: append(connection, fence.job_id, drafts, fence.conditions, values, size)
        )

    async def requeue(self, fence: Fence, reason: str) -> list[JobEvent] | None:
        """Give a running job back to the queue, for no fault of its own; one that shall be aborted ends so."""
        return await self.write(lambda connection: requeue(connection, fence, reason, deaths=0))

    async def asked_to_abort(self, owner: str) -> dict[str, str]:
        """Running jobs of a server that someone wants aborted -> the reason."""
        statement = select(JOBS.c.id, JOBS.c.abort_reason).where(
            JOBS.c.state == "running", JOBS.c.owner == owner, JOBS.c.abort_reason.is_not(None)
        )
        rows = await self.read(lambda connection: connection.execute(statement).all())
        return {row.id: row.abort_reason for row in rows}

    async def owned(self, owner: str) -> list[Fence]:
        """The running jobs of a server."""
        statement = select(JOBS.c.id, JOBS.c.owner, JOBS.c.attempt).where(
            JOBS.c.state == "running", JOBS.c.owner == owner
        )
        rows = await self.read(lambda connection: connection.execute(statement).all())
        return [Fence(*row) for row in rows]

    async def counts(self) -> dict[tuple[str, str], int]:
        """(graph, state) -> number of jobs."""
        statement = select(JOBS.c.graph, JOBS.c.state, func.count()).group_by(JOBS.c.graph, JOBS.c.state)
        rows = await self.read(lambda connection: connection.execute(statement).all())
        return {(row[0], row[1]): row[2] for row in rows}


def _job_or_none(row: Row[Any] | None) -> Job | None:
    return None if row is None else to_job(row)
