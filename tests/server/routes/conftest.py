"""One running `omni serve` for all tests of this folder, with the demo models, and OpenAI's own client."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from openai import OpenAI

HERE = Path(__file__).parent
START_SECONDS = 120
STOP_SECONDS = 60
PROGRAM = "from omni.cli.main import entry; entry()"
DEMOS = ("draw", "edit", "video", "tell")
GRAPHS = {
    "film": "inputs: {prompt: text, num_frames: json, width: json, height: json}\n"
    "stages:\n  shoot: {kind: function, call: 'studio:film'}\n",
    "voice": "inputs: {prompt: text, speed: json}\nstages:\n  speak: {kind: function, call: 'studio:speak'}\n",
}


class Served(NamedTuple):
    """The running server."""

    url: str
    output: list[str]
    """What it has printed before it was ready."""


@pytest.fixture(scope="session")
def served(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    graphs = [str(root / "configs" / f"{name}.yaml") for name in DEMOS]
    for name, text in GRAPHS.items():
        (folder / f"{name}.yaml").write_text(text)
        graphs.append(str(folder / f"{name}.yaml"))
    command = [sys.executable, "-c", PROGRAM, "serve", *graphs, "--port", "0", "--state-dir", str(folder / "state")]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{HERE}"},
    )
    assert process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line.rstrip("\n"))
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    output: list[str] = []
    try:
        while not output or not output[-1].startswith("try: "):
            line = lines.get(timeout=START_SECONDS)
            assert line is not None, "\n".join(output)
            output.append(line)
        url = next(line.removeprefix("listening on ") for line in output if line.startswith("listening on "))
        yield Served(url, output)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
        reader.join(STOP_SECONDS)
        process.stdout.close()
    rest = list(iter(lines.get, None))
    assert code == 0, rest
    assert not any("Traceback" in line or line.startswith("ERROR") for line in rest), rest


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=60) as opened:
        yield opened
