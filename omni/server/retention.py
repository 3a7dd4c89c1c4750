"""Finished jobs go when they are old, and the oldest when all take too much room; so do files without a job."""

from __future__ import annotations

import time

from sqlalchemy import Connection, func, select

from omni.server.files import FileStore
from omni.server.jobs import JOB_ID, age_of
from omni.server.service_settings import ServiceSettings
from omni.server.store import JobStore
from omni.server.tables import JOBS

BATCH = 100
"""Jobs that are removed at once."""
ORPHAN_SECONDS = 3600.0
"""A job's files are written before the job: files without one are only removed when they are this old."""
LOOK_FOR_ORPHANS_SECONDS = 24 * 3600.0


class Retention:
    """Removes what is not kept any longer."""

    def __init__(self, store: JobStore, files: FileStore, settings: ServiceSettings) -> None:
        self._store = store
        self._files = files
        self._settings = settings
        self._looked_at: float | None = None

    async def sweep(self) -> None:
        """One round. Raises StoreError."""
        while await self._remove(await self._store.read(self._expired)):
            pass
        while await self._remove(await self._store.read(self._too_many)):
            pass
        now = time.monotonic()
        if self._looked_at is None or now - self._looked_at > LOOK_FOR_ORPHANS_SECONDS:
            self._looked_at = now
            await self.remove_orphans()

    async def remove_orphans(self) -> None:
        """Remove the files of jobs that are gone. Raises StoreError."""
        folders = await self._files.call(self._files.folders)
        old = [name for name in folders if JOB_ID.fullmatch(name) and age_of(name) > ORPHAN_SECONDS]
        for start in range(0, len(old), BATCH):
            batch = old[start : start + BATCH]
            known = await self._store.known(batch)
            for job_id in set(batch) - known:
                await self._files.call(self._files.remove_folder, job_id)

    async def _remove(self, job_ids: list[str]) -> bool:
        """Remove jobs, their files first: what is left after a crash is found again."""
        for job_id in job_ids:
            await self._files.call(self._files.remove_folder, job_id)
        if job_ids:
            await self._store.delete(job_ids)
        return bool(job_ids)

    def _expired(self, connection: Connection) -> list[str]:
        statement = select(JOBS.c.id).where(JOBS.c.finished_at < time.time() - self._settings.keep_seconds)
        return list(connection.execute(statement.limit(BATCH)).scalars())

    def _too_many(self, connection: Connection) -> list[str]:
        finished = JOBS.c.finished_at.is_not(None)
        total = connection.execute(select(func.sum(JOBS.c.bytes)).where(finished)).scalar() or 0
        surplus = int(total) - self._settings.keep_bytes
        chosen = []
        if surplus > 0:
            statement = select(JOBS.c.id, JOBS.c.bytes).where(finished).order_by(JOBS.c.finished_at).limit(BATCH)
            for job_id, size in connection.execute(statement):
                if surplus <= 0:
                    break
                chosen.append(job_id)
                surplus -= size
        return chosen
