"""Group commits: one transaction for what waits, one fault for one write, and heartbeats of its own."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import OperationalError

from omni.server.jobs import StoreError
from omni.server.tables import connect
from omni.server.writer import Writer

WAIT_SECONDS = 30


class Database:
    """A writer over a file, and how often it has committed."""

    def __init__(self, path: Path) -> None:
        self.engine, self._reading = connect(f"sqlite:///{path}")
        self.writer = Writer(self.engine, retry_seconds=5.0)
        self.num_commits = 0
        event.listen(self.engine, "commit", self._count)

    def _count(self, connection: object) -> None:
        self.num_commits += 1

    def close(self) -> None:
        self.writer.close()
        self.engine.dispose()
        self._reading.dispose()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(tmp_path / "a.db")
    yield database
    database.close()


def answer(connection: Connection) -> int:
    return int(connection.execute(text("SELECT 42")).scalar_one())


async def test_what_waits_is_one_transaction(database: Database) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(connection: Connection) -> bool:
        begun.set()
        return go_on.wait(WAIT_SECONDS)

    first = asyncio.ensure_future(database.writer.write(hold))
    await asyncio.to_thread(begun.wait, WAIT_SECONDS)
    others = [asyncio.ensure_future(database.writer.write(answer)) for _ in range(50)]
    await asyncio.sleep(0)
    go_on.set()
    assert await first is True
    assert await asyncio.gather(*others) == [42] * 50
    assert database.num_commits == 2


async def test_one_fault_is_one_fault(database: Database) -> None:
    def fault(connection: Connection) -> None:
        raise KeyError("mine")

    def wrong(connection: Connection) -> None:
        connection.execute(text("SELECT * FROM nowhere"))

    await database.writer.write(lambda connection: connection.execute(text("CREATE TABLE t (n INTEGER)")))
    count = text("INSERT INTO t VALUES (1)")
    work = [lambda connection: connection.execute(count).rowcount, fault, wrong, answer]
    outcomes = await asyncio.gather(*(database.writer.write(each) for each in work), return_exceptions=True)
    assert outcomes[0] == 1
    assert isinstance(outcomes[1], KeyError)
    assert isinstance(outcomes[2], StoreError)
    assert str(outcomes[2]) == "the job store cannot be written: no such table: nowhere"
    assert outcomes[3] == 42
    total = await database.writer.write(lambda c: c.execute(text("SELECT count(*) FROM t")).scalar())
    assert total == 1  # the group that failed has left nothing


async def test_a_busy_database_is_waited_for(database: Database, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    write = asyncio.ensure_future(database.writer.write(answer))
    done, _ = await asyncio.wait([write], timeout=0.1)
    assert not done
    other.execute("ROLLBACK")
    assert await asyncio.wait_for(write, WAIT_SECONDS) == 42
    other.close()


async def test_heartbeats_do_not_need_the_event_loop(database: Database) -> None:
    beaten = threading.Event()
    database.writer.set_heartbeat(lambda connection: beaten.set(), 0.01)
    assert beaten.wait(WAIT_SECONDS)  # the loop is blocked here
    database.writer.set_heartbeat(None, 0.0)
    assert await database.writer.write(answer) == 42


async def test_heartbeats_go_on_while_a_write_is_tried_again(database: Database) -> None:
    beaten = threading.Event()
    database.writer.set_heartbeat(lambda connection: beaten.set(), 0.001)

    def refuse(connection: Connection) -> None:
        if not beaten.is_set():
            raise OperationalError("", None, sqlite3.OperationalError("away"))

    await database.writer.write(answer)
    beaten.clear()
    await asyncio.wait_for(database.writer.write(refuse), WAIT_SECONDS)
    database.writer.set_heartbeat(None, 0.0)


async def test_a_faulty_heartbeat_ends_nothing(database: Database) -> None:
    beaten = threading.Event()

    def fault(connection: Connection) -> None:
        beaten.set()
        raise OSError("no luck")

    database.writer.set_heartbeat(fault, 0.01)
    assert await asyncio.to_thread(beaten.wait, WAIT_SECONDS)
    assert await database.writer.write(answer) == 42
    database.writer.set_heartbeat(None, 0.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_nothing_waits_for_a_thread_that_has_ended(database: Database) -> None:
    def end(connection: Connection) -> None:
        raise SystemExit

    writes = [asyncio.ensure_future(database.writer.write(work)) for work in (end, answer)]
    for write in writes:
        with pytest.raises(StoreError, match="cannot be written any more, start the server anew"):
            await asyncio.wait_for(write, WAIT_SECONDS)
    with pytest.raises(StoreError, match="cannot be written any more"):
        await database.writer.write(answer)
    assert database.writer.fault


async def test_a_write_has_a_deadline(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has not begun by then is not done later."""
    begun, go_on, done = threading.Event(), threading.Event(), []

    def hold(connection: Connection) -> bool:
        begun.set()
        return go_on.wait(WAIT_SECONDS)

    first = asyncio.ensure_future(database.writer.write(hold))
    await asyncio.to_thread(begun.wait, WAIT_SECONDS)
    monkeypatch.setattr("omni.server.writer.GRACE_SECONDS", 0.01 - 5.0)
    with pytest.raises(StoreError, match="has not answered for"):
        await database.writer.write(lambda connection: done.append(1))
    go_on.set()
    monkeypatch.undo()
    assert await asyncio.wait_for(first, WAIT_SECONDS)
    assert await database.writer.write(answer) == 42
    assert done == []


async def test_a_closed_writer_says_so(database: Database) -> None:
    waiting = asyncio.ensure_future(database.writer.write(answer))
    await asyncio.sleep(0)
    database.writer.close()
    assert await waiting == 42
    with pytest.raises(StoreError, match="the job store is closed"):
        await database.writer.write(answer)
