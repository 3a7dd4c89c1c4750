"""The cluster of the whole session: runners and tests share one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from omni.runner.ray_environment import Cluster, connect, disconnect


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """A local cluster, started unless another fixture has."""
    cluster = asyncio.run(connect("local", cpus=64, object_store_bytes=1024**3))
    yield cluster
    asyncio.run(disconnect())
