"""Ends what is left of a local Ray cluster when the driver dies without stopping it.

A process of its own: it waits on a pipe whose other end only the driver holds. Ray's servers and workers go by
themselves when the driver is killed, but its agents take a minute. Standard library only, since it runs without site.
"""

from __future__ import annotations

import glob
import os
import select
import signal
import stat
import subprocess
import sys
import time

GRACE_SECONDS = 3.0
"""Time for Ray's own clean-up, which also reports errors."""
GIVE_UP_SECONDS = 20.0


def start_reaper(temp_dir: str) -> subprocess.Popen[bytes]:
    """Watch over the clusters that this process starts below `temp_dir`. Stop it with `stop_reaper`."""
    sessions = os.path.join(glob.escape(temp_dir), f"session_*_{os.getpid()}")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), sessions],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def stop_reaper(reaper: subprocess.Popen[bytes]) -> None:
    """The cluster has been stopped, so there is nothing to reap."""
    reaper.kill()
    reaper.communicate()


def reap(sessions: str) -> None:
    """Kill the processes that write into the session folders (a pattern), until none is left."""
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while (found := writers(sessions)) and time.monotonic() < deadline:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.2)


def writers(sessions: str) -> list[int]:
    """Processes of this user that hold a file below the session folders open for writing, as all of Ray's do."""
    folders = [f"{folder}/" for folder in glob.glob(sessions)]
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid != os.getpid() and any(_writes_below(pid, folder) for folder in folders):
            found.append(pid)
    return found


def _writes_below(pid: int, folder: str) -> bool:
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{name}"
            if os.lstat(link).st_mode & stat.S_IWUSR and os.readlink(link).startswith(folder):
                return True
    except OSError:  # it is gone, or another user's
        return False
    return False


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    select.select([], [], [], GRACE_SECONDS)
    reap(sys.argv[1])
