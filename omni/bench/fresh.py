"""Functions in fresh processes, so that no row of a bench profits from what another left behind, and their memory.

The parent calls `run_fresh`; this module is also the child's program.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from omni.errors import OmniError, one_line
from omni.registry import import_string

DEADLINE_SECONDS = 900.0
"""A row that takes longer has failed."""
ERROR_LINES = 3
"""Of a failed child's output that its error repeats."""


class Memory(msgspec.Struct, frozen=True):
    """Bytes of main memory that a process has taken since the baseline; None where the system does not tell."""

    peak_bytes: int
    anonymous_bytes: int | None
    """Its own pages, now."""
    file_bytes: int | None
    """Mapped pages of files, now: the page cache's."""
    shared_bytes: int | None
    """Shared and pinned pages, now."""


class MemoryMeter:
    """Starts counting where it is made."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self._before = _read_status()

    def read(self) -> Memory:
        """What was taken since."""
        now, before = _read_status(), self._before

        def more(key: str) -> int | None:
            return now[key] - before[key] if key in now and key in before else None

        peak = max(now["VmHWM"] - before["VmRSS"], 0)
        return Memory(peak, more("RssAnon"), more("RssFile"), more("RssShmem"))


def run_fresh(target: str, job: Any, environment: Mapping[str, str] | None = None) -> Any:
    """`module:function` called with `job` in a process of its own; both `job` and the result are JSON values.

    Raises OmniError with the last lines of a child that failed or missed the deadline.
    """
    command = [sys.executable, "-m", __name__]
    paths = os.pathsep.join([os.getcwd(), *(path for path in sys.path if path)])
    variables = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
    text = json.dumps({"target": target, "job": msgspec.to_builtins(job)})
    try:
        ran = subprocess.run(
            command, input=text, capture_output=True, text=True, env=variables, timeout=DEADLINE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OmniError(f"not done within {DEADLINE_SECONDS:g} s") from error
    if ran.returncode:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        raise OmniError(" ".join(lines[-ERROR_LINES:]) or f"exit code {ran.returncode}")
    return json.loads(ran.stdout)


def _read_status() -> dict[str, int]:
    """Memory of this process by /proc/self/status, in bytes."""
    fields = {}
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"VmRSS": peak, "VmHWM": peak, **fields}


def _main() -> int:
    # What libraries print must not get between the parent and the result.
    results = os.dup(1)
    os.dup2(2, 1)
    order = json.load(sys.stdin)
    try:
        result = import_string(order["target"])(order["job"])
    except OmniError as error:
        print(one_line(error), file=sys.stderr)
        return 1
    with os.fdopen(results, "w") as stream:
        json.dump(msgspec.to_builtins(result), stream)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
