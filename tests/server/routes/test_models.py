"""The served graphs as OpenAI's models."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

from tests.server.routes.conftest import Served


def test_graphs_are_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["draw", "edit", "video", "tell", "film", "voice"]
    found = client.models.retrieve("draw")
    assert (found.id, found.object, found.owned_by) == ("draw", "model", "omni")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("paint")


def test_the_command_says_what_to_do(served: Served) -> None:
    assert f"page: {served.url}/" in served.output
    assert "graphs: draw, edit, video, tell, film, voice" in served.output
    assert served.output[-1].startswith(f"try: curl {served.url}/v1/images/generations ")
