"""One thread writes: what waits when it is free becomes one transaction, and the server's heartbeat goes with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from omni.errors import one_line
from omni.server.jobs import StoreError
from omni.server.tables import plain

T = TypeVar("T")
Work = Callable[[Connection], T]
"""Statements of one transaction; may be run again when the transaction fails, so it changes nothing else."""

MAX_BATCH = 256
RETRY_SECONDS = 0.05
MAX_RETRY_SECONDS = 1.0
GRACE_SECONDS = 30.0
"""What a write may take beyond the time for which it is tried again."""
CLOSE_SECONDS = 60.0
PASSING = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_FULL", "SQLITE_CANTOPEN")
log = logging.getLogger(__name__)


class _Write(msgspec.Struct):
    work: Callable[[Connection], Any]
    loop: asyncio.AbstractEventLoop | None = None
    future: asyncio.Future[Any] | None = None
    result: Any = None
    given_up: bool = False
    """Whether nobody waits for it any longer: it is not begun."""
    error: BaseException | None = None

    def resolve(self) -> None:
        if self.future is not None and not self.future.done():
            if self.error is None:
                self.future.set_result(self.result)
            else:
                self.future.set_exception(self.error)


class Writer:
    """Commits in groups. `beat` runs every `heartbeat_seconds`, whatever the event loop does."""

    def __init__(self, engine: Engine, retry_seconds: float) -> None:
        self._engine = engine
        self._retry_seconds = retry_seconds
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._writes: list[_Write] = []
        """What the thread is about to commit."""
        self._beat: Work[None] | None = None
        self._heartbeat_seconds = 0.0
        self._beaten_at = 0.0
        self.alive_at = 0.0
        """When the last heartbeat was stored (`time.monotonic`)."""
        self._closed = False
        self.fault = ""
        """What ended the thread, other than `close`; empty while all is well."""
        self._thread = threading.Thread(target=self._run, name="omni-store", daemon=True)
        self._thread.start()

    async def write(self, work: Work[T]) -> T:
        """Do `work` in a transaction; returns when it is committed. Raises StoreError.

        That it took too long is a StoreError, too: what had not begun by then is not done, what had may be.
        """
        if self._closed or self.fault:
            raise StoreError(self.fault or "the job store is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        write = _Write(work, loop, future)
        self._queue.put(write)
        seconds = self._retry_seconds + GRACE_SECONDS
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError as error:
            write.given_up = True
            text = f"the job store has not answered for {seconds:g} s; see that its database works"
            raise StoreError(text) from error

    def set_heartbeat(self, beat: Work[None] | None, seconds: float) -> None:
        """Begin with heartbeats, or end them."""
        self._heartbeat_seconds, self._beaten_at = seconds, time.monotonic()
        self.alive_at = self._beaten_at
        self._beat = beat
        self._queue.put(_Write(lambda connection: None))  # the thread may wait without a deadline

    def close(self) -> None:
        """Write what waits, and end. Blocks."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join(CLOSE_SECONDS)

    # in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.fault = f"the job store cannot be written any more, start the server anew: {one_line(error)}"
            log.exception("the thread that writes to the job store has ended")
            self._refuse()
            raise

    def _refuse(self) -> None:
        """Tell what waits that it waits in vain."""
        waiting: list[_Write | None] = [*self._writes]
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(self._queue.get_nowait())
        writes = [write for write in waiting if write is not None]
        for write in writes:
            write.error = StoreError(self.fault)
        self._tell(writes)

    def _work(self) -> None:
        while True:
            batch = self._take()
            closing = None in batch
            self._writes = [write for write in batch if write is not None]
            if self._writes:
                self._commit(self._writes)
                self._tell(self._writes)
                self._writes = []
            if closing:
                return
            self._beat_if_due()

    def _take(self) -> list[_Write | None]:
        """What waits; an empty list when a heartbeat is due first."""
        due = self._beaten_at + self._heartbeat_seconds - time.monotonic() if self._beat else None
        batch: list[_Write | None] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._queue.get(timeout=None if due is None else max(due, 0.001)))
            while batch[-1] is not None and len(batch) < MAX_BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _commit(self, writes: list[_Write]) -> None:
        """All in one transaction; when that fails, each in its own, so that one fault stays one fault."""
        try:
            self._transact(writes)
        except Exception:
            deadline = time.monotonic() + self._retry_seconds
            for write in writes:
                self._commit_one(write, deadline)

    def _commit_one(self, write: _Write, deadline: float) -> None:
        pause = RETRY_SECONDS
        while True:
            try:
                self._transact([write])
                return
            except SQLAlchemyError as error:
                if not _passes(error) or time.monotonic() + pause > deadline:
                    write.error = StoreError(f"the job store cannot be written: {plain(error)}")
                    return
            except Exception as error:
                write.error = error
                return
            time.sleep(pause)
            self._beat_if_due()  # first of all: others may have come back to the database, too, and look who lives
            pause = min(2 * pause, MAX_RETRY_SECONDS)

    def _transact(self, writes: list[_Write]) -> None:
        with self._engine.begin() as connection:
            for write in writes:
                if write.given_up:
                    continue
                write.result = write.work(connection)

    def _tell(self, writes: list[_Write]) -> None:
        for loop in {write.loop for write in writes if write.loop is not None}:
            mine = [write for write in writes if write.loop is loop]
            try:
                loop.call_soon_threadsafe(_resolve, mine)
            except RuntimeError:
                log.debug("the event loop was closed before %d writes were told", len(mine))

    def _beat_if_due(self) -> None:
        beat = self._beat
        if beat is None or time.monotonic() < self._beaten_at + self._heartbeat_seconds:
            return
        try:
            with self._engine.begin() as connection:
                beat(connection)
            self.alive_at = time.monotonic()
        except SQLAlchemyError as error:
            log.warning("heartbeat failed: %s", plain(error))
        except Exception:  # the next one comes; without it the thread would end, and all writes with it
            log.exception("heartbeat failed")
        self._beaten_at = time.monotonic()


def _resolve(writes: list[_Write]) -> None:
    for write in writes:
        write.resolve()


def _passes(error: SQLAlchemyError) -> bool:
    """Whether the fault is the database's state, and not the statement's."""
    if not isinstance(error, (OperationalError, InterfaceError)):
        return False
    name = getattr(error.orig, "sqlite_errorname", None)  # SQLite calls wrong statements operational, too
    return name is None or name.startswith(PASSING)
