"""`omni bench abort` on a server of this process, whose stage takes steps without a model."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omni.api import AsyncOmni
from omni.bench import abort, server_process
from omni.bench.serve_api import Api
from omni.bench.server_process import Server
from omni.cli.main import build_parser
from omni.errors import OmniError, UsageError
from omni.server.app import build_app
from omni.server.files import FileStore
from omni.server.hosting import Hosting, bind
from omni.server.service import Service
from omni.server.service_settings import ServiceSettings
from omni.server.settings import ServerSettings
from omni.server.store import JobStore
from omni.testing import doubles

STEPS = 18
STEP_SECONDS = 0.03


@contextlib.contextmanager
def serving(folder: Path, stage: dict[str, Any]) -> Iterator[Server]:
    """A server of one stage, in a thread of its own."""
    bound = bind("127.0.0.1", 0)
    is_ready = threading.Event()
    hostings: list[Hosting] = []

    async def host() -> None:
        graph = AsyncOmni({"name": "work", "stages": {"work": stage}}, runner="inline")
        store = JobStore(f"sqlite:///{folder}/jobs.db")
        service = Service({"work": graph}, store, FileStore(folder / "files"), ServiceSettings(max_running=1))
        settings = ServerSettings()
        hostings.append(Hosting(service, build_app(service, settings), settings, bound, drain_seconds=0.0))
        await hostings[0].run(is_ready.set)

    with doubles():
        thread = threading.Thread(target=lambda: asyncio.run(host()))
        thread.start()
        assert is_ready.wait(60)
        try:
            yield Server("127.0.0.1", bound.getsockname()[1])
        finally:
            hostings[0].stop()
            thread.join(60)


def measured(monkeypatch: pytest.MonkeyPatch, folder: Path, stage: dict[str, Any], repeat: int = 2) -> Any:
    """The report of the bench on such a server."""
    given: list[Any] = []

    @contextlib.contextmanager
    def started(graph: str, options: list[str]) -> Iterator[Server]:
        given.extend([graph, options])
        with serving(folder, stage) as server:
            yield server

    monkeypatch.setattr(server_process, "started", started)
    texts = ["bench", "abort", "work.yaml", "--repeat", str(repeat), "--runner", "inline", "--set", "a=1"]
    report = abort.measure(build_parser().parse_args(texts))
    assert given == ["work.yaml", ["--runner", "inline", "--max-running", "1", "--set", "a=1"]]
    return report


def test_aborts_are_measured_against_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = measured(monkeypatch, tmp_path, {"kind": "double", "steps": STEPS, "step_seconds": STEP_SECONDS})
    assert report.correct
    rows = {row.name: row for row in report.sections[0].rows}
    counts = {name: row.num_runs for name, row in rows.items()}
    assert counts.pop(abort.HEALTH) >= 2, "one for each try"
    assert counts.pop(abort.HEARD) >= abort.ALONE
    assert counts == {abort.STEP: abort.ALONE, abort.DELETED: 2, abort.TOLD: 2, abort.CLOSED: 2}
    assert rows[abort.STEP].median_ms >= STEP_SECONDS * 1000 * 0.8  # heard a little late, and the next one less so
    assert all(row.min_ms > 0 for row in rows.values())
    assert report.notes[0].startswith(f"stage work: {STEPS} steps in ")
    names = [f"{way}, {words}" for way in (abort.DELETED, abort.CLOSED) for words in ("median", "longest")]
    assert [target.name for target in report.targets] == names
    longest = max(rows[abort.STEP].max_ms, rows[abort.HEARD].max_ms)
    limits = [rows[abort.STEP].median_ms + abort.MAX_ADDED_MS, longest + abort.MAX_ADDED_MS]
    assert [target.limit for target in report.targets] == pytest.approx(limits * 2)


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        ({"kind": "double", "steps": 0}, UsageError, "needs a graph with a stage that takes steps"),
        ({"kind": "double", "fail_in": "run"}, OmniError, "a request that was left alone ended in 'failed'"),
    ],
    ids=["no steps", "fails"],
)
def test_graphs_that_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: dict[str, Any], error: type[OmniError], message: str
) -> None:
    with pytest.raises(error, match=message):
        measured(monkeypatch, tmp_path, stage, repeat=1)


def test_requests_that_are_over_too_soon_end_the_bench() -> None:
    trials = abort.Trials(Server("127.0.0.1", 1), Api("chat", "work", "/", ""), {})
    with pytest.raises(OmniError, match="most requests were over before their abort; use a graph that takes longer"):
        list(trials._tries([], 2))
    seconds: list[float] = []
    assert len([seconds.append(0.1) for _ in trials._tries(seconds, 2)]) == 2


def test_nothing_to_repeat_is_refused() -> None:
    with pytest.raises(UsageError, match="--repeat must be at least 1"):
        abort.measure(build_parser().parse_args(["bench", "abort", "--repeat", "0"]))
