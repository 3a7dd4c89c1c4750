"""Writing a run's events: in order, in groups, and not at all once the job is another's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import insert

from omni.server.changes import Draft, Fence
from omni.server.hub import Hub
from omni.server.jobs import Job, new_job_id
from omni.server.recorder import MANY, Recorder
from omni.server.store import JobStore
from omni.server.tables import SERVERS


class Bench:
    """A recorder over a store."""

    def __init__(self, store: JobStore, fence: Fence, max_events: int = 10_000) -> None:
        self.store, self.fence = store, fence
        self.lost: list[bool] = []
        self.recorder = Recorder(store, Hub(), fence, max_events, lambda: self.lost.append(True))

    async def stored(self) -> list[tuple[str, object]]:
        await self.recorder.settle()
        events = await self.store.events_after(self.fence.job_id, 1, limit=10_000)
        assert [event.sequence for event in events] == list(range(2, len(events) + 2))
        return [(event.type, event.data.get("text", event.data.get("step"))) for event in events]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    await store.write(lambda connection: connection.execute(insert(SERVERS).values(id="s", heartbeat_at=0.0)))
    job = Job(id=new_job_id(), graph="g", created_at=time.time())
    await store.insert(job)
    assert await store.claim(job.id, "s") is not None
    yield Bench(store, Fence(job.id, "s", 1))
    store.close()


def text(words: str, stage: str = "a") -> Draft:
    return Draft("text", {"stage": stage, "text": words})


def step(number: int, stage: str = "a") -> Draft:
    return Draft("progress", {"stage": stage, "step": number})


async def test_pieces_of_text_that_wait_become_one(bench: Bench) -> None:
    for word in "to be or not":
        bench.recorder.hear(text(word), 0.0)
        bench.recorder.hear(step(1), 0.0)
    bench.recorder.hear(text("b", stage="b"), 0.0)
    bench.recorder.hear(text("!"), 0.0)
    stored = await bench.stored()
    assert [item for item in stored if item[0] == "text"] == [("text", "to be or not"), ("text", "b"), ("text", "!")]


async def test_each_step_is_told_unless_many_wait(bench: Bench) -> None:
    for number in range(20):
        bench.recorder.hear(step(number), 0.0)
    assert await bench.stored() == [("progress", number) for number in range(20)]
    for number in range(20, 1000):
        bench.recorder.hear(step(number), 0.0)
    stored = await bench.stored()
    assert stored[-1] == ("progress", 999)
    assert len(stored) == 20 + MANY


async def test_progress_is_the_jobs(bench: Bench) -> None:
    bench.recorder.hear(step(1), 0.25)
    await bench.recorder.settle()
    job = await bench.store.get(bench.fence.job_id)
    assert job is not None
    assert job.progress == 0.25


async def test_a_job_of_another_server_is_left_alone(bench: Bench) -> None:
    await bench.store.requeue(bench.fence, "test")
    bench.recorder.hear(step(1), 0.0)
    assert await bench.stored() == [("restarted", None)]
    assert bench.lost == [True]


async def test_a_store_that_fails_is_a_lost_job(bench: Bench) -> None:
    bench.recorder.hear(Draft("text", {"stage": "a", "text": "\ud800"}), 0.0)  # no UTF-8
    flushing = bench.recorder._flushing
    await bench.recorder.settle()
    assert bench.lost == [True]
    assert flushing is not None
    assert isinstance(flushing.exception(), UnicodeEncodeError)


async def test_endless_talk_is_cut(bench: Bench) -> None:
    few = Bench(bench.store, bench.fence, max_events=3)
    for number in range(9):
        few.recorder.hear(step(number), 0.0)
        await asyncio.sleep(0)
    few.recorder.hear(Draft("stage_finished", {}), 0.0)
    stored = await few.stored()
    assert [kind for kind, _ in stored] == ["progress"] * 3 + ["stage_finished"]
