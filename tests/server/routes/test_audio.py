"""Speech and sounds through OpenAI's own client."""

from __future__ import annotations

import io
import json

import av
import httpx
import openai
import pytest
from openai import OpenAI

from omni.server.encoding import AUDIO_ENCODERS
from tests.server.routes.conftest import Served

TEXT = "one two three"


@pytest.mark.parametrize("audio_format", [name for name in AUDIO_ENCODERS if name != "pcm"])
def test_speech(client: OpenAI, audio_format: str) -> None:
    answer = client.audio.speech.create(model="voice", voice="alloy", input=TEXT, response_format=audio_format)  # type: ignore[arg-type]
    assert answer.response.headers["content-type"] == AUDIO_ENCODERS[audio_format].media_type  # type: ignore[index]
    with av.open(io.BytesIO(answer.read()), "r") as container:
        stream = container.streams.audio[0]
        seconds = sum(frame.samples for frame in container.decode(stream)) / stream.rate
    assert seconds == pytest.approx(0.3, abs=0.1)


def test_speed_and_raw_samples(client: OpenAI) -> None:
    answer = client.audio.speech.create(model="voice", voice="alloy", input=TEXT, response_format="pcm", speed=2.0)
    assert len(answer.read()) == 2 * 24_000 * 0.15


def test_streamed_speech(served: Served) -> None:
    body = {"model": "voice", "input": TEXT, "response_format": "wav", "stream_format": "sse"}
    text = httpx.post(f"{served.url}/v1/audio/speech", json=body).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["speech.audio.delta", "speech.audio.done"]


def test_sounds_from_prompts(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/audio/generations", json={"prompt": TEXT})
    assert (answer.headers["content-type"], answer.content[:4]) == ("audio/wav", b"RIFF")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "midi"}, "response_format"),
        ({"speed": 9}, "speed"),
        ({"instructions": "softly"}, "instructions"),
        ({"extra_body": {"tempo": 2}}, "tempo"),
    ],
)
def test_wrong_fields_are_named(client: OpenAI, fields: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(model="voice", voice="alloy", input=TEXT, **fields)  # type: ignore[arg-type]
    assert caught.value.param == param
