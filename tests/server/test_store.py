"""Jobs and events in SQLite and in a real Postgres: numbers without gaps, fences, claims, pages."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, insert, text

from omni.server.changes import Draft, Fence
from omni.server.jobs import Job, JobError, JobEvent, OutputFile, StoreError, new_job_id
from omni.server.store import JobStore
from omni.server.tables import METADATA, SERVERS

FILE = OutputFile(name="text", type="text", media_type="text/plain", blob="", bytes=3, text="abc")


def a_job(**fields: Any) -> Job:
    values = {
        "id": new_job_id(),
        "graph": "g",
        "created_at": time.time(),
        "inputs": {"prompt": "h\u00e9 \x00"},
        "seed": 7,
    }
    return Job(**(values | fields))


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[JobStore]:
    store = JobStore(store_url)
    for server in ("s1", "s2"):
        await store.write(lambda c, name=server: c.execute(insert(SERVERS).values(id=name, heartbeat_at=0.0)))
    yield store
    store.close()


async def running(store: JobStore, owner: str = "s1", **fields: Any) -> Fence:
    job = a_job(**fields)
    await store.insert(job)
    claimed = await store.claim(job.id, owner)
    assert claimed is not None
    return Fence(job.id, owner, claimed.attempt)


def numbered(events: list[JobEvent] | None) -> list[tuple[int, str]]:
    return [(event.sequence, event.type) for event in events or ()]


async def test_what_is_stored_comes_back(store: JobStore) -> None:
    job = a_job(
        kind="video", priority=-3, key="alice", meta={"size": "1x1"}, idempotency_key="i", error=JobError(cause="x")
    )
    events = await store.insert(job, digest="d", size=10)
    assert await store.get(job.id) == job
    assert numbered(events) == [(1, "queued")]
    assert await store.events_after(job.id, 0) == events
    assert await store.find("alice", "i") == (job, "d")
    assert await store.find("bob", "i") is None
    assert await store.get("job_" + "0" * 24) is None


async def test_an_idempotency_key_is_taken_once(store: JobStore) -> None:
    first, second, other, free = (a_job(key=key, idempotency_key="i") for key in ("a", "a", "b", "b"))
    outcomes = await asyncio.gather(*(store.insert(job) for job in (first, second, other)))
    assert [events is not None for events in outcomes] == [True, False, True]
    assert await store.get(second.id) is None
    assert await store.events_after(second.id, 0) == []
    for _ in range(2):  # no key, no conflict
        assert await store.insert(a_job(key=free.key)) is not None


async def test_events_have_numbers_without_gaps(store: JobStore) -> None:
    fence = await running(store)
    step = Draft("progress", {"step": 1})
    await asyncio.gather(*(store.append(fence, [step] * size, 0.5) for size in (1, 3, 2)))
    done = await store.finish(fence, "done", [Draft("output", {}), Draft("done", {})], outputs=[FILE])
    events = await store.events_after(fence.job_id, 0)
    assert [event.sequence for event in events] == list(range(1, 10))
    assert numbered(done) == [(8, "output"), (9, "done")]
    assert numbered(await store.events_after(fence.job_id, 7, limit=1)) == [(8, "output")]
    job = await store.get(fence.job_id)
    assert job is not None
    assert (job.state, job.progress, job.outputs) == ("done", 1.0, (FILE,))
    assert job.finished_at is not None


async def test_one_server_gets_a_job(store: JobStore) -> None:
    job = a_job()
    await store.insert(job)
    claims = await asyncio.gather(*(store.claim(job.id, owner) for owner in ("s1", "s2", "s1")))
    assert sum(claim is not None for claim in claims) == 1
    assert await store.claim("job_none", "s1") is None


async def test_a_server_that_is_not_registered_gets_none(store: JobStore) -> None:
    job = a_job()
    await store.insert(job)
    assert await store.claim(job.id, "buried") is None
    assert await store.claim(job.id, "s1") is not None


async def test_an_old_attempt_writes_nothing(store: JobStore) -> None:
    old = await running(store)
    assert numbered(await store.requeue(old, "test")) == [(2, "restarted")]
    again = await store.claim(old.job_id, "s2")
    assert again is not None
    assert again.attempt == 2
    assert await store.append(old, [Draft("progress", {})], 0.9) is None
    assert await store.finish(old, "done", [Draft("done", {})], outputs=[FILE]) is None
    assert await store.requeue(old, "test") is None
    for fence in (Fence(old.job_id, "s1", 2), Fence(old.job_id, "s2", 1)):
        assert await store.finish(fence, "done", [Draft("done", {})]) is None
    assert numbered(await store.finish(Fence(old.job_id, "s2", 2), "done", [Draft("done", {})])) == [(3, "done")]


async def test_a_job_is_aborted_where_it_is(store: JobStore) -> None:
    waiting = a_job()
    await store.insert(waiting)
    assert numbered(await store.abort_queued(waiting.id, "enough")) == [(2, "aborted")]
    assert await store.abort_queued(waiting.id, "again") is None
    assert not await store.ask_abort(waiting.id, "again")
    assert await store.claim(waiting.id, "s1") is None
    fence = await running(store)
    assert await store.abort_queued(fence.job_id, "enough") is None
    assert await store.ask_abort(fence.job_id, "enough")
    assert await store.asked_to_abort("s1") == {fence.job_id: "enough"}
    assert await store.asked_to_abort("s2") == {}
    assert await store.owned("s1") == [fence]


async def test_lists_have_pages(store: JobStore) -> None:
    jobs = [a_job(id=f"job_{n:024x}", created_at=100.0 + n // 2, kind="video" if n % 3 else "job") for n in range(9)]
    for job in jobs:
        await store.insert(job)
    ids = [job.id for job in jobs]
    for descending in (False, True):
        seen: list[str] = []
        while page := await store.list_jobs({}, limit=2, after=seen[-1] if seen else None, descending=descending):
            seen += [job.id for job in page]
        assert seen == (ids[::-1] if descending else ids)
    videos = await store.list_jobs({"kind": "video", "state": "queued"}, descending=False)
    assert [job.id for job in videos] == [job.id for job in jobs if job.kind == "video"]
    assert await store.list_jobs({}, after="job_none") == []


async def test_deleted_jobs_leave_nothing(store: JobStore) -> None:
    gone, kept = await running(store), await running(store)
    assert await store.delete([gone.job_id, "job_none"]) == 1
    assert await store.events_after(gone.job_id, 0) == []
    assert await store.append(gone, [Draft("progress", {})], 0.5) is None
    assert await store.known([gone.job_id, kept.job_id]) == {kept.job_id}
    assert await store.positions([gone.job_id, kept.job_id]) == {kept.job_id: 1}


async def test_jobs_that_wait_come_in_order(store: JobStore) -> None:
    for name, priority, at in (("c", 0, 3.0), ("a", 0, 1.0), ("b", 5, 2.0), ("x", 0, 0.0)):
        await store.insert(a_job(id=name, priority=priority, created_at=at, graph="x" if name == "x" else "g"))
    assert [waiting.id for waiting in await store.waiting(["g"])] == ["b", "a", "c"]
    assert await store.counts() == {("g", "queued"): 3, ("x", "queued"): 1}


async def test_two_processes_may_make_the_tables_at_once(store_url: str) -> None:
    stores = await asyncio.gather(*(asyncio.to_thread(JobStore, store_url) for _ in range(4)))
    job = a_job()
    await stores[0].insert(job)
    assert [await store.get(job.id) for store in stores] == [job] * 4
    for store in stores:
        store.close()


async def test_tables_of_another_version_are_refused(store: JobStore) -> None:
    await store.write(lambda connection: connection.execute(text("UPDATE omni_schema SET version = 99")))
    url = store.url.render_as_string(hide_password=False)
    with pytest.raises(StoreError, match="tables of version 99, this Omni needs 2; use a new database"):
        JobStore(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "jobs in memory would not survive"),
        ("mysql://a:secret@h/d", r"mysql://a:\*\*\*@h/d: jobs are stored in sqlite:///FILE or postgresql"),
        ("jobs.db", "the address of the job store is wrong"),
        ("postgresql+psycopg://a:secret@localhost:1/d", r"a:\*\*\*@localhost:1/d: the job store cannot be opened: "),
        ("sqlite:////proc/nowhere/jobs.db", "the job store cannot be opened: "),
    ],
)
def test_wrong_addresses_are_told_without_the_password(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        JobStore(url)
    assert "secret" not in str(caught.value)


async def test_lost_connections_are_made_again(postgres: str) -> None:
    store = JobStore(postgres)
    job = a_job()
    await store.insert(job)
    await store.get(job.id)
    others = "usename = 'omni' AND pid <> pg_backend_pid()"
    end = text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
    other = create_engine(postgres)
    with other.connect() as connection:
        assert len(connection.execute(end).all()) >= 2
    other.dispose()
    assert numbered(await store.abort_queued(job.id, "test")) == [(2, "aborted")]
    assert len(await store.events_after(job.id, 0)) == 2
    METADATA.drop_all(store.engine)
    store.close()


def test_the_database_is_in_wal_mode_and_private(tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/state/jobs.db")
    with store.engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 1  # NORMAL
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0
    store.close()


async def test_a_store_tells_whether_it_works(store: JobStore) -> None:
    assert await store.check(30.0) == ""
    store.writer.fault = "no thread"
    assert await store.check(30.0) == "no thread"
    assert await store.check(0.0) == "the database has not answered for 0 s"


async def test_a_read_has_a_deadline(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.server.store.READ_SECONDS", 0.01)
    go_on = threading.Event()
    with pytest.raises(StoreError, match=r"the job store has not answered for 0\.01 s"):
        await store.read(lambda connection: go_on.wait(60))
    go_on.set()


async def test_postgres_ends_what_takes_too_long(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.server.tables.STATEMENT_MILLISECONDS", 20)
    store = JobStore(postgres)
    with pytest.raises(StoreError, match="statement timeout"):
        await store.read(lambda connection: connection.execute(text("SELECT pg_sleep(60)")))
    store.close()
    METADATA.drop_all(engine := create_engine(postgres))
    engine.dispose()
