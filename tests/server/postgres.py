"""A Postgres server of the tests' own, where its programs are installed: no network, no fsync, gone at the end.

Postgres refuses to run as root; then it runs as the user `postgres` or `nobody`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 60


def find_programs() -> Path | None:
    """The folder with `postgres` and `initdb`, or None."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((each for each in folders if (each / "postgres").exists() and (each / "initdb").exists()), None)


@contextlib.contextmanager
def running_postgres() -> Iterator[str]:
    """The URL of a database; all is removed afterwards."""
    programs = find_programs()
    assert programs is not None, "install postgresql"
    folder = Path(tempfile.mkdtemp(prefix="omni-pg-"))
    user = _user()
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    data = folder / "data"
    as_user = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    quiet = {"stdout": subprocess.DEVNULL, "cwd": folder, **as_user}
    initdb = [programs / "initdb", "-D", data, "-U", "omni", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-locale"]
    subprocess.run(initdb, check=True, **quiet)
    options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen([programs / "postgres", "-D", data, *options], stderr=log, **quiet)
    try:
        url = f"postgresql+psycopg://omni@/postgres?host={folder}"
        _wait_for(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # fast: does not wait for connections
        process.wait(START_SECONDS)
        log.close()
        shutil.rmtree(folder)


def _user() -> pwd.struct_passwd | None:
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise AssertionError("no user to run postgres as")


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    import psycopg

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(url.replace("+psycopg", ""), connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, "postgres ended"
            assert time.monotonic() < deadline, "postgres does not answer"
            time.sleep(0.02)
