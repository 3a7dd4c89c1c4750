"""The Ray runner: each process of the plan but the driver is an actor in a placement group.

The driver chains references: a payload goes from actor to actor without passing through it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from omni.errors import RequestAborted, RunnerError
from omni.hardware import Hardware, from_ray_nodes
from omni.messages import Event, Payload
from omni.placement import SMALLEST_CPUS
from omni.plan import DRIVER, Plan, ProcessPlan
from omni.runner.actor_process import ActorProcess, DriverPayload, lost_input, read
from omni.runner.base import Runner
from omni.runner.inline import DriverProcess
from omni.runner.process import Delivered, RunCall, StageLaunch, StageProcess
from omni.runner.ray_environment import Cluster, connect, disconnect

PLACEMENT_SECONDS = 60.0
"""How long to wait for the cluster to have room."""
STOP_GRACE_SECONDS = 2.0
"""How long `stop` waits for aborted runs; after that their processes are killed, which is safe for actors."""


class RayRunner(Runner):
    """Runs a plan on the Ray cluster at `address` or RAY_ADDRESS, or on one that it starts on this machine."""

    def __init__(self, plan: Plan, address: str | None = None) -> None:
        super().__init__(plan)
        self._address = address
        self._group: PlacementGroup | None = None
        self.cluster: Cluster | None = None
        """What it runs on, while it runs."""

    async def _build_processes(self) -> dict[str, StageProcess]:
        bundles = self.plan.bundles()
        shares = [_bundle_of(bundle) for bundle in bundles]
        self.cluster = await connect(self._address, sum(share["CPU"] for share in shares))
        self._group = await _reserve(shares, self.cluster) if bundles else None
        processes: dict[str, StageProcess] = {DRIVER: RayDriverProcess(self._launches(DRIVER))}
        for index, bundle in enumerate(bundles):
            for process in bundle:
                options = {
                    "num_cpus": max(process.cpus, SMALLEST_CPUS / len(bundle)),
                    "num_gpus": process.gpus,
                    "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, index),
                }
                launches = self._launches(process.name)
                processes[process.name] = ActorProcess(process.name, launches, process.num_threads, options)
        return processes

    def _stop_grace(self) -> float:
        return min(super()._stop_grace(), STOP_GRACE_SECONDS)

    async def stop(self) -> None:
        try:
            await super().stop()
        finally:
            group, self._group = self._group, None
            cluster, self.cluster = self.cluster, None
            try:
                if group is not None:
                    with contextlib.suppress(RayError):
                        await asyncio.to_thread(remove_placement_group, group)
            finally:
                if cluster is not None:
                    await disconnect()


@contextlib.asynccontextmanager
async def joined(address: str | None) -> AsyncGenerator[Hardware, None]:
    """The hardware of the Ray cluster at `address` or RAY_ADDRESS, which stays joined inside the block."""
    await connect(address, 0)
    try:
        yield from_ray_nodes(await asyncio.to_thread(ray.nodes))
    finally:
        await disconnect()


class RayDriverProcess(DriverProcess):
    """The driver beside actors: it fetches what its stages read, and stores what actors will read."""

    def __init__(self, launches: tuple[StageLaunch, ...]) -> None:
        super().__init__(launches)
        self._reading: dict[tuple[str, str], bool] = {}
        """(request, stage) of the runs that still read their inputs -> whether they were aborted meanwhile."""

    async def run(self, call: RunCall, sent: tuple[Any, ...]) -> AsyncGenerator[Event | Delivered, None]:
        key = (call.request_id, call.stage)
        self._reading[key] = False
        try:
            payloads = tuple([await read(ref) for ref in sent])
        except RayError as error:
            raise lost_input(call.stage, error) from error
        finally:
            aborted = self._reading.pop(key)
        if aborted:
            raise RequestAborted(call.request_id)
        async with contextlib.aclosing(super().run(call, payloads)) as items:
            async for item in items:
                if isinstance(item, Delivered):
                    yield msgspec.structs.replace(item, ref=DriverPayload(item.ref))
                else:
                    yield item

    async def abort(self, request_id: str, stage: str) -> None:
        if (request_id, stage) in self._reading:
            self._reading[request_id, stage] = True
        else:
            await super().abort(request_id, stage)

    async def fetch(self, ref: Any) -> Payload:
        payload: Payload = ref.payload
        return payload


def _bundle_of(processes: tuple[ProcessPlan, ...]) -> dict[str, float]:
    """What the processes of one bundle reserve together."""
    resources = {"CPU": max(sum(process.cpus for process in processes), SMALLEST_CPUS)}
    gpus = sum(process.gpus for process in processes)
    return {**resources, "GPU": gpus} if gpus else resources


async def _reserve(bundles: list[dict[str, float]], cluster: Cluster) -> PlacementGroup:
    """A placement group of the bundles. Raises RunnerError when the cluster has no room for them."""
    needed = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in ("CPU", "GPU")}
    fixed = cluster.kind == "started"  # nobody adds nodes to it
    group = placement_group(bundles)
    try:
        if not (fixed and needed["GPU"] > cluster.gpus) and await asyncio.to_thread(group.wait, PLACEMENT_SECONDS):
            return group
    except BaseException:
        remove_placement_group(group)
        raise
    remove_placement_group(group)
    raise RunnerError(
        f"the Ray cluster at {cluster.address} has no room for the plan, which needs {needed['CPU']:g} CPUs and "
        f"{needed['GPU']:g} GPUs in {len(bundles)} processes; it has {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs "
        "in all; stop what else runs on it, or lower `resources` in the graph"
    )
