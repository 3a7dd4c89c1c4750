"""The service as its routes use it: jobs from order to output, streams, room in the queue, several servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.errors import InputError, RequestFailed
from omni.media import Audio, Video
from omni.messages import Aborted, Done, Event, Failed, Queued, StageStarted
from omni.server.jobs import Draining, IdempotencyConflict, Job, JobEvent, JobOrder, QueueFull
from omni.server.observer import Observer
from omni.server.service import Service
from omni.server.values import read_inputs
from omni.testing import doubles
from tests.server import functions
from tests.server.conftest import WAIT_SECONDS, MakeService

MEDIA_GRAPH: dict[str, Any] = {
    "inputs": {"image": "image", "clip": "video", "sound": "audio", "details": "json"},
    "stages": {"work": {"kind": "function", "call": "tests.server.functions:mix"}},
}


@pytest.fixture(autouse=True)
async def _deadline() -> AsyncIterator[None]:
    with doubles():
        yield


def order(prompt: str = "x", graph: str = "g", **fields: Any) -> JobOrder:
    return JobOrder(graph=graph, inputs={"prompt": prompt}, **fields)


async def all_events(service: Service, job: Job | str, after: int = 0) -> list[JobEvent]:
    job_id = job if isinstance(job, str) else job.id
    async with asyncio.timeout(WAIT_SECONDS):
        return [event async for event in service.events(job_id, after)]


async def reached(service: Service, job: Job, kind: str) -> None:
    """Until a job's event of a type."""
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in service.events(job.id):
            if event.type == kind:
                return
    raise AssertionError(f"no event {kind}")


async def state_of(service: Service, job: Job) -> str:
    found = await service.get(job.id)
    return "gone" if found is None else found.state


class Log(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, ...]] = []

    def accepted(self, request_id: str, graph: str, kind: str) -> None:
        self.lines.append(("accepted", graph, kind))

    def refused(self, graph: str, kind: str, reason: str) -> None:
        self.lines.append(("refused", graph, kind, reason))

    def started(self, request_id: str, graph: str, kind: str, waited_seconds: float) -> None:
        assert waited_seconds >= 0
        self.lines.append(("started", graph, kind))

    def event(self, request_id: str, graph: str, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.lines.append(("stage", event.stage))

    def finished(self, request_id: str, graph: str, kind: str, outcome: str, seconds: float) -> None:
        self.lines.append(("finished", graph, kind, outcome))


# Jobs -------------------------------------------------------------------------------------------------------------


async def test_a_job_from_order_to_output(make_service: MakeService) -> None:
    service = make_service({"g": "echo"})
    service.observe(log := Log())
    await service.start()
    job = await service.submit(order("hi", seed=3, kind="video", key="alice", priority=2, meta={"size": "1x1"}))
    assert (job.state, job.attempt, job.inputs, job.seed) == ("queued", 1, {"prompt": "hi"}, 3)
    events = await all_events(service, job)
    types = [event.type for event in events]
    assert types == ["queued", "stage_started", "stage_finished", "output", "done"]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    url = f"/v1/jobs/{job.id}/outputs/text?index=0"
    about = {"type": "text", "url": url, "media_type": "text/plain; charset=utf-8", "bytes": 2}
    assert events[3].data == {"name": "text", "index": 0, **about}
    assert await all_events(service, job, after=3) == events[3:]
    assert await all_events(service, job, after=5) == []
    done = await service.get(job.id)
    assert done is not None
    assert (done.state, done.progress, done.kind) == ("done", 1.0, "video")
    assert (done.key, done.priority, done.meta) == ("alice", 2, {"size": "1x1"})
    found = await service.open_output(job.id, "text")
    assert found is not None
    assert found[1] == b"hi"
    assert await service.open_output(job.id, "text", 1) is None
    assert await service.open_output("job_none", "text") is None
    who = ("g", "video")
    assert log.lines == [("accepted", *who), ("started", *who), ("stage", "work"), ("finished", *who, "done")]


async def test_steps_pictures_and_previews(make_service: MakeService, tmp_path: Path) -> None:
    stage = {"kind": "double", "gives": "image", "steps": 4, "ports": {"image": "image"}}
    service = make_service({"g": {"stages": {"work": stage}}})
    await service.start()
    picture = Image.new("RGB", (8, 4), (1, 2, 3))
    job = await service.submit(JobOrder(graph="g", inputs={"image": picture}, preview_every=2))
    assert job.meta == {"preview_every": 2}
    assert job.inputs["image"]["type"] == "image"
    events = await all_events(service, job)
    progress = [event.data for event in events if event.type == "progress"]
    assert progress[-1] == {"stage": "work", "step": 4, "num_steps": 4, "unit": "step", "progress": 1.0}
    previews = [event.data["image"][:23] for event in events if event.type == "preview"]
    assert previews == ["data:image/jpeg;base64,"] * len(previews)
    assert previews
    found = await service.open_output(job.id, "image")
    assert found is not None
    output, path = found
    assert isinstance(path, Path)
    assert path.is_relative_to(tmp_path / "files" / job.id)
    assert (output.media_type, output.bytes) == ("image/png", path.stat().st_size)
    with Image.open(path) as image:
        assert image.size == (4, 2)


async def test_every_run_gets_the_very_inputs(make_service: MakeService) -> None:
    """Also values that could be taken for a file of another job."""
    service = make_service({"g": MEDIA_GRAPH})
    await service.start()
    noise = np.random.default_rng(0)
    sneaky = {"blob": "job_0/in-1.png", "type": "image", "deep": [{"json": {"blob": 1}}, {"json": 1}, None, 1.5, {}]}
    inputs = {
        "image": Image.frombytes("RGBA", (5, 3), noise.bytes(60)),
        "clip": Video(noise.integers(0, 256, (4, 17, 31, 3), dtype=np.uint8), 23.976),
        "sound": Audio(noise.standard_normal((3, 100)).astype(np.float32), 44100),
        "details": sneaky,
    }
    job = await service.submit(JobOrder(graph="g", inputs=inputs))
    await all_events(service, job)
    found = await service.open_output(job.id, "json")
    assert found is not None
    direct = await service.graphs["g"].generate(**inputs)
    stored = await service.files.call(read_inputs, service.files, job.inputs)
    assert functions.mix(**stored) == functions.mix(**inputs) == direct.outputs["json"]
    assert stored["details"] == sneaky


async def test_a_failed_job_says_why(make_service: MakeService) -> None:
    service = make_service({"g": "fail"})
    await service.start()
    job = await service.submit(order("cards"))
    events = await all_events(service, job)
    failed = await service.get(job.id)
    assert failed is not None
    assert failed.error is not None
    assert (failed.state, failed.error.stage, failed.error.code) == ("failed", "work", "stage_failed")
    assert "no luck with cards" in failed.error.cause
    assert events[-1].type == "failed"
    assert events[-1].data["error"]["cause"] == failed.error.cause


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"graph": "h"}, "unknown graph 'h'"),
        ({"inputs": {"promt": "x"}}, "unknown input 'promt', did you mean 'prompt'"),
        ({"inputs": {"prompt": 3}}, "input 'prompt' must be text, not int"),
        ({"inputs": {}}, "input 'prompt' is missing"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"priority": 101}, "priority must be from -100 to 100, not 101"),
        ({"idempotency_key": ""}, "an idempotency key has 1 to 255 printable ASCII characters"),
        ({"idempotency_key": "a\nb"}, "an idempotency key has"),
        ({"meta": {"webhook": "https://h/"}}, "webhooks are switched off"),
        ({"meta": {"webhook": 3}}, "webhook must be an address"),
        ({"preview_every": -1}, "preview_every must be a number of steps"),
    ],
)
async def test_wrong_orders_are_told_at_once(make_service: MakeService, fields: dict[str, Any], message: str) -> None:
    service = make_service({"g": "echo"})
    await service.start()
    with pytest.raises(InputError, match=message):
        await service.submit(JobOrder(**({"graph": "g", "inputs": {"prompt": "x"}} | fields)))
    assert await service.list_jobs() == []


async def test_equal_orders_of_an_idempotency_key_are_one_job(make_service: MakeService, tmp_path: Path) -> None:
    service = make_service({"g": {"stages": {"work": {"kind": "double", "ports": {"image": "image"}}}}})
    await service.start()

    def picture(shade: int, **fields: Any) -> JobOrder:
        return JobOrder(graph="g", inputs={"image": Image.new("L", (2, 2), shade)}, idempotency_key="i", **fields)

    jobs = await asyncio.gather(*(service.submit(picture(1)) for _ in range(5)))
    assert len({job.id for job in jobs}) == 1
    assert [path.name for path in (tmp_path / "files").iterdir()] == [jobs[0].id]
    for other in (picture(2), picture(1, seed=5), picture(1, kind="video"), picture(1, meta={"a": 1})):
        with pytest.raises(IdempotencyConflict, match="idempotency key 'i' belongs to another request"):
            await service.submit(other)
    assert (await service.submit(picture(2, key="bob"))).id != jobs[0].id


async def test_lists(make_service: MakeService) -> None:
    service = make_service({"g": "echo", "h": "echo"})
    await service.start()
    jobs = [await service.submit(order(graph=graph, key=graph)) for graph in ("g", "h", "g")]
    for job in jobs:
        await all_events(service, job)
    assert [job.id for job in await service.list_jobs()] == [job.id for job in reversed(jobs)]
    assert [job.id for job in await service.list_jobs(graph="g", order="asc")] == [jobs[0].id, jobs[2].id]
    assert [job.id for job in await service.list_jobs(key="h", state="done")] == [jobs[1].id]
    assert [job.id for job in await service.list_jobs(limit=1, after=jobs[2].id)] == [jobs[1].id]


# Aborts -----------------------------------------------------------------------------------------------------------


async def test_jobs_are_aborted_where_they_are(make_service: MakeService) -> None:
    service = make_service({"g": "hold"}, max_running=1)
    await service.start()
    running, waiting = await service.submit(order("hold 1")), await service.submit(order("hold 2"))
    await reached(service, running, "stage_started")
    assert (service.running("g"), service.waiting("g")) == (1, 1)
    assert await service.abort(waiting.id)
    assert [event.type for event in await all_events(service, waiting)] == ["queued", "aborted"]
    assert await service.abort(running.id, "enough")
    last = (await all_events(service, running))[-1]
    assert (last.type, last.data) == ("aborted", {"reason": "enough"})
    assert not await service.abort(running.id)
    assert not await service.abort("job_none")
    after = await service.submit(order("free again"))
    assert (await all_events(service, after))[-1].type == "done"


async def test_a_deleted_job_leaves_nothing(make_service: MakeService, tmp_path: Path) -> None:
    graph = {"stages": {"work": {"kind": "double", "ports": {"image": "image"}, "hold": True}}}
    service = make_service({"g": graph})
    await service.start()
    job = await service.submit(JobOrder(graph="g", inputs={"image": Image.new("L", (2, 2))}))
    await reached(service, job, "stage_started")
    assert (tmp_path / "files" / job.id).is_dir()
    assert await service.delete(job.id)
    assert not (tmp_path / "files" / job.id).exists()
    assert await service.get(job.id) is None
    assert await all_events(service, job) == []
    assert not await service.delete(job.id)


# Streams ----------------------------------------------------------------------------------------------------------


async def test_a_stream_is_not_stored(make_service: MakeService) -> None:
    service = make_service({"g": "echo"})
    service.observe(log := Log())
    await service.start()
    events = [event async for event in service.stream(order("hi", request_id="r", kind="image"))]
    assert isinstance(events[0], Queued)
    assert isinstance(events[-1], Done)
    assert events[-1].outputs == {"text": "hi"}
    assert sum(isinstance(event, Queued) for event in events) == 1
    assert {event.request_id for event in events} == {"r"}
    assert await service.list_jobs() == []
    assert (await service.generate(order("ho"))).text == "ho"
    assert log.lines[:4] == [
        ("accepted", "g", "image"),
        ("started", "g", "image"),
        ("stage", "work"),
        ("finished", "g", "image", "done"),
    ]


async def test_leaving_a_stream_frees_its_slot(make_service: MakeService) -> None:
    service = make_service({"g": "hold"}, max_running=1)
    await service.start()
    held = service.stream(order("hold"))
    while not isinstance(await anext(held), StageStarted):
        pass
    waiting = service.stream(order("hold too"))
    assert isinstance(await anext(waiting), Queued)  # accepted, though it does not run yet
    assert (service.running("g"), service.waiting("g")) == (1, 1)
    await waiting.aclose()
    assert (service.running("g"), service.waiting("g")) == (1, 0)
    await held.aclose()
    assert (service.running("g"), service.waiting("g")) == (0, 0)
    assert (await service.generate(order("free"))).text == "free"


async def test_a_failed_stream_raises_in_generate(make_service: MakeService) -> None:
    service = make_service({"g": "fail"})
    await service.start()
    with pytest.raises(RequestFailed, match="no luck"):
        await service.generate(order())
    assert isinstance([event async for event in service.stream(order())][-1], Failed)
    assert service.running("g") == 0


async def test_streams_and_jobs_share_the_queue(make_service: MakeService) -> None:
    """Priority first, then keys in turn, whoever made the request."""
    service = make_service({"g": "hold"}, max_running=1)
    await service.start()
    functions.started.clear()
    blocker = await service.submit(order("hold"))
    await reached(service, blocker, "stage_started")
    streams = [asyncio.create_task(service.generate(order(f"stream {n}", key="a"))) for n in range(2)]
    while service.waiting("g") < 2:
        await asyncio.sleep(0)
    jobs = [
        await service.submit(order("job of b", key="b")),
        await service.submit(order("job of b 2", key="b")),
        await service.submit(order("urgent", key="a", priority=1)),
    ]
    await service.abort(blocker.id)
    for job in jobs:
        await all_events(service, job)
    await asyncio.gather(*streams)
    assert functions.started == ["hold", "urgent", "job of b", "stream 0", "job of b 2", "stream 1"]


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


async def test_memory_stays_flat(make_service: MakeService) -> None:
    """Nothing of a request that is over is kept, stored or not."""
    service = make_service({"g": "echo"})
    await service.start()

    def sizes() -> dict[str, int]:
        parts = {"queue": service._dispatcher.queue, "dispatcher": service._dispatcher, "worker": service._worker}
        parts |= {"hub": service._hub, "runner": service.graphs["g"].runner}
        tables = {f"{part}.{name}": value for part, owner in parts.items() for name, value in vars(owner).items()}
        return {name: len(value) for name, value in tables.items() if hasattr(value, "__len__")}

    async def use(number: int) -> None:
        await asyncio.gather(*(service.generate(order(key=f"key {n}")) for n in range(number)))
        for job in [await service.submit(order(key=f"job key {n}")) for n in range(10)]:
            await all_events(service, job)
        with contextlib.suppress(InputError):
            await service.generate(order(graph="none"))
        while service.running("g"):
            await asyncio.sleep(0)

    await use(20)
    before = sizes()
    await use(200)
    assert sizes() == before


async def test_an_aborted_stream_ends_with_its_event(make_service: MakeService) -> None:
    """When the graph itself aborts the request."""
    service = make_service({"g": "hold"})
    await service.start()
    events = []
    async for event in service.stream(order("hold", request_id="r")):
        events.append(event)
        if isinstance(event, StageStarted):
            assert await service.graphs["g"].abort("r")
    assert isinstance(events[-1], Aborted)
