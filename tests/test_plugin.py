"""A kind of stage from another distribution: installed, found through its entry point, checked and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GRAPH = """\
name: loud
stages:
  call_out: {kind: shout, marks: 3}
"""
RUN = """
import sys
from omni import Omni
with Omni(sys.argv[1]) as omni:
    print(omni.generate(prompt="hello").outputs["text"])
assert not [name for name in ("torch", "ray") if name in sys.modules]
"""


@pytest.fixture(scope="module")
def plugins(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which pip has installed the plug-in package, offline."""
    source, target = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("plugins")
    shutil.copytree(root / "tests" / "plugin_package", source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def python(root: Path, plugins: Path, tmp_path: Path):
    """Runs a fresh Python that sees the project and the plug-in, in a folder with the graph."""
    (tmp_path / "graph.yaml").write_text(GRAPH)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(plugins)))}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

    return python


CLI = ("-c", "import sys; from omni.cli.main import main; sys.exit(main())")


def test_its_graph_is_validated(python) -> None:
    done = python(*CLI, "validate", "graph.yaml")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("{kind: shout, marks: 10}", "stages.call_out.marks: 10 is too loud, at most 9"),
        ("{kind: shout, mark: 1}", "stages.call_out.mark: unknown key, did you mean 'marks'?"),
        ("{kind: shuot}", "did you mean 'shout'?"),
    ],
)
def test_its_mistakes_are_told_like_built_in_ones(python, stage: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "graph.yaml").write_text(GRAPH.replace("{kind: shout, marks: 3}", stage))
    done = python(*CLI, "validate", "graph.yaml")
    assert done.returncode == 2
    assert "graph.yaml:3:" in done.stdout + done.stderr
    assert fault in done.stdout + done.stderr


def test_it_runs(python) -> None:
    done = python("-c", RUN, "graph.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "HELLO!!!\n", "")
