"""OpenAI's speech, and sounds from a prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from omni.media import Audio
from omni.server.answers import SpeechDelta, SpeechDone
from omni.server.bodies import SoundRequest, SpeechRequest
from omni.server.calls import Outcome, orders_for, run_one, until_left
from omni.server.context import Context, idempotency_key, key_of
from omni.server.encoding import AUDIO_ENCODERS, AudioFormat, encode_audio
from omni.server.errors import ApiError
from omni.server.fields import translate
from omni.server.graph_facts import output_types
from omni.server.jobs import JobOrder
from omni.server.openapi import EVENTS, FILE, operation
from omni.server.reading import read_body, split_fields
from omni.server.streaming import EventStream, ServerEvent

ERRORS = (400, 401, 404, 409, 413, 415, 429, 500, 503, 504)


class Sounds:
    """The routes of sounds."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def speak(self, request: Request) -> Response:
        """Speak a text."""
        body, rest = split_fields(await read_body(request, self.context.settings), SpeechRequest)
        return await self._answer(request, body, rest, body.stream_format == "sse")

    async def generate(self, request: Request) -> Response:
        """Make a sound from a prompt."""
        body, rest = split_fields(await read_body(request, self.context.settings), SoundRequest)
        return await self._answer(request, body, rest)

    async def _order(self, request: Request, body: SpeechRequest | SoundRequest, rest: dict[str, Any]) -> JobOrder:
        name = self.context.choose(body.model, "audio")
        graph = self.context.graphs[name].graph
        allow_unknown = self.context.settings.allow_unknown_fields
        raw = translate(graph, rest, "audio", extra=body.extra_body, allow_unknown=allow_unknown)
        (order,) = orders_for(
            JobOrder(
                graph=name,
                inputs=await self.context.read_inputs(graph, raw, self.context.open_media(request, name)),
                seed=body.seed,
                kind="audio",
                key=key_of(request),
                idempotency_key=idempotency_key(request),
            ),
            1,
        )
        return order

    async def _answer(
        self, request: Request, body: SpeechRequest | SoundRequest, rest: dict[str, Any], streamed: bool = False
    ) -> Response:
        audio_format, ends_at = body.response_format, self.context.ends_at()

        async def work() -> Response:
            order = await self._order(request, body, rest)
            if streamed:
                return await EventStream.open(self._stream(order, audio_format), ends_at - time.monotonic())
            sound = await self._sound(order, audio_format)
            return Response(sound, media_type=AUDIO_ENCODERS[audio_format].media_type)

        return await until_left(request, work(), ends_at - time.monotonic())

    async def _sound(self, order: JobOrder, audio_format: AudioFormat) -> bytes:
        outcome = await run_one(self.context, order)
        sound = self._sound_of(order, outcome)
        return await asyncio.to_thread(encode_audio, sound, audio_format)

    async def _stream(self, order: JobOrder, audio_format: AudioFormat) -> AsyncGenerator[ServerEvent, None]:
        """The whole sound as one event: graphs give sounds when they are complete."""
        delta = SpeechDelta(audio=await self._sound(order, audio_format))
        yield ServerEvent(delta, "speech.audio.delta")
        usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
        yield ServerEvent(SpeechDone(usage=usage), "speech.audio.done")

    def _sound_of(self, order: JobOrder, outcome: Outcome) -> Audio:
        for name, kind in output_types(self.context.graphs[order.graph].graph).items():
            value = outcome.outputs.get(name)
            value = value[0] if isinstance(value, list) and value else value
            if kind == "audio" and isinstance(value, Audio):
                return value
        raise ApiError(500, "the graph gave no sound", None, "no_output")


def build_router(context: Context) -> APIRouter:
    """Routes below /v1/audio."""
    router, sounds = APIRouter(tags=["OpenAI"]), Sounds(context)
    content = {encoder.media_type: FILE for encoder in AUDIO_ENCODERS.values()}
    described: dict[str, Any] = {"api": "audio", "errors": ERRORS, "headers": ("Idempotency-Key",)}
    router.add_api_route(
        "/v1/audio/speech",
        sounds.speak,
        methods=["POST"],
        **operation("Speak a text", body=SpeechRequest, content=content | EVENTS, **described),
    )
    router.add_api_route(
        "/v1/audio/generations",
        sounds.generate,
        methods=["POST"],
        **operation("Make a sound from a prompt", body=SoundRequest, content=content, **described),
    )
    return router
