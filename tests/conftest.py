"""Settings, facts and the one Ray cluster of the whole suite.

Nothing is downloaded, Ray asks for no token and reports no usage, and hypothesis sets no time limits.
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from omni.runner.ray_environment import Cluster

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# An example that takes long says that the machine is busy, not that the code is wrong.
settings.register_profile("omni", deadline=None)
settings.load_profile("omni")

CLUSTER_CPUS = 64
"""More than there are: Ray only counts them, and no test shall wait for another's."""
STORE_BYTES = 1024**3
ROOT = Path(__file__).resolve().parents[1]
TEXT_FILES = ("*.py", "*.md", "*.toml", "*.txt", "*.yaml", "*.yml", "Makefile", ".ci/run", ".gitignore")


def pytest_configure(config: pytest.Config) -> None:
    """All but the GPU tests plan for this machine's CPUs, whatever else it has."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """A local cluster, since starting one takes seconds; runners find it initialised and leave it running."""
    from omni.runner.ray_environment import connect, disconnect

    cluster = asyncio.run(connect("local", cpus=CLUSTER_CPUS, object_store_bytes=STORE_BYTES))
    yield cluster
    asyncio.run(disconnect())
