"""Commands in this process with captured output, and in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from omni.cli.main import main
from omni.testing import doubles

CHILD = """
import sys
from omni.cli.main import entry
from omni.testing import doubles
{before}
with doubles():
    entry()
"""


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def omni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `omni ARGUMENTS...` in an empty current folder, with the kind `double` known; `omni run` without Ray."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ran:
        inline = ("--runner", "inline") if arguments[:1] == ("run",) and len(arguments) > 1 else ()
        with doubles():
            try:
                code = main([str(argument) for argument in (*arguments, *inline)])
            except SystemExit as stop:
                code = int(stop.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def start_omni(root: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start `omni ARGUMENTS...` in a process of its own, in the folder of the `omni` fixture; `before` is Python."""

    def start(*arguments: object, before: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD.format(before=before), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=environment)

    return start
