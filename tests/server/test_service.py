"""The service as its routes use it: jobs from order to output, streams, room in the queue, several servers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.errors import InputError, RequestFailed
from omni.media import Audio, Video
from omni.messages import Aborted, Done, Failed, Queued, StageStarted
from omni.server.jobs import IdempotencyConflict, JobOrder, StoreError
from omni.server.values import read_inputs
from omni.testing import doubles
from tests.server import functions
from tests.server.conftest import MakeService
from tests.server.orders import Log, all_events, order, reached

MEDIA_GRAPH: dict[str, Any] = {
    "inputs": {"image": "image", "clip": "video", "sound": "audio", "details": "json"},
    "stages": {"work": {"kind": "function", "call": "tests.server.functions:mix"}},
}


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with doubles():
        yield


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
    assert service.files.folders() == [jobs[0].id]
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


@pytest.mark.parametrize("key", [None, "mine"])
async def test_who_leaves_while_its_job_is_stored_leaves_none(make_service: MakeService, key: str | None) -> None:
    """But one with an idempotency key, which its caller can ask for again."""
    service = make_service({"g": "hold"})
    await service.start()
    begun, go_on = threading.Event(), threading.Event()

    def hold(connection: object) -> bool:
        begun.set()
        return go_on.wait(60)

    blocked = asyncio.ensure_future(service.store.write(hold))
    await asyncio.to_thread(begun.wait, 60)
    leaving = asyncio.ensure_future(service.submit(order("hold", idempotency_key=key)))
    async with asyncio.timeout(60):
        while service.store.writer._queue.empty():  # until its insert waits
            await asyncio.sleep(0.001)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        go_on.set()
        assert await blocked
        while not (jobs := await service.list_jobs()):
            await asyncio.sleep(0.001)
        if key is None:
            assert (await all_events(service, jobs[0]))[-1].type == "aborted"
        else:
            await reached(service, jobs[0], "stage_started")


async def test_graphs_stop_when_the_store_does_not_begin(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service({"g": "echo"})

    async def fault(worker: object) -> None:
        raise StoreError("no luck")

    monkeypatch.setattr("omni.server.worker.Worker.start", fault)
    with pytest.raises(StoreError, match="no luck"):
        await service.start()
    assert await service.graphs["g"].check(1.0) == {"work": "it is not loaded"}
