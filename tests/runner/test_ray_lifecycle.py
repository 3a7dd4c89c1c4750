"""Whole programs with Ray: nothing is left running after them, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from omni.runner.ray_environment import _temp_dir
from omni.runner.reaper import writers

WAIT_SECONDS = 60
LEFT_SECONDS = 30
"""After this nothing may be left of a program that was killed."""

PROGRAM = """
import asyncio, signal, sys
from omni.api import AsyncOmni
from omni.testing import doubles

STAGE = {"kind": "double", "isolation": "actor", "hold": "hold" in sys.argv, "deaf": "hold" in sys.argv}

async def run(omni):
    async for event in omni.stream(prompt="x", seed=1):
        print(type(event).__name__, flush=True)

async def stay(omni):
    import ray
    cpus = ray.cluster_resources()["CPU"] - sum(process.cpus for process in omni.plan.processes)
    print("staying", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    while ray.available_resources().get("CPU", 0) != cpus:
        await asyncio.sleep(0.1)
    print("guests are gone", flush=True)
    await run(omni)

async def main():
    main_task = asyncio.current_task()
    if "handle" in sys.argv:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main_task.cancel)
    for _ in range(1 + ("twice" in sys.argv)):
        async with AsyncOmni({"stages": {"a": STAGE}}, runner="ray") as omni:
            print("address", omni._runner.cluster.address, flush=True)
            await run(omni)
            if "stay" in sys.argv:
                await stay(omni)

with doubles():
    asyncio.run(main())
"""


@contextmanager
def program(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A program with one actor, in a session of its own; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMNI_OBJECT_STORE_BYTES": "300MB", **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(stream: IO[str] | None, start: str) -> str:
    assert stream is not None
    for line in stream:
        if line.startswith(start):
            return line.strip()
    raise AssertionError(f"the program ended before it printed '{start}'")


def left_of(pid: int) -> list[int]:
    """Processes of the clusters that a program has started."""
    return writers(os.path.join(_temp_dir(), f"session_*_{pid}"))


def reapers_of(pid: int) -> list[str]:
    lines = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "reaper.py" in line and f"session_*_{pid}" in line:
            lines.append(line)
    return lines


def wait_until_nothing_is_left(pid: int) -> None:
    deadline = time.monotonic() + LEFT_SECONDS
    while left_of(pid) or reapers_of(pid):
        assert time.monotonic() < deadline, (left_of(pid), reapers_of(pid))
        time.sleep(0.1)


def test_a_killed_program_leaves_nothing() -> None:
    with program("hold") as process:
        read_until(process.stdout, "StageStarted")
        assert len(left_of(process.pid)) >= 5
        process.kill()
        wait_until_nothing_is_left(process.pid)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_program_stops_everything_before_it_exits(name: str) -> None:
    with program("hold", "handle") as process:
        read_until(process.stdout, "StageStarted")
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode != 0
        assert ("KeyboardInterrupt" if name == "SIGINT" else "CancelledError") in errors
        assert not left_of(process.pid)
        assert not reapers_of(process.pid)


def test_a_program_starts_ray_twice_behind_a_token_and_leaves_the_home_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with program("twice", HOME=str(tmp_path)) as process:
        output, errors = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 0, errors
        assert output.count("Done") == 2
        assert not left_of(process.pid)
    assert not list(tmp_path.rglob("*token*"))


def test_an_interrupt_while_ray_starts() -> None:
    with program("handle") as process:
        deadline = time.monotonic() + WAIT_SECONDS
        while not left_of(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_SECONDS)
        wait_until_nothing_is_left(process.pid)


def test_programs_join_a_cluster_and_leave_it_as_it_was() -> None:
    with program("stay") as host:
        address = read_until(host.stdout, "address").split()[1]
        read_until(host.stdout, "staying")
        with program(RAY_ADDRESS=address) as guest:
            output, errors = guest.communicate(timeout=WAIT_SECONDS)
            assert guest.returncode == 0, errors
            assert output.splitlines()[0] == f"address {address}"
            assert output.splitlines()[-1] == "Done"
            assert not left_of(guest.pid)
            assert not reapers_of(guest.pid)
        with program("hold", RAY_ADDRESS=address) as guest:
            read_until(guest.stdout, "StageStarted")
            guest.kill()
        output, errors = host.communicate("go on\n", timeout=WAIT_SECONDS)
        assert host.returncode == 0, errors
        assert output.startswith("guests are gone")
        assert output.splitlines()[-1] == "Done"
        assert not left_of(host.pid)
