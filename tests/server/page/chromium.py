"""Debian's Chromium for the tests of the page: found, or installed by root, or the tests fail saying how to get it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PACKAGE = "chromium"
DEADLINE_SECONDS = 420.0
REMEDY = (
    "the tests of the page need Chromium, and it could be neither found nor installed: "
    f"as root, run apt-get update && apt-get install -y --no-install-recommends {PACKAGE}"
)
ARGUMENTS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update")
"""No sandbox: it refuses to run as root. The others keep it from calling anyone."""


def find_chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


def chromium() -> str:
    """Path of Chromium. Installs it when it is missing; of several test runs one does. Raises AssertionError."""
    found = find_chromium()
    if found is not None:
        return found
    deadline = time.monotonic() + DEADLINE_SECONDS
    with (Path(tempfile.gettempdir()) / "omni-tests-chromium.lock").open("w") as lock:
        # The lock is given back when its holder ends, and apt-get ends by its own deadline.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return find_chromium() or install(deadline)


def install(deadline: float) -> str:
    """Install the package by apt-get, with fresh package lists when those here do not serve."""
    assert shutil.which("apt-get") is not None, f"{REMEDY} (there is no apt-get here)"
    assert os.geteuid() == 0, f"{REMEDY} (only root can install packages)"
    said = ""
    for commands in (("install",), ("update", "install")):
        said = "".join(apt_get(command, deadline) for command in commands)
        found = find_chromium()
        if found is not None:
            return found
    raise AssertionError(f"{REMEDY}\n{said[-2000:]}")


def apt_get(command: str, deadline: float) -> str:
    """Run `apt-get COMMAND`; its output, or why there is none."""
    packages = ["-y", "--no-install-recommends", PACKAGE] if command == "install" else []
    call = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", command, *packages]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            call,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(1.0, deadline - time.monotonic()),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"apt-get {command} did not end within {DEADLINE_SECONDS:.0f} s\n"
    return done.stdout
