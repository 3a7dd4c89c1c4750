"""Jobs survive their server: real processes over one store, killed with SIGKILL."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tests.server.conftest import StartServer

NUM_JOBS = 50
NUM_SLOW = 7


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["sequence"] for event in events]


def test_no_job_is_lost_and_none_done_twice(store_url: str, start_server: StartServer, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    prompts = [f"slow {gate}" if n % 8 == 0 else f"quick {n}" for n in range(NUM_JOBS)]
    assert Counter(prompt.split()[0] for prompt in prompts) == {"slow": NUM_SLOW, "quick": NUM_JOBS - NUM_SLOW}
    seen: dict[str, list[dict[str, Any]]] = {}
    done: set[str] = set()

    first = start_server(store_url)
    first.tell(*(f"submit {prompt}" for prompt in prompts))
    for line in first.lines():
        if "job" in line:
            seen.setdefault(line["job"], [])
        if "event" in line:
            event = line["event"]
            seen.setdefault(event["job_id"], []).append(event)
            if event["type"] == "done":
                done.add(event["job_id"])
        running = [events for events in seen.values() if events and events[-1]["type"] == "stage_started"]
        if len(seen) == NUM_JOBS and len(running) == 4:  # all slots are held by slow jobs
            break
    first.kill()
    assert 0 < len(done) < NUM_JOBS
    for line in first.lines():  # what clients had got when it died
        if "event" in line:
            seen[line["event"]["job_id"]].append(line["event"])

    gate.touch()
    second = start_server(store_url)
    second.tell(*(f"follow {job_id} {numbers(events)[-1] if events else 0}" for job_id, events in seen.items()))
    open_jobs = {job_id for job_id, events in seen.items() if not events or events[-1]["type"] != "done"}
    for line in second.lines():
        if "event" in line:
            event = line["event"]
            seen[event["job_id"]].append(event)
            if event["type"] == "done":
                open_jobs.remove(event["job_id"])
        if not open_jobs:
            break

    assert len(seen) == NUM_JOBS
    for events in seen.values():
        assert numbers(events) == list(range(1, len(events) + 1))
        assert [event["type"] for event in events].count("done") == 1
        assert events[-1]["type"] == "done"
    restarted = [events for events in seen.values() if any(event["type"] == "restarted" for event in events)]
    assert len(restarted) == 4


def test_a_job_that_kills_its_server_fails_in_the_end(start_server: StartServer, tmp_path: Path) -> None:
    """Those that run beside it go on."""
    gate = tmp_path / "gate"
    server = start_server()
    server.tell(*[f"submit slow {gate}"] * 3, f"submit kill {tmp_path / 'never'}")
    jobs = [line["job"] for line in server.lines() if "job" in line]  # until it is dead
    killer = jobs[-1]
    gate.touch()
    final: dict[str, dict[str, Any]] = {}
    num_deaths = 1
    while killer not in final:
        server = start_server()
        server.tell(*(f"follow {job_id} 0" for job_id in jobs))
        for line in server.lines():
            if "event" in line and line["event"]["type"] in ("done", "failed"):
                final[line["event"]["job_id"]] = line["event"]
            if len(final) == len(jobs):
                break
        num_deaths += killer not in final
    error = final[killer]["data"]["error"]
    assert (error["code"], error["cause"]) == ("poisoned", "the server died 3 times while this job ran")
    assert [final[job_id]["type"] for job_id in jobs] == ["done", "done", "done", "failed"]
    assert num_deaths == 3
