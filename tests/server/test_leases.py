"""Which servers live: heartbeats, locks, and what is done with a dead one's jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Delete, delete, insert, select, update

from omni.server.changes import Fence
from omni.server.jobs import Job, JobOrder, new_job_id
from omni.server.leases import Lease
from omni.server.service_settings import ServiceSettings
from omni.server.store import JobStore
from omni.server.tables import JOBS, SERVERS
from tests.server.conftest import WAIT_SECONDS, MakeService

SETTINGS = ServiceSettings(heartbeat_seconds=1.0, lease_seconds=600.0, max_deaths=2)


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[JobStore]:
    store = JobStore(store_url)
    yield store
    store.close()


async def new_lease(store: JobStore) -> Lease:
    lease = Lease(store, SETTINGS, lambda: None)
    await lease.begin()
    return lease


async def running(store: JobStore, owner: str) -> Fence:
    job = Job(id=new_job_id(), graph="g", created_at=1.0)
    await store.insert(job)
    assert await store.claim(job.id, owner) is not None
    return Fence(job.id, owner, 1)


def gone(server_id: str) -> Delete:
    """As if others had buried it."""
    return delete(SERVERS).where(SERVERS.c.id == server_id)


async def test_those_who_live_are_left_alone(store: JobStore) -> None:
    one, other = await new_lease(store), await new_lease(store)
    fence = await running(store, other.server_id)
    assert await one.reap() == []
    assert await store.owned(other.server_id) == [fence]
    await one.end()
    assert await other.reap() == []
    await other.end()


async def test_an_old_heartbeat_is_death(store: JobStore) -> None:
    one, other = await new_lease(store), await new_lease(store)
    fence = await running(store, other.server_id)
    past = update(SERVERS).where(SERVERS.c.id == other.server_id).values(heartbeat_at=SERVERS.c.heartbeat_at - 601)
    await store.write(lambda connection: connection.execute(past))
    (events,) = await one.reap()
    assert [(event.sequence, event.type, event.data) for event in events] == [
        (2, "restarted", {"attempt": 2, "reason": "its server died"})
    ]
    assert await one.reap() == []
    assert await store.claim(fence.job_id, other.server_id) is None  # the dead claim nothing
    again = await store.claim(fence.job_id, one.server_id)
    assert again is not None
    assert again.attempt == 2
    for lease in (one, other):
        await lease.end()


async def test_who_was_silent_itself_buries_nobody(store: JobStore) -> None:
    """After the database was away all heartbeats are old: the first to come back waits for the others."""
    one, other = await new_lease(store), await new_lease(store)
    await running(store, other.server_id)
    past = update(SERVERS).values(heartbeat_at=SERVERS.c.heartbeat_at - 601)
    await store.write(lambda connection: connection.execute(past))
    store.writer.alive_at -= 601
    assert await one.reap() == []
    heartbeats = select(SERVERS.c.id).order_by(SERVERS.c.heartbeat_at.desc())
    assert await store.read(lambda connection: connection.execute(heartbeats).scalars().first()) == one.server_id
    assert await one.reap() == []
    one._patient_until = 0.0  # a lease later
    assert len(await one.reap()) == 1
    for lease in (one, other):
        await lease.end()


async def test_the_last_death_is_the_jobs_end(store: JobStore) -> None:
    one = await new_lease(store)
    fence = await running(store, one.server_id)
    for attempt in (1, 2):
        other = await new_lease(store)
        if attempt == 1:
            await store.requeue(fence, "no death")
        assert await store.claim(fence.job_id, other.server_id) is not None
        await store.write(lambda connection, name=other.server_id: connection.execute(gone(name)))
        ((event, *_),) = await one.reap()
        assert event.type == ("restarted" if attempt == 1 else "failed")
        await other.end()
    job = await store.get(fence.job_id)
    assert job is not None
    assert job.error is not None
    assert (job.state, job.error.code) == ("failed", "poisoned")
    await one.end()


async def test_an_abort_outlives_the_server(store: JobStore) -> None:
    """Who aborted was told so: the job ends, and neither runs again nor is poisoned."""
    one, other = await new_lease(store), await new_lease(store)
    fences = [await running(store, other.server_id) for _ in range(3)]
    for fence in fences:
        assert await store.ask_abort(fence.job_id, "enough")
    at_last = update(JOBS).where(JOBS.c.id == fences[1].job_id).values(deaths=1)
    await store.write(lambda connection: connection.execute(at_last))
    events = await store.requeue(fences[2], "test")
    assert events is not None
    await store.write(lambda connection: connection.execute(gone(other.server_id)))
    for found in (*await one.reap(), events):
        assert [(event.type, event.data) for event in found] == [("aborted", {"reason": "enough"})]
    for fence in fences:
        job = await store.get(fence.job_id)
        assert job is not None
        assert (job.state, job.error) == ("aborted", None)
        assert await store.claim(fence.job_id, one.server_id) is None
    for lease in (one, other):
        await lease.end()


async def test_a_process_that_is_gone_is_known_at_once(tmp_path: Path) -> None:
    """Long before its lease ends, by the lock that the system has taken from it."""
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    one, other = await new_lease(store), await new_lease(store)
    await running(store, other.server_id)
    assert await one.reap() == []
    assert other._lock is not None
    other._lock.close()  # as at the end of a process
    assert len(await one.reap()) == 1
    servers = await store.read(lambda connection: connection.execute(select(SERVERS.c.id)).scalars().all())
    assert servers == [one.server_id]
    assert [path.name for path in (tmp_path / "jobs.db.servers").iterdir()] == [one.server_id]
    await one.end()
    store.close()


async def test_a_server_that_was_taken_for_dead_begins_anew(make_service: MakeService) -> None:
    service = make_service({"g": "hold"})
    await service.start()
    job = await service.submit(JobOrder(graph="g", inputs={"prompt": "hold"}))
    seen = []
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in service.events(job.id):
            seen.append(event)
            if event.type == "stage_started" and len(seen) == 2:
                await service.store.write(lambda connection: connection.execute(delete(SERVERS)))
            elif event.type == "stage_started":
                assert await service.abort(job.id)
    assert [event.type for event in seen] == ["queued", "stage_started", "restarted", "stage_started", "aborted"]
    assert [event.sequence for event in seen] == [1, 2, 3, 4, 5]
    assert service.running("g") == 0


async def test_a_job_that_runs_nowhere_goes_back(make_service: MakeService) -> None:
    """The store says that it runs here, and it does not: its end could not be written."""
    service = make_service({"g": "echo"})
    await service.start()
    servers = await service.store.read(lambda connection: connection.execute(select(SERVERS.c.id)).scalars().all())
    job = Job(id=new_job_id(), graph="g", created_at=1.0, inputs={"prompt": "x"}, state="running")
    values = {"owner": servers[0], "state": "running", "inputs": '{"prompt": "x"}', "meta": "{}", "outputs": "[]"}
    plain = {"id": job.id, "graph": "g", "kind": "job", "created_at": 1.0, "seed": 0, "priority": 0, "key": ""}
    await service.store.write(lambda connection: connection.execute(insert(JOBS).values(**plain, **values)))
    async with asyncio.timeout(WAIT_SECONDS):
        events = [event async for event in service.events(job.id)]
    assert events[0].data == {"attempt": 2, "reason": "its end could not be stored"}
    assert events[-1].type == "done"
    deaths = select(JOBS.c.deaths).where(JOBS.c.id == job.id)
    assert await service.store.read(lambda connection: connection.execute(deaths).scalar()) == 0
