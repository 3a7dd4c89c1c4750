"""The one place where Ray is started or joined, and where its environment is set before.

Runners of one program share the connection: the first `connect` makes it, the last `disconnect` ends it. A Ray that
the program has initialised by itself is used as it is and left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from omni.errors import RunnerError
from omni.hardware import DEVICE_ORDER, count_cpus, count_memory_bytes
from omni.runner.reaper import start_reaper, stop_reaper
from omni.sizes import GIB, format_bytes, parse_bytes

T = TypeVar("T")
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
SHARED_MEMORY = "/dev/shm"
STORE_VARIABLE = "OMNI_OBJECT_STORE_BYTES"
STORE_PART_OF_MEMORY = 0.3
STORE_PART_OF_SHARED_MEMORY = 0.9
MIN_STORE_BYTES = GIB // 4
SPARE_BYTES = 4 * GIB
"""Ray ends a stage when the host has less memory left than this, or than 5 %, whichever is less."""
START_SECONDS = 180.0
SIGACTION_BYTES = 1024
"""More than the C library's struct sigaction takes on any platform."""
PROBE_SECONDS = 5.0
STOP_SECONDS = 4.0
"""How long the last `disconnect` waits; after that Ray goes on stopping in the background."""

ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # 15 by default: stages would lose their cores to any other process
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a stage planned for the CPU sees no GPU
    "RAY_DEDUP_LOGS": "1",
    "RAY_COLOR_PREFIX": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "CUDA_DEVICE_ORDER": DEVICE_ORDER,
}
"""Set before Ray starts, where the user has not set them. A joined cluster has its own."""


class Cluster(msgspec.Struct, frozen=True):
    """The cluster in use, with its effective values."""

    address: str
    kind: Literal["started", "joined", "shared"]
    """Started here, joined by its address, or found initialised in this program."""
    cpus: float
    gpus: float
    object_store_bytes: int

    def __str__(self) -> str:
        store = format_bytes(self.object_store_bytes)
        return f"Ray at {self.address} ({self.kind}): {self.cpus:g} CPUs, {self.gpus:g} GPUs, object store {store}"


async def connect(address: str | None, cpus: float, object_store_bytes: int | None = None) -> Cluster:
    """Join the cluster at `address` or RAY_ADDRESS, or start one on this machine with at least `cpus` CPUs.

    A program has one cluster at a time: where Ray is initialised already, an `address` must be that of its cluster.

    `object_store_bytes` sets the size of a started cluster's store, before the variable OMNI_OBJECT_STORE_BYTES.
    Follow each call that returns with one `disconnect`. Raises RunnerError.
    """
    work = _ray_thread().submit(lambda: _connect(address, cpus, object_store_bytes))
    try:
        async with asyncio.timeout(START_SECONDS):
            return await asyncio.shield(asyncio.wrap_future(work))
    except (TimeoutError, asyncio.CancelledError) as error:
        work.add_done_callback(_disconnect_unwanted)
        if isinstance(error, TimeoutError):
            raise RunnerError(f"Ray did not start within {START_SECONDS:g} s; its logs are in {_temp_dir()}") from error
        raise


async def disconnect() -> None:
    """Give up one use of the connection; the last one stops a cluster that was started here."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_SECONDS):
            await asyncio.shield(asyncio.wrap_future(_ray_thread().submit(_disconnect)))


def _disconnect_unwanted(work: Future[Cluster]) -> None:
    if work.exception() is None:
        _ray_thread().submit(_disconnect)


# The Ray thread -------------------------------------------------------------------------------------------------


class _RayThread:
    """The thread that starts and stops Ray, one call after the other. It lives as long as the program.

    The kernel kills Ray's servers when the thread that started them ends, so no pool's thread would do. Off the main
    thread Ray leaves the program's signal handlers alone, and the event loop goes on meanwhile.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="omni-ray", daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future

    def _serve(self) -> None:
        while True:
            function, future = self._calls.get()
            try:
                future.set_result(function())
            except BaseException as error:  # handed over to the caller, who raises it again
                future.set_exception(error)


class _Connection:
    """What this program holds of Ray; touched by the Ray thread only."""

    num_users = 0
    is_ours = False
    reaper: subprocess.Popen[bytes] | None = None


_connection = _Connection()
_threads: list[_RayThread] = []
_threads_lock = threading.Lock()


def _ray_thread() -> _RayThread:
    with _threads_lock:
        if not _threads:
            _threads.append(_RayThread())
        return _threads[0]


def _connect(address: str | None, cpus: float, object_store_bytes: int | None) -> Cluster:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        _check_address(address, ray.get_runtime_context().gcs_address)
    else:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        _connection.is_ours = True
        try:
            with _sigterm_kept():
                _start(cpus, object_store_bytes) if address == "local" else _join(address)
        except BaseException:
            _shut_down()
            raise
    _connection.num_users += 1
    kind: Literal["started", "joined"] = "started" if _connection.reaper is not None else "joined"
    resources = ray.cluster_resources()
    return Cluster(
        address=ray.get_runtime_context().gcs_address,
        kind=kind if _connection.is_ours else "shared",
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        object_store_bytes=int(resources.get("object_store_memory", 0)),
    )


def _disconnect() -> None:
    _connection.num_users -= 1
    if _connection.num_users == 0 and _connection.is_ours:
        _shut_down()


def _shut_down() -> None:
    import ray

    ray.shutdown()
    if _connection.reaper is not None:
        stop_reaper(_connection.reaper)
    _connection.reaper, _connection.is_ours = None, False


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray's core takes SIGTERM over and ends the program on the spot; give it back to the program's own handler.

    By the C library, since Python's signal module works on the main thread only.
    """
    libc, saved = ctypes.CDLL(None), ctypes.create_string_buffer(SIGACTION_BYTES)
    libc.sigaction(int(signal.SIGTERM), None, saved)
    try:
        yield
    finally:
        libc.sigaction(int(signal.SIGTERM), saved, None)


# Starting and joining -------------------------------------------------------------------------------------------


def _start(cpus: float, object_store_bytes: int | None) -> None:
    import ray

    store = store_bytes(object_store_bytes)
    threshold = max(0.95, 1 - SPARE_BYTES / count_memory_bytes())
    os.environ.setdefault("RAY_memory_usage_threshold", f"{threshold:.4f}")
    _give_token()
    _connection.reaper = start_reaper(_temp_dir())
    try:
        ray.init(
            address="local",
            num_cpus=math.ceil(max(count_cpus(), cpus)),
            object_store_memory=store,
            include_dashboard=False,
            _temp_dir=_temp_dir(),
            **QUIET,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RunnerError(f"cannot start Ray: {error}; its logs are in {_temp_dir()}") from error


def _join(address: str) -> None:
    import ray

    remedy = "give --address or RAY_ADDRESS the host:port that `ray start` printed, on a node of that cluster"
    if "://" in address:
        raise RunnerError(f"cannot join the Ray cluster at {address}: Ray's client protocol is not supported; {remedy}")
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
        except OSError as error:
            raise RunnerError(f"no Ray cluster answers at {address}: {error}; {remedy}") from error
    try:
        ray.init(address=address, **QUIET)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RunnerError(f"cannot join the Ray cluster at {address}: {error}; {remedy}") from error


def _check_address(address: str | None, connected: str) -> None:
    """Raise RunnerError when `address` is that of another cluster than the one in use."""
    if address in (None, "", "auto", "local", connected):
        return
    host, _, port = str(address).rpartition(":")
    connected_host, _, connected_port = connected.rpartition(":")
    if port != connected_port or not _ips(host) & _ips(connected_host):
        raise RunnerError(
            f"this program already uses the Ray cluster at {connected}, and a program has one at a time; leave the "
            f"address {address} out, or stop the other runners (or call ray.shutdown()) first"
        )


def _ips(host: str) -> set[str]:
    """The addresses of a host; those of this node too when it is this machine under a loopback name."""
    from ray.util import get_node_ip_address

    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return {host}
    return found | {get_node_ip_address()} if found & {"127.0.0.1", "::1"} else found


def _give_token() -> None:
    """A secret of its own for what this program starts, where the user has none: Ray's ports are open to the network.

    Without it Ray would make one and write it into the home folder. It stays for good, since Ray remembers it too.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(name in os.environ for name in names) and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _temp_dir() -> str:
    """Where Ray keeps its sessions, by its own rule."""
    return os.path.join(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")


# Memory ---------------------------------------------------------------------------------------------------------


def store_bytes(wanted: int | None = None) -> int:
    """Size of the object store to ask for: `wanted`, else OMNI_OBJECT_STORE_BYTES, else what the machine can spare.

    Raises RunnerError when shared memory is too small for it; Ray would silently move the store to disk.
    """
    if wanted is None and STORE_VARIABLE in os.environ:
        wanted = parse_bytes(os.environ[STORE_VARIABLE])
    if not os.path.isdir(SHARED_MEMORY):  # not Linux: Ray keeps the store elsewhere
        return wanted or int(count_memory_bytes() * STORE_PART_OF_MEMORY)
    free = shutil.disk_usage(SHARED_MEMORY).free
    room = int(free * STORE_PART_OF_SHARED_MEMORY)
    size = min(int(count_memory_bytes() * STORE_PART_OF_MEMORY), room) if wanted is None else wanted
    needed = MIN_STORE_BYTES if wanted is None else wanted
    if room < needed:
        raise RunnerError(
            f"{SHARED_MEMORY} has {format_bytes(free)} free, too little for an object store of {format_bytes(needed)}; "
            "start the container with a larger one (docker run --shm-size=8g; in Kubernetes an emptyDir of medium "
            f"Memory at {SHARED_MEMORY}), or set {STORE_VARIABLE}"
        )
    return size
