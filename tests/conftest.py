"""Settings and facts for the whole suite: nothing is downloaded, Ray asks for no token and reports no usage."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import pytest

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

ROOT = Path(__file__).resolve().parents[1]
TEXT_FILES = ("*.py", "*.md", "*.toml", "*.txt", "*.yaml", "*.yml", "Makefile", ".ci/run", ".gitignore")


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def project_files() -> list[str]:
    """Every file of the project, relative to its folder: without what .gitignore names and hidden folders but .ci."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    files: list[str] = []
    folders = [ROOT]
    while folders:
        folder = folders.pop()
        patterns = [line.strip("/") for line in ignored if not line.startswith("/") or folder == ROOT]
        for path in sorted(folder.iterdir()):
            hidden = path.name.startswith(".") and not path.is_file() and path.name != ".ci"
            if hidden or path.name == ".git" or any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
                continue
            if path.is_dir():
                folders.append(path)
            else:
                files.append(str(path.relative_to(ROOT)))
    return files


@pytest.fixture(scope="session")
def project_texts(project_files: list[str]) -> dict[str, str]:
    """Path -> content of the project's text files, the licence left out."""
    chosen = [path for path in project_files if any(fnmatch.fnmatch(path, pattern) for pattern in TEXT_FILES)]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in chosen}
