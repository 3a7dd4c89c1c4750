"""Listeners: stored events, then live ones, whatever is lost on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert

from omni.server.changes import Draft, Fence
from omni.server.hub import MAX_PENDING, PAGE, Hub, Listener, follow
from omni.server.jobs import Job, JobEvent, new_job_id
from omni.server.store import JobStore
from omni.server.tables import SERVERS

WAIT_SECONDS = 30
STEP = Draft("progress", {"stage": "a"})


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[JobStore]:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    await store.write(lambda connection: connection.execute(insert(SERVERS).values(id="s", heartbeat_at=0.0)))
    yield store
    store.close()


async def running(store: JobStore) -> Fence:
    job = Job(id=new_job_id(), graph="g", created_at=time.time())
    await store.insert(job)
    assert await store.claim(job.id, "s") is not None
    return Fence(job.id, "s", 1)


async def collect(store: JobStore, hub: Hub, fence: Fence, seen: list[int], after: int = 0) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in follow(store, hub, fence.job_id, after):
            seen.append(event.sequence)


async def until(seen: list[int], last: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not seen or seen[-1] < last:
            await asyncio.sleep(0)


@pytest.mark.parametrize("every", [1, 3, 50])
async def test_no_event_is_missed_or_repeated(store: JobStore, every: int) -> None:
    """Also when the hub tells of few: the rest comes from the store."""
    hub, fence = Hub(), await running(store)
    seen: list[int] = []
    listening = asyncio.create_task(collect(store, hub, fence, seen))
    for number in range(100):
        events = await store.append(fence, [STEP] * (1 + number % 3), 0.1)
        if number % every == 0:
            hub.publish(events)
        if number == 50:
            hub.publish(events)  # told twice
    hub.publish(await store.finish(fence, "done", [Draft("done", {})]))
    await listening
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) == 201
    assert hub.positions() == {}


async def test_long_histories_come_in_pages(store: JobStore) -> None:
    hub, fence = Hub(), await running(store)
    await store.append(fence, [STEP] * (2 * PAGE), 0.1)
    await store.finish(fence, "done", [Draft("done", {})])
    for after in (0, 1, PAGE, 2 * PAGE + 1, 2 * PAGE + 2, 10 * PAGE):
        seen: list[int] = []
        await collect(store, hub, fence, seen, after)
        assert seen == list(range(after + 1, 2 * PAGE + 3))


async def test_a_slow_listener_takes_no_memory(store: JobStore) -> None:
    hub, fence = Hub(), await running(store)
    events = follow(store, hub, fence.job_id, 0)
    assert (await anext(events)).sequence == 1
    for _ in range(4):
        hub.publish(await store.append(fence, [STEP] * MAX_PENDING, 0.1))
    (listener,) = hub._listeners[fence.job_id]
    assert len(listener._pending) == MAX_PENDING
    hub.publish(await store.finish(fence, "done", [Draft("done", {})]))
    rest = [event.sequence async for event in events]
    assert rest == list(range(2, 4 * MAX_PENDING + 3))


async def test_listeners_are_woken_for_what_others_write(store: JobStore) -> None:
    hub, fence = Hub(), await running(store)
    seen: list[int] = []
    listening = asyncio.create_task(collect(store, hub, fence, seen))
    await until(seen, 1)
    await store.append(fence, [STEP], 0.1)
    assert hub.positions() == {fence.job_id: 1}
    hub.wake(fence.job_id)
    await until(seen, 2)
    await store.delete([fence.job_id])
    hub.wake(fence.job_id)
    await listening
    assert seen == [1, 2]


async def test_unknown_jobs_have_no_events(store: JobStore) -> None:
    assert [event async for event in follow(store, Hub(), "job_none", 0)] == []


@settings(max_examples=50)
@example(4, [5, 5, 7])
@given(st.integers(0, 5), st.lists(st.integers(1, 9), max_size=9))
def test_only_what_follows_is_taken_from_the_hub(last: int, told: list[int]) -> None:
    async def take() -> list[JobEvent]:
        listener = Listener(last)
        listener.hear(JobEvent(job_id="j", sequence=number, type="progress") for number in told)
        return await listener.next_events()

    numbers = [event.sequence for event in asyncio.run(take())]
    assert numbers in ([], list(range(last + 1, last + 1 + len(numbers))))
