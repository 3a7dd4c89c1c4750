"""Who is told to try again, and who is not."""

from __future__ import annotations

import openai
import pytest

from omni.errors import RequestAborted, StageTimeoutError
from omni.server.errors import ApiError, answer_headers, as_api_error
from omni.server.jobs import Draining, IdempotencyConflict, QueueFull, StoreError
from omni.server.settings import ServerSettings
from tests.server.app_site import (
    Serve,
)


async def test_openai_s_client_sends_a_request_that_failed_only_once(serve: Serve, started: list[str]) -> None:
    site = await serve("note_and_fail", ServerSettings(), max_queued=3)
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=site.client) as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="g", messages=[{"role": "user", "content": "x"}])
    assert started == ["x"]


@pytest.mark.parametrize(
    ("error", "status", "retried"),
    [
        (StoreError("the store is away"), 503, True),
        (Draining("stopping"), 503, True),
        (QueueFull("full", 2.0), 429, True),
        (IdempotencyConflict("another"), 409, False),
        (TimeoutError(), 504, False),
        (RequestAborted("r", "by its caller"), 503, False),
        (StageTimeoutError("work", "took too long"), 500, False),
        (ApiError(500, "the graph gave no picture", None, "no_output"), 500, False),
        (ApiError(409, "not yet", "id", "video_not_ready"), 409, False),
    ],
)
def test_who_may_try_again(error: Exception, status: int, retried: bool) -> None:
    told = as_api_error(error)
    headers = answer_headers(told)
    assert (told.status, "Retry-After" in headers, headers.get("x-should-retry")) == (
        status,
        retried,
        None if retried else "false",
    )
