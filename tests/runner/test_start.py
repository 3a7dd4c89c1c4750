"""How both runners start: what is told of loading, and what stops it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from omni.api import AsyncOmni
from omni.messages import LoadProgress
from omni.testing import doubles

WAIT_SECONDS = 60
CHAIN: dict[str, Any] = {
    "a": {"kind": "double"},
    "b": {"kind": "double", "inputs": {"prompt": "a.text"}},
    "c": {"kind": "double", "inputs": {"prompt": "b.text"}},
}


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with doubles():
        yield


@pytest.fixture(params=["inline", "ray"])
def runner(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return str(request.param)


def test_a_stage_that_cannot_load_stops_the_start(runner: str) -> None:
    async def main() -> None:
        async with AsyncOmni({"stages": {**CHAIN, "b": {**CHAIN["b"], "fail_in": "setup"}}}, runner=runner):  # type: ignore[arg-type]
            pytest.fail("must not start")

    with pytest.raises(Exception, match="stage 'b': RuntimeError: the double fails in setup"):
        asyncio.run(main())


def test_all_of_loading_is_told_before_the_start_is_over(runner: str) -> None:
    told: list[LoadProgress] = []

    async def main() -> None:
        async with AsyncOmni({"stages": CHAIN}, runner=runner, report=told.append):  # type: ignore[arg-type]
            assert sorted(progress.stage for progress in told) == ["a", "b", "c"]

    asyncio.run(asyncio.wait_for(main(), WAIT_SECONDS))


def test_a_listener_that_raises_fails_the_start(runner: str) -> None:
    def report(progress: LoadProgress) -> None:
        raise ValueError("nobody listens")

    async def main() -> None:
        async with AsyncOmni({"stages": CHAIN}, runner=runner, report=report):  # type: ignore[arg-type]
            pytest.fail("must not start")

    with pytest.raises(Exception, match="nobody listens"):
        asyncio.run(asyncio.wait_for(main(), WAIT_SECONDS))
