"""One Ray for all tests that can share it: starting it takes seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from omni.runner.ray_environment import Cluster, connect, disconnect

STORE_BYTES = 1024**3


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """A local cluster that runners find initialised; they leave it running."""
    cluster = asyncio.run(connect("local", cpus=64, object_store_bytes=STORE_BYTES))
    yield cluster
    asyncio.run(disconnect())
