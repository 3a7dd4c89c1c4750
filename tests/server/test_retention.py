"""What goes: old jobs, the oldest of too many bytes, and files without a job."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import update

from omni.server.files import FileStore
from omni.server.jobs import Job, new_job_id
from omni.server.retention import Retention
from omni.server.service_settings import ServiceSettings
from omni.server.store import JobStore
from omni.server.tables import JOBS


class Kept:
    """A store with finished jobs of given ages and sizes."""

    def __init__(self, folder: Path) -> None:
        self.store = JobStore(f"sqlite:///{folder}/jobs.db")
        self.files = FileStore(folder / "files")

    async def add(self, age: float, size: int = 0, state: str = "done") -> str:
        job = Job(id=new_job_id(), graph="g", created_at=1.0)
        await self.store.insert(job)
        finished_at = None if state in ("queued", "running") else time.time() - age
        values = {"state": state, "finished_at": finished_at, "bytes": size}
        await self.store.write(lambda c: c.execute(update(JOBS).where(JOBS.c.id == job.id).values(**values)))
        self.add_file(job.id)
        return job.id

    def add_file(self, job_id: str) -> None:
        with self.files.writing(f"{job_id}/out-1.txt") as path:
            path.write_text("x")

    async def sweep(self, **limits: float) -> set[str]:
        await Retention(self.store, self.files, ServiceSettings(**limits)).sweep()
        left = {job.id for job in await self.store.list_jobs({}, limit=1000)}
        assert set(self.files.folders()) == left
        return left


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    kept = Kept(tmp_path)
    yield kept
    kept.store.close()
    kept.files.close()


async def test_old_jobs_go(kept: Kept) -> None:
    for _ in range(120):  # more than one batch
        await kept.add(age=100)
    young = await kept.add(age=10)
    open_jobs = {await kept.add(age=100, state=state) for state in ("queued", "running")}
    assert await kept.sweep(keep_seconds=50) == {young, *open_jobs}
    assert await kept.store.events_after(young, 0) != []


async def test_the_oldest_go_when_there_is_too_much(kept: Kept) -> None:
    ids = [await kept.add(age=age, size=100) for age in (50, 40, 30, 20)]
    large = await kept.add(age=60, size=10_000, state="running")
    assert await kept.sweep(keep_bytes=250) == {*ids[2:], large}
    assert await kept.sweep(keep_bytes=0) == {large}


async def test_files_without_a_job_go_when_they_are_old(kept: Kept) -> None:
    here = await kept.add(age=1)
    old, young = f"job_{int(time.time()) - 7200:08x}{'0' * 16}", new_job_id()
    for job_id in (old, young, "not_ours"):
        kept.add_file(job_id)
    retention = Retention(kept.store, kept.files, ServiceSettings())
    await retention.sweep()
    assert set(kept.files.folders()) == {here, young, "not_ours"}
