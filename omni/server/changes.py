"""Parts of the job store's transactions: events with their numbers, the ways back into the queue, and rows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, case, insert, select, update
from sqlalchemy.sql.elements import ColumnElement

from omni.server.jobs import FINAL_STATES, EventType, Job, JobError, JobEvent, JobState, OutputFile
from omni.server.tables import EVENTS, JOBS

_ENCODE = msgspec.json.Encoder(enc_hook=repr).encode
_OUTPUTS = msgspec.json.Decoder(tuple[OutputFile, ...])
_ERROR = msgspec.json.Decoder(JobError)
DICT = msgspec.json.Decoder(dict[str, Any])


class Draft(NamedTuple):
    """An event without its number."""

    type: EventType
    data: dict[str, Any]


class Fence(NamedTuple):
    """The right to write to a running job: holds while this server runs this attempt."""

    job_id: str
    owner: str
    attempt: int

    @property
    def conditions(self) -> tuple[ColumnElement[bool], ...]:
        """For the WHERE of an update."""
        return (JOBS.c.state == "running", JOBS.c.owner == self.owner, JOBS.c.attempt == self.attempt)


def append(
    connection: Connection,
    job_id: str,
    drafts: Sequence[Draft],
    conditions: Iterable[ColumnElement[bool]],
    values: dict[str, Any] | None = None,
    size: int = 0,
) -> list[JobEvent] | None:
    """Number and add events, if the job meets the conditions; set `values` of it along, and add `size` to its bytes."""
    now = time.time()
    texts = [as_text(draft.data) for draft in drafts]
    size += sum(map(len, texts))
    statement = (
        update(JOBS)
        .where(JOBS.c.id == job_id, *conditions)
        .values(last_sequence=JOBS.c.last_sequence + len(drafts), bytes=JOBS.c.bytes + size, **(values or {}))
        .returning(JOBS.c.last_sequence)
    )
    last = connection.execute(statement).scalar()
    if last is None:
        return None
    events = [
        JobEvent(job_id=job_id, sequence=number, type=draft.type, data=draft.data, at=now)
        for number, draft in enumerate(drafts, start=last - len(drafts) + 1)
    ]
    rows = [
        {"job_id": job_id, "sequence": event.sequence, "type": event.type, "data": data, "at": now}
        for event, data in zip(events, texts, strict=True)
    ]
    if rows:
        connection.execute(insert(EVENTS), rows)
    return events


def requeue(connection: Connection, fence: Fence, reason: str, deaths: int) -> list[JobEvent] | None:
    """Put a running job back into the queue with the next attempt; `deaths` servers died of it this time.

    A job that someone has aborted ends here instead: whoever asked was told that it would.
    """
    if (events := end_aborted(connection, fence)) is not None:
        return events
    values = {
        "state": "queued",
        "owner": None,
        "attempt": fence.attempt + 1,
        "deaths": JOBS.c.deaths + deaths,
        "progress": 0.0,
    }
    draft = Draft("restarted", {"attempt": fence.attempt + 1, "reason": reason})
    conditions = (*fence.conditions, JOBS.c.abort_reason.is_(None))
    return append(connection, fence.job_id, [draft], conditions, values) or end_aborted(connection, fence)


def end_aborted(connection: Connection, fence: Fence) -> list[JobEvent] | None:
    """End a running job whose abort was asked for; None when it was not."""
    wanted = select(JOBS.c.abort_reason).where(JOBS.c.id == fence.job_id, *fence.conditions)
    reason = connection.execute(wanted).scalar()
    if reason is None:
        return None
    draft = Draft("aborted", {"reason": reason})
    return append(connection, fence.job_id, [draft], fence.conditions, final_values("aborted", time.time()))


def poison(connection: Connection, fence: Fence, num_deaths: int) -> list[JobEvent] | None:
    """Fail a running job that took its server along again and again."""
    error = JobError(
        cause=f"the server died {num_deaths} times while this job ran",
        remedy="look into the server's log for what ended it (often: out of memory); ask for less",
        code="poisoned",
    )
    values = final_values("failed", time.time()) | {"error": as_text(error), "deaths": num_deaths}
    return append(connection, fence.job_id, [Draft("failed", {"error": to_json(error)})], fence.conditions, values)


def to_json(value: Any) -> Any:
    """Plain JSON values of a struct."""
    return msgspec.to_builtins(value, enc_hook=repr)


def final_values(state: JobState, now: float) -> dict[str, Any]:
    """What changes in a job's row with its end."""
    assert state in FINAL_STATES
    due = case((JOBS.c.webhook.is_not(None), now), else_=None)
    return {"state": state, "owner": None, "finished_at": now, "webhook_at": due}


def as_text(value: Any) -> str:
    """JSON."""
    return _ENCODE(value).decode()


def to_row(job: Job) -> dict[str, Any]:
    """A job as columns."""
    row = msgspec.structs.asdict(job)
    row["error"] = None if job.error is None else as_text(job.error)
    return row | {name: as_text(row[name]) for name in ("inputs", "outputs", "meta")}


def to_job(row: Any) -> Job:
    """A row as a job."""
    values = {name: getattr(row, name) for name in Job.__struct_fields__}
    values["inputs"], values["meta"] = DICT.decode(values["inputs"]), DICT.decode(values["meta"])
    values["outputs"] = _OUTPUTS.decode(values["outputs"])
    values["error"] = None if values["error"] is None else _ERROR.decode(values["error"])
    return Job(**values)
