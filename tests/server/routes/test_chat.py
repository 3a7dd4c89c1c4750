"""Chat completions through OpenAI's own client: the demo's language model, and graphs that draw."""

from __future__ import annotations

import base64
import io
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image

MESSAGES: list[Any] = [{"role": "user", "content": "flag of japan"}]
ANSWER = "a large red circle on a white background"


def test_complete(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tell", messages=MESSAGES)
    assert (answer.object, answer.model) == ("chat.completion", "tell")
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 5


def test_stream(client: OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="tell", messages=MESSAGES, stream=True, stream_options=options))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert len([delta for delta in deltas if delta.content]) > 5
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage is None) == ([], False)


def test_graphs_that_draw_answer_with_pictures(client: OpenAI) -> None:
    red = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(red, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(red.getvalue()).decode()}"
    content = [{"type": "text", "text": ANSWER}, {"type": "image_url", "image_url": {"url": url}}]
    messages: list[Any] = [{"role": "user", "content": content}]
    extra = {"num_inference_steps": 3, "width": 64, "height": 64, "seed": 3}
    answer = client.chat.completions.create(model="edit", messages=messages, extra_body=extra)
    (part,) = answer.choices[0].message.content  # type: ignore[misc]
    assert part["type"] == "image_url"  # type: ignore[index]
    drawn = part["image_url"]["url"].partition(",")[2]  # type: ignore[index]
    assert Image.open(io.BytesIO(base64.b64decode(drawn))).size == (64, 64)
    chunks = client.chat.completions.create(model="edit", messages=messages, extra_body=extra, stream=True)
    parts: list[Any] = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert parts == [[part]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "messages[0].role"),
        ({"temperature": 0.5}, "temperature"),
        ({"n": 2, "stream": True}, "n"),
        ({"extra_body": {"prompt": "x"}}, "prompt"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            "messages",
        ),
    ],
)
def test_wrong_fields_are_named(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tell", "messages": MESSAGES, **fields})
    assert caught.value.param == param
