"""Room in the queue, servers that stop and start, and several that share a store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from omni.messages import Queued
from omni.server import worker
from omni.server.jobs import Draining, QueueFull, StoreError
from omni.server.tables import JOBS
from omni.testing import doubles
from tests.server import functions
from tests.server.conftest import MakeService
from tests.server.orders import Log, all_events, order, reached, state_of


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with doubles():
        yield


# Room in the queue --------------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses(make_service: MakeService) -> None:
    service = make_service({"g": "hold", "h": "hold"}, max_running=1, max_queued=2)
    service.observe(log := Log())
    await service.start()
    jobs = [await service.submit(order(f"hold {n}")) for n in range(3)]
    with pytest.raises(QueueFull, match="graph 'g': 2 requests wait, and no more may") as caught:
        await service.submit(order("hold 4"))
    assert 1 <= caught.value.retry_after_seconds <= 60
    with pytest.raises(QueueFull):
        await anext(service.stream(order()))
    assert log.lines[-1] == ("refused", "g", "job", "QueueFull")
    assert (await service.generate(order("other graph", graph="h"))).text == "other graph"
    await service.abort(jobs[2].id)
    await service.submit(order("hold 5"))


async def test_orders_at_the_same_time_do_not_overfill(make_service: MakeService) -> None:
    service = make_service({"g": "hold"}, max_running=1, max_queued=3)
    await service.start()
    outcomes = await asyncio.gather(*(service.submit(order("hold")) for _ in range(10)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(QueueFull) == 6
    assert len(await service.list_jobs()) == 4


async def test_a_key_has_caps(make_service: MakeService) -> None:
    service = make_service({"g": "hold"}, max_running=3, max_running_per_key=1, max_queued_per_key=1)
    await service.start()
    first = await service.submit(order("hold 1", key="a"))
    await reached(service, first, "stage_started")
    for _ in range(3):
        await service.submit(order("hold 2", key="a"))
    with pytest.raises(QueueFull, match="of this API key wait"):
        await service.submit(order("hold 3", key="a"))
    assert service.running("g") == 1
    other = await service.submit(order("b", key="b"))
    assert (await all_events(service, other))[-1].type == "done"


# Stop and go ----------------------------------------------------------------------------------------------------------


async def test_a_stopped_server_finishes_what_it_can(make_service: MakeService) -> None:
    service = make_service({"g": "hold"}, max_running=2)
    await service.start()
    held, waiting = await service.submit(order("hold")), service.stream(order("hold too"))
    await reached(service, held, "stage_started")
    late = [await service.submit(order(f"hold late {n}")) for n in range(2)]
    assert isinstance(await anext(waiting), Queued)
    service.drain()
    for call in (service.submit(order()), anext(service.stream(order()))):
        with pytest.raises(Draining, match="the server is stopping"):
            await call
    await service.stop(0.05)
    with pytest.raises(Draining, match="the server is stopping"):
        await anext(waiting)
    again = make_service({"g": "hold"}, max_running=9)
    functions.started.clear()
    await again.start()
    for job in late:
        await reached(again, job, "stage_started")
    await reached(again, held, "restarted")
    await again.abort(held.id)
    events = await all_events(again, held)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    restarted = [event.data for event in events if event.type == "restarted"]
    assert restarted == [{"attempt": 2, "reason": "the server was stopped"}]


async def test_a_stop_that_is_cut_short_counts_no_death(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run does not end in time: its job is back in the queue before anything waits for it."""
    service = make_service({"g": "hold"})
    await service.start()
    job = await service.submit(order("hold"))
    await reached(service, job, "stage_started")
    monkeypatch.setattr("omni.server.worker.END_SECONDS", 0.01)
    monkeypatch.setattr("omni.server.run.JobRun.end", lambda *_: None)
    seen: list[str] = []
    cancel = worker.cancel

    async def watched(*tasks: asyncio.Task[None]) -> None:
        seen.append(await state_of(service, job))
        await cancel(*tasks)

    monkeypatch.setattr("omni.server.worker.cancel", watched)
    await service.stop(0)
    assert seen == ["queued"]
    again = make_service({"other": "hold"})
    await again.start()
    row = select(JOBS.c.state, JOBS.c.deaths, JOBS.c.attempt).where(JOBS.c.id == job.id)
    assert tuple(await again.store.read(lambda connection: connection.execute(row).one())) == ("queued", 0, 2)


async def test_a_new_server_answers_for_old_jobs(make_service: MakeService) -> None:
    first = make_service({"g": "echo"})
    await first.start()
    job = await first.submit(order("kept"))
    events = await all_events(first, job)
    await first.stop(0)
    second = make_service({"other": "echo"})
    await second.start()
    assert await all_events(second, job) == events
    found = await second.open_output(job.id, "text")
    assert found is not None
    assert found[1] == b"kept"


async def test_servers_share_a_store(store_url: str, make_service: MakeService) -> None:
    """Each answers, aborts and tells for the other; each job is done once."""
    here = make_service({"g": "hold"}, url=store_url, max_running=2)
    there = make_service({"g": "hold"}, url=store_url, max_running=2)
    await asyncio.gather(here.start(), there.start())
    functions.started.clear()
    jobs = [await (here, there)[n % 2].submit(order(f"job {n}")) for n in range(20)]
    seen = await asyncio.gather(*(all_events((there, here)[n % 2], job) for n, job in enumerate(jobs)))
    for events in seen:
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert events[-1].type == "done"
    assert sorted(functions.started) == sorted(f"job {n}" for n in range(20))
    there.drain()
    held = await here.submit(order("hold"))
    await reached(there, held, "stage_started")
    assert await there.abort(held.id, "from afar")
    assert (await all_events(there, held))[-1].data == {"reason": "from afar"}
    assert await state_of(here, held) == "aborted"


async def test_a_job_waits_for_a_server_that_has_its_graph(make_service: MakeService) -> None:
    first = make_service({"g": "hold"}, max_running=1)
    await first.start()
    blocker, job = await first.submit(order("hold")), await first.submit(order("later"))
    await reached(first, blocker, "stage_started")
    await first.stop(0)
    other = make_service({"h": "echo"})
    await other.start()
    assert (await other.generate(order("x", graph="h"))).text == "x"
    assert await state_of(other, job) == "queued"
    second = make_service({"g": "echo"})
    await second.start()
    assert (await all_events(other, job))[-1].type == "done"


async def test_a_changed_graph_fails_its_old_jobs(make_service: MakeService) -> None:
    first = make_service({"g": "hold"})
    await first.start()
    job = await first.submit(order("hold"))
    await reached(first, job, "stage_started")
    await first.stop(0)
    second = make_service({"g": {"stages": {"work": {"kind": "double", "ports": {"other": "text"}}}}})
    await second.start()
    error = (await all_events(second, job))[-1].data["error"]
    assert error["code"] == "invalid_input"
    assert "unknown input 'prompt'" in error["cause"]


async def test_an_abort_is_stored_before_it_is_acknowledged(make_service: MakeService) -> None:
    """The server may die right after its answer."""
    service = make_service({"g": "hold"})
    await service.start()
    job = await service.submit(order("hold"))
    await reached(service, job, "stage_started")
    assert await service.abort(job.id, "enough")
    stored = select(JOBS.c.abort_reason).where(JOBS.c.id == job.id)
    assert await service.store.read(lambda connection: connection.execute(stored).scalar()) == "enough"
    assert (await all_events(service, job))[-1].data == {"reason": "enough"}


@pytest.mark.parametrize("files", ["folder", "memory"])
async def test_two_stores_do_not_share_files(make_service: MakeService, tmp_path: Path, files: str) -> None:
    """Each would remove the other's as files without a job."""
    place = tmp_path / "files" if files == "folder" else f"memory://{tmp_path.name}"
    for _ in range(2):  # servers of one store do
        await make_service({"g": "echo"}, files=place).start()
    other = make_service({"g": "echo"}, url=f"sqlite:///{tmp_path}/other.db", files=place)
    with pytest.raises(StoreError, match=r"belong to another job store .*; give each store a folder of its own"):
        await other.start()
