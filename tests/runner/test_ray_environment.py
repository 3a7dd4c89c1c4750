"""The checks before Ray starts, and what they say."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omni.errors import RunnerError, UsageError
from omni.runner import ray_environment
from omni.runner.ray_environment import Cluster, _check_address, _give_token, _join, _start, store_bytes
from omni.sizes import GIB


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose memory and free shared memory the test sets, in bytes."""
    fake = SimpleNamespace(memory=100 * GIB, shared=100 * GIB)
    monkeypatch.setattr(ray_environment, "count_memory_bytes", lambda: fake.memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=fake.shared))
    monkeypatch.delenv("OMNI_OBJECT_STORE_BYTES", raising=False)
    return fake


def test_the_store_takes_a_part_of_memory_and_what_shared_memory_holds(machine: SimpleNamespace) -> None:
    assert store_bytes() == 30 * GIB
    machine.shared = 10 * GIB
    assert store_bytes() == 9 * GIB


def test_the_store_can_be_set(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_OBJECT_STORE_BYTES", "2GiB")
    assert store_bytes() == 2 * GIB
    assert store_bytes(3 * GIB) == 3 * GIB
    monkeypatch.setenv("OMNI_OBJECT_STORE_BYTES", "many")
    with pytest.raises(UsageError, match="'many' is not a size"):
        store_bytes()


def test_too_little_shared_memory_is_refused_with_the_remedy(machine: SimpleNamespace) -> None:
    machine.shared = 64 * 1024**2
    with pytest.raises(RunnerError) as caught:
        store_bytes()
    assert str(caught.value) == (
        "/dev/shm has 64.0 MiB free, too little for an object store of 256.0 MiB; start the container with a "
        "larger one (docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory at /dev/shm), or set "
        "OMNI_OBJECT_STORE_BYTES"
    )
    machine.shared = 4 * GIB
    with pytest.raises(RunnerError, match=r"/dev/shm has 4.0 GiB free, too little for an object store of 5.0 GiB"):
        store_bytes(5 * GIB)


@pytest.mark.parametrize(("needed", "cpus"), [(1.0, 2), (2.5, 3)])
def test_a_started_cluster_has_the_cores_of_the_control_group(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, needed: float, cpus: int
) -> None:
    import ray

    given: dict[str, Any] = {}
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.95")
    monkeypatch.setattr(ray_environment, "count_cpus", lambda: 1.5)
    monkeypatch.setattr(ray_environment, "start_reaper", lambda folder: None)
    monkeypatch.setattr(ray_environment, "_connection", SimpleNamespace(reaper=None))
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    _start(needed, None)
    assert given["num_cpus"] == cpus


def test_another_address_than_the_one_in_use_is_refused() -> None:
    from ray.util import get_node_ip_address

    here = f"{get_node_ip_address()}:6379"
    for address in (None, "", "auto", "local", here, "127.0.0.1:6379", "localhost:6379"):
        _check_address(address, here)
    for address in (f"{get_node_ip_address()}:6380", "192.0.2.1:6379", "ray://192.0.2.1:10001"):
        with pytest.raises(RunnerError, match=f"already uses the Ray cluster at {here}.* leave the address {address}"):
            _check_address(address, here)


def test_an_address_where_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RunnerError, match=rf"no Ray cluster answers at {address}: .*refused; give --address or"):
            _join(address)


def test_the_client_protocol_is_refused() -> None:
    with pytest.raises(RunnerError, match="at ray://head:10001: Ray's client protocol is not supported; give --addr"):
        _join("ray://head:10001")


def test_a_token_is_made_only_where_the_user_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    _give_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    _give_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_cluster_tells_its_effective_values() -> None:
    cluster = Cluster(address="10.0.0.1:6379", kind="joined", cpus=64, gpus=8, object_store_bytes=30 * GIB)
    assert str(cluster) == "Ray at 10.0.0.1:6379 (joined): 64 CPUs, 8 GPUs, object store 30.0 GiB"
