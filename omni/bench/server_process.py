"""A real `omni serve` process to measure, or a server that runs already; what it takes of memory and processor."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omni.errors import OmniError, UsageError

START_SECONDS = 900.0
"""Loading weights may take long; a process that ends is noticed at once."""
STOP_SECONDS = 60.0
ASK_SECONDS = 30.0
POLL_SECONDS = 0.05
SAMPLE_SECONDS = 0.05
ERROR_LINES = 5
PROGRAM = "from omni.cli.main import entry; entry()"
KEY_VARIABLE = "OMNI_API_KEY"
KEYS_VARIABLE = "OMNI_API_KEYS"
"""Keys of a server; the measured one has none."""


class Server:
    """Where a server is; `pid` is None for one that somebody else started."""

    def __init__(self, host: str, port: int, pid: int | None = None) -> None:
        self.host = host
        self.port = port
        self.pid = pid
        key = os.environ.get(KEY_VARIABLE, "") if pid is None else ""
        self.headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """The JSON that the server answers. Raises OmniError when it is no success."""
        text = self._exchange(method, path, None if body is None else json.dumps(body), headers)
        return json.loads(text) if text else None

    def read(self, path: str) -> str:
        """The text that the server has under `path`. Raises OmniError."""
        return self._exchange("GET", path, None, {})

    def _exchange(self, method: str, path: str, body: str | None, headers: Mapping[str, str]) -> str:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ASK_SECONDS)
        try:
            connection.request(method, path, body, {**self.headers, **headers})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise OmniError(f"{method} http://{self.host}:{self.port}{path}: {error}") from error
        finally:
            connection.close()
        if answer.status >= 300:
            raise OmniError(f"{method} {path}: {answer.status} {text[:500]}")
        return text

    def is_ready(self) -> bool:
        """Whether every stage answers."""
        with contextlib.suppress(OmniError):
            self.ask("GET", "/ready")
            return True
        return False

    def rss_bytes(self) -> int | None:
        """Main memory of its process now; None where the system does not tell."""
        if self.pid is None or not (file := Path(f"/proc/{self.pid}/statm")).exists():
            return None
        return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float | None:
        """Processor time of its process so far, all threads; None where the system does not tell."""
        if self.pid is None or not (file := Path(f"/proc/{self.pid}/stat")).exists():
            return None
        fields = file.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(graph: str, options: Sequence[str] = ()) -> Iterator[Server]:
    """An `omni serve` process of `graph` with a state folder of its own, ready; stopped in the end.

    Raises OmniError with the last lines of a server that does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="omni-bench-") as folder, open(f"{folder}/log", "w+b") as log:
        port = _free_port()
        flags = ["--quiet", "--port", str(port), "--state-dir", f"{folder}/state", *options]
        paths = os.pathsep.join([os.getcwd(), *(path for path in sys.path if path)])
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "serve", graph, *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != KEYS_VARIABLE} | {"PYTHONPATH": paths},
        )
        try:
            server = Server("127.0.0.1", port, process.pid)
            _await_ready(server, process, Path(log.name))
            yield server
        finally:
            _stop(process)


def running(url: str) -> Server:
    """A server that runs already. Raises UsageError when it does not answer."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
        raise UsageError(f"--url {url}: give the address of a server, as http://HOST:PORT")
    server = Server(parts.hostname, parts.port or 80)
    if not server.is_ready():
        raise UsageError(f"--url {url}: GET /ready is not answered with 200 (its key goes into ${KEY_VARIABLE})")
    return server


class MemoryWatch:
    """Notes a server's memory while the block lasts: (time.monotonic(), bytes)."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            if (found := self._server.rss_bytes()) is not None:
                self.samples.append((time.monotonic(), found))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _await_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            state = "ended" if process.poll() is not None else f"is not ready after {START_SECONDS:g} s"
            raise OmniError(f"omni serve {state}: " + " ".join(lines[-ERROR_LINES:]))
        time.sleep(POLL_SECONDS)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
