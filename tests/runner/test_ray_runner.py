"""What only actors do: they die and are replaced, they share no memory, and their payloads leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from omni.api import AsyncOmni
from omni.errors import RequestFailed, StageDiedError, StageError, StageSetupError
from omni.messages import Aborted, Event, Failed, HopFinished, StageStarted
from omni.runner.actor import Vitals
from omni.runner.actor_process import ActorProcess
from omni.testing import digest_of, doubles

pytestmark = pytest.mark.usefixtures("ray_cluster")
WAIT_SECONDS = 60
BIG = 4_000_000
INPUTS = {"image": "image", "extra": "image"}


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with doubles():
        yield


def double(inputs: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    ports = dict.fromkeys(inputs or {}, "any") or {"prompt": "text"}
    return {"kind": "double", "inputs": inputs or {}, "ports": ports, **fields}


def run_graph(stages: dict[str, Any], work: Callable[[AsyncOmni], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncOmni({"stages": stages, **options}, runner="ray") as omni:
            return await asyncio.wait_for(work(omni), WAIT_SECONDS)

    return asyncio.run(main())


def process_of(omni: AsyncOmni, name: str) -> ActorProcess:
    assert omni._runner is not None
    process = omni._runner._processes[name]
    assert isinstance(process, ActorProcess)
    return process


async def ping(omni: AsyncOmni, name: str) -> Vitals:
    return await process_of(omni, name).ping()


async def eventually(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def collect(omni: AsyncOmni, **fields: Any) -> list[Event]:
    return [event async for event in omni.stream(**fields)]


# Deaths ---------------------------------------------------------------------------------------------------------


def test_a_death_fails_its_request_and_the_next_one_gets_a_new_process() -> None:
    stages = {"a": double(), "b": double({"x": "a.text", "prompt": "prompt"}, fail_in="die", fail_on="kill me")}

    async def work(omni: AsyncOmni) -> None:
        first, other = await ping(omni, "b"), await ping(omni, "a")
        with pytest.raises(RequestFailed) as caught:
            await omni.generate(prompt="kill me", seed=1)
        error = caught.value.error
        assert isinstance(error, StageDiedError)
        assert str(error) == "stage 'b': its process died (ask again: the next request gets a new process)"
        assert "actor_id" in error.details
        assert len((await omni.generate(prompt="good", seed=1)).text) == 64
        assert (await ping(omni, "b")).pid != first.pid
        assert (await ping(omni, "a")).pid == other.pid

    run_graph(stages, work)


def test_a_process_that_dies_while_idle_costs_no_request() -> None:
    async def work(omni: AsyncOmni) -> None:
        expected = (await omni.generate(prompt="x", seed=1)).text
        assert await omni.check() == {}
        os.kill((await ping(omni, "a")).pid, signal.SIGKILL)
        await eventually(lambda: process_of(omni, "a")._life is None)
        assert await omni.check() == {"a": "its process died, and another one starts"}
        results = await asyncio.gather(*(omni.generate(prompt="x", seed=1) for _ in range(5)))
        assert {result.text for result in results} == {expected}

    run_graph({"a": double()}, work)


def test_a_death_fails_all_requests_in_flight_there_and_no_other() -> None:
    stages = {"a": double(hold=True), "b": double(hold=True)}

    async def work(omni: AsyncOmni) -> None:
        requests = [asyncio.create_task(collect(omni, prompt=f"p{i}", seed=i)) for i in range(3)]
        pid = (await ping(omni, "a")).pid
        while (await ping(omni, "a")).num_running < 3:
            await asyncio.sleep(0)
        started = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        for events in await asyncio.gather(*requests):
            assert isinstance(events[-1], Failed)
            assert isinstance(events[-1].error, StageDiedError)
            assert events[-1].error.stage == "a"
        assert time.monotonic() - started < WAIT_SECONDS / 2

    run_graph(stages, work)


def test_a_rebuild_that_fails_fails_its_request_and_the_next_one_tries_again() -> None:
    async def work(omni: AsyncOmni) -> None:
        process = process_of(omni, "a")
        good = process._launches
        bad = double_launch_that_fails(process)
        process._launches = (bad,)
        os.kill((await ping(omni, "a")).pid, signal.SIGKILL)
        await eventually(lambda: process._life is None)
        with pytest.raises(RequestFailed) as caught:
            await omni.generate(prompt="x", seed=1)
        assert isinstance(caught.value.error, StageSetupError)
        assert caught.value.error.cause == "RuntimeError: the double fails in setup"
        process._launches = good
        assert len((await omni.generate(prompt="x", seed=1)).text) == 64

    run_graph({"a": double()}, work)


def double_launch_that_fails(process: ActorProcess) -> Any:
    import msgspec

    launch = process._launches[0]
    spec = msgspec.structs.replace(launch.context.spec, fail_in="setup")
    return msgspec.structs.replace(launch, context=msgspec.structs.replace(launch.context, spec=spec))


def test_an_abort_ends_the_wait_for_a_rebuild() -> None:
    async def work(omni: AsyncOmni) -> None:
        process = process_of(omni, "a")
        assert process._life is not None
        process._bury(process._life)
        blocked = asyncio.Event()

        async def build(report: Any) -> None:
            blocked.set()
            await asyncio.Event().wait()

        process._build = build  # type: ignore[method-assign]
        waiting = asyncio.create_task(collect(omni, prompt="x", seed=1, request_id="r"))
        await blocked.wait()
        assert await omni.abort("r")
        assert isinstance((await waiting)[-1], Aborted)

    run_graph({"a": double()}, work)


def test_a_stage_that_ignores_its_abort_is_given_up_and_replaced() -> None:
    stages = {"a": double(hold=True, deaf=True, timeouts={"abort_seconds": 0.2})}

    async def work(omni: AsyncOmni) -> None:
        pid = (await ping(omni, "a")).pid
        events: list[Event] = []
        async for event in omni.stream(prompt="stuck", seed=1, request_id="stuck"):
            events.append(event)
            if isinstance(event, StageStarted):
                waiting = asyncio.create_task(collect(omni, prompt="behind it", seed=2))
                await omni.abort("stuck")
        assert isinstance(events[-1], Aborted)
        final = (await waiting)[-1]
        assert isinstance(final, Failed)
        assert final.error.cause == "its process was killed because a run of stage 'a' did not stop in time"
        await process_of(omni, "a").ready("probe", "a")
        assert (await ping(omni, "a")).pid != pid

    run_graph(stages, work)


# Payloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gives", ["image", "tensor"], ids=["small", "big"])
def test_payloads_cross_between_driver_and_actors(gives: str) -> None:
    fields = {"gives": gives, "num_bytes": BIG}
    stages = {
        "a": double(**fields),
        "here": double({"x": f"a.{gives}"}, isolation="inline", **fields),
        "b": double({"x": f"here.{gives}", "y": f"a.{gives}"}, **fields),
    }

    async def work(omni: AsyncOmni) -> Any:
        return await omni.generate(prompt="x", seed=5)

    on_ray = run_graph(stages, work)
    inline = asyncio.run(inline_result(stages))
    assert digest_of(on_ray.outputs) == digest_of(inline.outputs)
    hops = {(hop.source, hop.target): hop for hop in on_ray.timings.hops}
    assert len(hops) == 3
    assert {hop.transport for hop in hops.values()} == {"object_store"}
    assert hops[f"here.{gives}", "b.x"].bytes == (BIG if gives == "tensor" else 4 * 2 * 3)


async def inline_result(stages: dict[str, Any]) -> Any:
    async with AsyncOmni({"stages": stages}, runner="inline") as omni:
        return await omni.generate(prompt="x", seed=5)


def test_stages_of_one_process_hand_over_without_the_store() -> None:
    stages = {
        "a": double(gives="image"),
        "cheap": double({"x": "a.image"}, model=False),
        "b": double({"x": "cheap.text"}),
    }

    async def work(omni: AsyncOmni) -> None:
        assert omni.plan.stage("cheap").process == omni.plan.stage("a").process
        events = await collect(omni, prompt="x", seed=1)
        hops = {event.source: event.transport for event in events if isinstance(event, HopFinished)}
        assert hops == {"a.image": "local", "cheap.text": "object_store"}
        await eventually_idle(omni, "a")

    run_graph(stages, work)


async def eventually_idle(omni: AsyncOmni, *names: str) -> None:
    for name in names:
        while (vitals := await ping(omni, name)).num_held or vitals.num_running:
            await asyncio.sleep(0.01)


def test_nothing_of_a_request_stays_in_the_store() -> None:
    import ray

    big = {"gives": "tensor", "num_bytes": BIG}
    stages = {
        "a": double(**big),
        "b": double({"x": "a.tensor", "prompt": "prompt"}, fail_in="run", fail_on="bad", **big),
        "c": double({"x": "b.tensor", "y": "a.tensor"}, **big),
    }

    async def work(omni: AsyncOmni) -> None:
        store = ray.cluster_resources()["object_store_memory"]
        results = await asyncio.gather(*(omni.generate(prompt=f"p{i}", seed=i) for i in range(3)))
        failed = await collect(omni, prompt="bad", seed=1)
        events = omni.stream(prompt="left", seed=1)
        async for event in events:
            if isinstance(event, StageStarted) and event.stage == "c":
                break
        await events.aclose()
        await eventually_idle(omni, "a", "b", "c")
        await eventually(lambda: ray.available_resources()["object_store_memory"] == store)
        assert isinstance(failed[-1], Failed)  # who keeps an error or a result keeps nothing of the store
        assert [result.tensor.numel() for result in results] == [BIG] * 3

    run_graph(stages, work)


def test_a_large_value_of_a_request_is_stored_once_for_all_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    image = Image.effect_noise((1500, 1000), 80).convert("RGB")
    small = Image.new("RGB", (4, 2), "red")
    stages = {
        "a": double({"image": "image"}),
        "b": double({"image": "image", "x": "a.text"}),
        "c": double({"images": ["image", "extra"], "x": "a.text"}),
        "here": double({"image": "image"}, model=False),
    }
    stored: list[Any] = []
    put = ray.put

    def count(value: Any, **options: Any) -> Any:
        stored.append(value)
        return put(value, **options)

    monkeypatch.setattr(ray, "put", count)

    async def work(omni: AsyncOmni) -> Any:
        return (await omni.generate(image=image, extra=small, seed=1)).outputs

    async def on_ray(omni: AsyncOmni) -> Any:
        assert omni.plan.stage("here").process == "driver"
        store = ray.cluster_resources()["object_store_memory"]
        outputs = await work(omni)
        await eventually(lambda: ray.available_resources()["object_store_memory"] == store)
        return outputs

    async def inline() -> Any:
        async with AsyncOmni({"stages": stages, "inputs": INPUTS}, runner="inline") as omni:
            return await work(omni)

    outputs = run_graph(stages, on_ray, inputs=INPUTS)
    assert len(stored) == 1
    stored.clear()
    assert outputs == asyncio.run(inline())


def test_a_payload_that_cannot_cross_is_told_as_its_producers_fault() -> None:
    stages = {
        "a": {"kind": "function", "call": "threading:main_thread", "outputs": {"lock": "any"}, "isolation": "actor"},
        "b": double({"x": "a.lock"}),
    }

    async def work(omni: AsyncOmni) -> None:
        with pytest.raises(RequestFailed) as caught:
            await omni.generate(seed=1)
        assert caught.value.error.stage == "a"
        assert caught.value.error.cause.startswith("its payload cannot cross processes: TypeError: cannot pickle")

    run_graph(stages, work)


class Stubborn:
    """Pickles at home only."""

    def __reduce__(self) -> Any:
        raise TypeError("this one stays here")


def give_stubborn(prompt: str) -> Any:
    """A payload for readers here and elsewhere that cannot be sent."""
    return {"thing": Stubborn(), "padding": b"0" * 100_000 if prompt == "big" else b""}


@pytest.mark.parametrize("size", ["small", "big"])
def test_a_run_that_fails_keeps_nothing_in_its_process(size: str) -> None:
    call = f"{__name__}:give_stubborn"
    stages = {
        "a": {"kind": "function", "call": call, "outputs": {"thing": "any", "padding": "any"}, "isolation": "actor"},
        "near": double({"x": "a.thing"}, model=False),
        "far": double({"x": "a.padding"}),
    }

    async def work(omni: AsyncOmni) -> None:
        assert omni.plan.stage("near").process == omni.plan.stage("a").process
        with pytest.raises(RequestFailed, match="this one stays here"):
            await omni.generate(prompt=size, seed=1)
        await eventually_idle(omni, "a")
        assert not process_of(omni, "a")._kept

    run_graph(stages, work)


# Processes ------------------------------------------------------------------------------------------------------


def test_a_light_stage_pays_for_no_torch_and_pings_come_through_while_it_computes() -> None:
    async def work(omni: AsyncOmni) -> None:
        assert not (await ping(omni, "a")).has_torch
        async for event in omni.stream(prompt="x", seed=1):
            if isinstance(event, StageStarted):
                assert (await ping(omni, "a")).num_running == 1

    run_graph({"a": double(steps=20, step_seconds=0.05)}, work)


def test_stop_kills_what_runs_and_can_be_repeated() -> None:
    async def main() -> None:
        omni = AsyncOmni({"stages": {"a": double(hold=True, deaf=True)}}, runner="ray")
        await omni.start()
        runner = omni._runner
        assert runner is not None
        pid = (await ping(omni, "a")).pid
        request = asyncio.create_task(collect(omni, prompt="x", seed=1))
        while (await ping(omni, "a")).num_running < 1:
            await asyncio.sleep(0)
        await omni.stop()
        await runner.stop()
        assert isinstance((await asyncio.wait_for(request, WAIT_SECONDS))[-1], Aborted)
        while is_alive(pid):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), WAIT_SECONDS))


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


def test_stage_errors_keep_their_kind() -> None:
    async def work(omni: AsyncOmni) -> None:
        with pytest.raises(RequestFailed) as caught:
            await omni.generate(prompt="x", seed=1)
        assert type(caught.value.error) is StageError

    run_graph({"a": double(fail_in="run")}, work)
