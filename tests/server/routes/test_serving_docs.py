"""The examples of docs/serving.md, run against the server, in one folder and in their order."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from omni.cli.serve import add_arguments
from omni.server.fields import PARAMETERS
from tests.server.routes.conftest import Served

BLOCK = re.compile(r"^<!-- test: (\w+) -->\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"
WAIT_SECONDS = 120


def test_examples_run(served: Served, root: Path, tmp_path: Path) -> None:
    text = (root / "docs/serving.md").read_text()
    blocks = [(kind, code.replace(ADDRESS, served.url)) for kind, code in BLOCK.findall(text)]
    assert [kind for kind, _ in blocks].count("bash") >= 7
    # One process for all of a language: the Python blocks share their client, the shell's its variables.
    programs = {kind: "\n".join(code for found, code in blocks if found == kind) for kind in ("python", "bash")}
    warnings = "import warnings; warnings.simplefilter('ignore')\n"
    commands = {
        "python": [sys.executable, "-c", warnings + programs["python"]],
        "bash": ["bash", "-euo", "pipefail", "-c", programs["bash"]],
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for kind, command in commands.items():
        ran = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            env={**os.environ, "PATH": path},
        )
        assert ran.returncode == 0, f"{kind}:\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {"circle.png", "circle.mp4", "morning.wav", "morning.mp3", "rain.flac", "image.png"}


def test_every_option_is_described(root: Path) -> None:
    section = (root / "docs/serving.md").read_text().partition("## Options\n")[2]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `--")]
    described = {option for row in rows for option in re.findall(r"--[a-z-]+", row)}
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    assert described == known - {"--quiet", "--disable-multithread-weight-load"}


def test_every_parameter_is_described(root: Path) -> None:
    section = (root / "docs/serving.md").read_text().partition("## Parameters\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    described = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert described == {name for parameter in PARAMETERS for name in parameter.names} - {"prompt"}
