"""The distribution: what the wheel holds, what it declares, how `omni` is imported, and that versions are pinned."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml

import omni
from omni.cli.main import COMMANDS
from omni.load import load_graph

DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "_pytest": "pytest"}
"""Import name -> distribution, where they differ."""
PLAIN_NAMES = "configs/models/"
"""The scripts in its folders import each other by plain name, and so does their test."""
OWN_ENVIRONMENT = re.compile(r"-m venv (\S+) && \1/bin/pip install ")
"""An install into an environment that the same line makes: not this project's."""


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    """Names in a list of requirements."""
    return {normal(re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]) for requirement in requirements}


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(root: Path, project_files: list[str], tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built offline from a copy, so that no build folder is left here or taken up from here."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in project_files:
        target = folder / "source" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    """METADATA of the wheel."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile, project_files: list[str]) -> None:
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packaged == {path for path in project_files if path.startswith(("omni/", "stages/"))}
    assert {"omni/py.typed", "stages/py.typed", "omni/cli/main.py"} <= packaged
    others = {Path(name).name for name in wheel.namelist()} - {Path(name).name for name in packaged}
    assert others == {"METADATA", "RECORD", "WHEEL", "LICENSE", "entry_points.txt", "top_level.txt"}


def test_wheel_metadata(metadata: Message, project: dict[str, Any]) -> None:
    assert metadata["Name"] == "omni-stages"
    assert metadata["Version"] == project["project"]["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_all("Provides-Extra") == ["test", "audio", "plots", "postgres", "tracing"]
    assert str(metadata.get_payload()).startswith("# Omni")


def test_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert wheel.read(name).decode().split() == ["[console_scripts]", "omni", "=", "omni.cli.main:entry"]


def test_every_import_is_declared(project: dict[str, Any], project_texts: dict[str, str]) -> None:
    run_time = required(project["project"]["dependencies"])
    test_time = required(project["project"]["optional-dependencies"]["test"])
    scripts = {Path(path).stem for path in project_texts if path.startswith(PLAIN_NAMES) and path.endswith(".py")}
    undeclared = set()
    for path, text in project_texts.items():
        if not path.startswith(("omni/", "stages/", "tests/", PLAIN_NAMES)) or not path.endswith(".py"):
            continue
        is_packaged = path.startswith(("omni/", "stages/"))
        declared = run_time if is_packaged else run_time | test_time
        ours = {"omni", "stages"} if is_packaged else {"omni", "stages", "tests", *scripts}
        for name in imported_packages(text) - set(sys.stdlib_module_names) - ours:
            if normal(DISTRIBUTIONS.get(name, name)) not in declared:
                undeclared.add(f"{path}: {name}")
    assert not undeclared, "\n".join(sorted(undeclared))


def imported_packages(text: str) -> set[str]:
    """Top-level names of all that a module imports."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


def test_constraints_pin_all_that_make_installs(root: Path, project: dict[str, Any]) -> None:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)]
    assert not wrong, "only name==version, without local version tags, paths and addresses"
    installed = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["test"]
    assert required(installed) <= required(lines), "the extra `audio` is not among them: the tests run without it"


def test_every_install_uses_the_constraints(project_texts: dict[str, str]) -> None:
    installs = [
        f"{path}: {line.strip()}"
        for path, text in project_texts.items()
        if path.endswith((".md", "Makefile", "run", ".yaml", ".yml"))
        for line in text.splitlines()
        if re.search(r"pip install", line) and not OWN_ENVIRONMENT.search(line)
    ]
    assert installs
    assert [line for line in installs if "-c constraints.txt" not in line] == []


def test_changelog_knows_the_version(root: Path, project: dict[str, Any]) -> None:
    headings = re.findall(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert project["project"]["version"] in headings[1:] or headings == ["Unreleased"]


def test_import_omni_is_light() -> None:
    code = "import sys; before = set(sys.modules); import omni; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded - set(sys.stdlib_module_names) == {"omni"}


def test_public_names() -> None:
    assert omni.__all__ == ["AsyncOmni", "Omni", "Result", "__version__"]
    assert [name for name in omni.__all__ if not hasattr(omni, name)] == []
    assert set(omni.__all__) <= set(dir(omni))


def test_version_is_the_distribution_s(project: dict[str, Any]) -> None:
    assert omni.__version__ == project["project"]["version"]


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'omni' has no attribute 'Omnia'"):
        _ = omni.Omnia


def run_make(root: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make on a copy of the Makefile in an empty folder."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(root / name, folder / name)
    outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")  # set when make runs this test
    env = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_make_alone_lists_the_targets(root: Path, tmp_path: Path) -> None:
    done = run_make(root, tmp_path)
    assert re.findall(r"^make ([a-z]+) ", done.stdout, re.MULTILINE) == [
        "help",
        "demo",
        "test",
        "check",
        "format",
        "clean",
    ]
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("python", ["", "no-such-python", "false"])
def test_make_without_a_fitting_python_says_what_to_do(root: Path, tmp_path: Path, python: str) -> None:
    done = run_make(root, tmp_path, "test", f"PYTHON={python}")
    assert done.returncode == 2
    assert "omni needs Python >= 3.11 with the modules venv and ensurepip" in done.stderr
    assert "make PYTHON=/path/to/python" in done.stderr
    assert not (tmp_path / ".venv").exists()


def readme_blocks(root: Path, language: str) -> list[str]:
    """The README's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (root / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_readme_graphs_are_valid(root: Path) -> None:
    graphs = [load_graph(yaml.safe_load(block)).graph for block in readme_blocks(root, "yaml")]
    assert [graph.order for graph in graphs] == [("draw",), ("rewrite", "draw")]


def test_readme_names_every_command(root: Path) -> None:
    named = set(re.findall(r"^\| `omni (\w+)", (root / "README.md").read_text(), re.MULTILINE))
    assert named == set(COMMANDS)
    used = {
        command for block in readme_blocks(root, "bash") for command in re.findall(r"^omni (\w+)", block, re.MULTILINE)
    }
    assert used <= set(COMMANDS)


def test_readme_python_names_what_exists(root: Path) -> None:
    (block,) = readme_blocks(root, "python")
    used = set(re.findall(r"\bomni\.(\w+)\(", block))
    assert used == {"generate", "stream"}
    assert all(hasattr(omni.Omni, name) for name in used)
    compile(block, "README.md", "exec")


def test_links_in_documents_lead_somewhere(root: Path, project_texts: dict[str, str]) -> None:
    links = [
        (path, link)
        for path, text in project_texts.items()
        if path.endswith(".md")
        for link in re.findall(r"\]\(([^)#\s]+)", text)
        if "://" not in link
    ]
    assert ("README.md", "docs/architecture.md") in links
    broken = [f"{path}: {link}" for path, link in links if not (root / path).parent.joinpath(link).exists()]
    assert not broken, "\n".join(broken)
