"""The tables of the job store, and connections to SQLite (WAL mode) and Postgres."""

from __future__ import annotations

import os
import secrets
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from omni.server.jobs import StoreError

VERSION = 2
"""Of the tables; a database of another version is refused."""
BUSY_MILLISECONDS = 30_000
"""How long SQLite waits for another process's transaction."""
STATEMENT_MILLISECONDS = 20_000
"""How long Postgres works on a statement, or waits for the next one inside a transaction."""
POSTGRES_OPTIONS = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""So that a connection whose other side is gone is noticed: seconds, but the last in milliseconds."""
SETUP_LOCK = 0x6F6D6E69
"""Postgres's advisory lock for making the tables: two servers may start at once."""

METADATA = MetaData()

JOBS = Table(
    "omni_jobs",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("graph", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("started_at", Float(53)),
    Column("finished_at", Float(53)),
    Column("inputs", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("key", Text, nullable=False),
    Column("attempt", Integer, nullable=False, default=1),
    Column("progress", Float(53), nullable=False, default=0.0),
    Column("outputs", Text, nullable=False, default="[]"),
    Column("error", Text),
    Column("meta", Text, nullable=False),
    Column("idempotency_key", Text),
    Column("digest", Text, nullable=False, default=""),  # of the order, for its idempotency key
    Column("owner", Text),  # the server that runs it
    Column("deaths", Integer, nullable=False, default=0),  # servers that died while it ran
    Column("abort_reason", Text),  # asks the owner to abort it
    Column("last_sequence", Integer, nullable=False, default=0),
    Column("bytes", BigInteger, nullable=False, default=0),  # of its files and events
    Column("webhook", Text),  # the address that is told
    Column("webhook_at", Float(53)),  # when the next delivery is due
    Column("webhook_tries", Integer, nullable=False, default=0),
    Index("omni_jobs_listed", "created_at", "id"),
    Index("omni_jobs_states", "state", "owner"),
    Index("omni_jobs_finished", "finished_at"),
    Index("omni_jobs_webhooks", "webhook_at"),
    Index("omni_jobs_idempotency", "key", "idempotency_key", unique=True),
)

EVENTS = Table(
    "omni_events",
    METADATA,
    Column("job_id", Text, primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("type", Text, nullable=False),
    Column("data", Text, nullable=False),
    Column("at", Float(53), nullable=False),
    sqlite_with_rowid=False,  # the rows of a job lie side by side
)

SERVERS = Table(
    "omni_servers",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("heartbeat_at", Float(53), nullable=False),  # by the database's clock where it has one
)

STORES = Table("omni_store", METADATA, Column("id", Text, primary_key=True))
"""One row: the name of this database, which marks its files."""

VERSIONS = Table("omni_schema", METADATA, Column("version", Integer, primary_key=True))


def connect(url: str) -> tuple[Engine, Engine]:
    """Two engines of one database: for the writer's transactions, and for single reads. Makes the tables.

    Raises StoreError for a wrong address, a database that does not answer, or tables of another version.
    """
    try:
        parsed = make_url(url)
        shown = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite":
            engines = _sqlite(url)
        elif parsed.get_backend_name() == "postgresql":
            engines = _postgres(url)
        else:
            raise StoreError(f"{shown}: jobs are stored in sqlite:///FILE or postgresql+psycopg://...")
    except (ArgumentError, NoSuchModuleError) as error:
        raise StoreError(f"the address of the job store is wrong: {error}") from error
    except ImportError as error:
        raise StoreError(f"{shown}: needs the package '{error.name}'; pip install 'omni-stages[postgres]'") from error
    try:
        if parsed.get_backend_name() == "sqlite":  # what clients sent is nobody else's affair
            database = Path(parsed.database or "")
            database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(database, os.O_CREAT | os.O_RDWR, 0o600))  # the files beside it get the same rights
        _make_tables(engines[0])
    except (SQLAlchemyError, OSError, StoreError) as error:
        for engine in engines:
            engine.dispose()
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{shown}: the job store cannot be opened: {plain(error)}") from error
    return engines


def plain(error: BaseException) -> str:
    """What the database said, in one line and without the statement."""
    origin = getattr(error, "orig", None) or error
    return " ".join(str(origin).split())


def _sqlite(url: str) -> tuple[Engine, Engine]:
    database = make_url(url).database
    if not database or database == ":memory:":
        raise StoreError(f"{url}: jobs in memory would not survive; name a file: sqlite:///FOLDER/jobs.db")
    # `isolation_level=None` keeps sqlite3 from opening transactions of its own.
    arguments: dict[str, Any] = {"isolation_level": None, "check_same_thread": False}
    writing, reading = create_engine(url, connect_args=arguments), create_engine(url, connect_args=arguments)
    for engine in (writing, reading):
        event.listen(engine, "connect", _prepare_sqlite)
    # IMMEDIATE: a transaction that reads first and then writes could not wait for another process's.
    event.listen(writing, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return writing, reading


def _prepare_sqlite(connection: sqlite3.Connection, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")  # a killed process loses nothing; a power cut the last moments
    cursor.close()


def _postgres(url: str) -> tuple[Engine, Engine]:
    options: dict[str, Any] = {"pool_pre_ping": True, "connect_args": POSTGRES_OPTIONS}
    engines = create_engine(url, pool_size=1, **options), create_engine(url, isolation_level="AUTOCOMMIT", **options)
    for engine in engines:
        event.listen(engine, "connect", _prepare_postgres)
    return engines


def _prepare_postgres(connection: Any, record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET statement_timeout = {STATEMENT_MILLISECONDS}")
        cursor.execute(f"SET idle_in_transaction_session_timeout = {STATEMENT_MILLISECONDS}")
    connection.commit()


def _make_tables(engine: Engine) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({SETUP_LOCK})"))
        if not inspect(connection).has_table(VERSIONS.name):
            METADATA.create_all(connection)
            connection.execute(insert(VERSIONS).values(version=VERSION))
            connection.execute(insert(STORES).values(id=f"store_{secrets.token_hex(12)}"))
        _check_version(connection)


def _check_version(connection: Connection) -> None:
    found = connection.execute(select(VERSIONS.c.version)).scalar_one()
    if found != VERSION:
        raise StoreError(f"the job store has tables of version {found}, this Omni needs {VERSION}; use a new database")
