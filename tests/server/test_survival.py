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


def test_no_job_is_lost_and_none_done_twice(start_server: StartServer, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    prompts = [f"slow {gate}" if n % 8 == 0 else f"quick {n}" for n in range(NUM_JOBS)]
    assert Counter(prompt.split()[0] for prompt in prompts) == {"slow": NUM_SLOW, "quick": NUM_JOBS - NUM_SLOW}
    seen: dict[str, list[dict[str, Any]]] = {}
    done: set[str] = set()

    first = start_server()
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
    second = start_server()
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
