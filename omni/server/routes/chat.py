"""OpenAI's chat completions, for graphs that answer in text, in pictures, or in both."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response

from omni.graph import Graph
from omni.messages import Done, Queued, StageProgress, StageText
from omni.server.answers import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    Content,
    Delta,
    Usage,
    json_answer,
)
from omni.server.bodies import ChatRequest
from omni.server.calls import (
    TOKEN,
    Outcome,
    count_token,
    events_of,
    is_cut,
    orders_for,
    raise_if_over,
    run_all,
    run_one,
    until_left,
)
from omni.server.context import Context, idempotency_key, key_of
from omni.server.conversation import IMAGE, MESSAGES, chat_inputs
from omni.server.encoding import data_url, encode_image
from omni.server.errors import bad_request
from omni.server.fields import translate
from omni.server.graph_facts import output_types
from omni.server.jobs import JobOrder
from omni.server.openapi import EVENTS, operation
from omni.server.reading import read_body, split_fields
from omni.server.streaming import END, EventStream, ServerEvent

ERRORS = (400, 401, 404, 409, 413, 415, 429, 500, 503, 504)
Finish = Literal["stop", "length"]


class Talk(msgspec.Struct, frozen=True):
    """A checked request for a completion."""

    body: ChatRequest
    graph: Graph
    order: JobOrder
    text: str
    """Name of the output that is the text, or empty."""
    images: tuple[str, ...]
    """Names of the outputs that are pictures."""
    id: str
    created: int

    @property
    def text_stage(self) -> str:
        """The stage that writes the text."""
        return self.graph.outputs[self.text].stage if self.text else ""


class Chat:
    """The route of chat completions."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def complete(self, request: Request) -> Response:
        """Answer a conversation."""
        body, rest = split_fields(await read_body(request, self.context.settings), ChatRequest)
        ends_at = self.context.ends_at()

        async def work() -> Response:
            talk = await self._prepare(request, body, rest)
            if body.stream:
                return await EventStream.open(self._stream(talk), ends_at - time.monotonic(), END)
            return json_answer(await self._complete(talk))

        return await until_left(request, work(), ends_at - time.monotonic())

    async def _prepare(self, request: Request, body: ChatRequest, rest: dict[str, Any]) -> Talk:
        settings = self.context.settings
        if body.n > settings.max_n:
            raise bad_request(f"'n' must be at most {settings.max_n}, not {body.n}", "n")
        if body.stream and body.n > 1:
            raise bad_request("a streamed answer is one: leave 'n' out, or 'stream'", "n")
        wanted = body.modalities or ["text", "image"]
        name = self.context.choose(body.model, *wanted)
        graph = self.context.graphs[name].graph
        types = output_types(graph)
        texts = [output for output, kind in types.items() if kind == "text" and "text" in wanted]
        images = tuple(output for output, kind in types.items() if kind == "image" and "image" in wanted)
        said, pictures = chat_inputs(graph, body.messages, bool(texts) and not images)
        if both := sorted(said.keys() & rest.keys()):
            raise bad_request(f"'{both[0]}' comes from 'messages' here", both[0])
        allow_unknown = settings.allow_unknown_fields
        raw = translate(graph, {**said, **rest}, "chat", extra=body.extra_body, allow_unknown=allow_unknown)
        counted = self.context.open_media(request, name)
        inputs = await self.context.read_inputs(graph, raw, counted, body.n)
        if pictures:
            found = await self.context.read_medium(pictures, "image", MESSAGES, counted)
            is_one = len(found) == 1 and not graph.inputs[IMAGE].type.startswith("list[")
            inputs[IMAGE] = found[0] if is_one else found
        order = JobOrder(
            graph=name,
            inputs=inputs,
            seed=body.seed,
            kind="chat",
            key=key_of(request),
            idempotency_key=idempotency_key(request),
        )
        text = texts[0] if texts else ""
        return Talk(body, graph, order, text, images, f"chatcmpl-{uuid.uuid4().hex[:24]}", int(time.time()))

    async def _complete(self, talk: Talk) -> ChatCompletion:
        orders = orders_for(talk.order, talk.body.n)
        outcomes = await run_all([run_one(self.context, order) for order in orders])
        choices = [
            Choice(
                index=index,
                message=AnswerMessage(content=await content_of(talk, outcome)),
                finish_reason="length" if talk.text_stage in outcome.cut else "stop",
            )
            for index, outcome in enumerate(outcomes)
        ]
        usage = usage_of(sum(outcome.num_tokens for outcome in outcomes))
        return ChatCompletion(id=talk.id, created=talk.created, model=talk.order.graph, choices=choices, usage=usage)

    async def _stream(self, talk: Talk) -> AsyncGenerator[ServerEvent, None]:
        """Text as it is written, then pictures, then how it ended."""
        tokens: dict[str, int] = {}
        sent, finish = "", "stop"
        async with contextlib.aclosing(events_of(self.context, talk.order)) as events:
            async for event in events:
                if isinstance(event, Queued):  # accepted: what was wrong before has become an error answer
                    yield chunk(talk, Delta(role="assistant", content=""))
                count_token(event, tokens)
                raise_if_over(event)
                if isinstance(event, StageProgress) and event.stage == talk.text_stage and event.unit == TOKEN:
                    finish = "length" if is_cut(event) else "stop"
                elif isinstance(event, StageText) and event.stage == talk.text_stage:
                    sent += event.text
                    yield chunk(talk, Delta(content=event.text))
                elif isinstance(event, Done):
                    text = text_output(talk, event.outputs)
                    if text.startswith(sent) and text != sent:  # a stage that does not stream
                        yield chunk(talk, Delta(content=text[len(sent) :]))
                    if parts := await image_parts(talk, event.outputs):
                        yield chunk(talk, Delta(content=parts))
        yield chunk(talk, Delta(), finish)
        if talk.body.stream_options.include_usage:
            usage = usage_of(sum(tokens.values()))
            yield ServerEvent(
                ChatChunk(id=talk.id, created=talk.created, model=talk.order.graph, choices=[], usage=usage)
            )


def chunk(talk: Talk, delta: Delta, finish: Any = None) -> ServerEvent:
    """One event of a streamed completion."""
    choices = [ChunkChoice(delta=delta, finish_reason=finish)]
    return ServerEvent(ChatChunk(id=talk.id, created=talk.created, model=talk.order.graph, choices=choices))


async def content_of(talk: Talk, outcome: Outcome) -> Content:
    """The answer as text, or as parts when there are pictures."""
    text = text_output(talk, outcome.outputs)
    parts = await image_parts(talk, outcome.outputs)
    if not parts:
        return text
    return [*([{"type": "text", "text": text}] if text else []), *parts]


def text_output(talk: Talk, outputs: dict[str, Any]) -> str:
    """The text that the graph wrote."""
    value = outputs.get(talk.text, "")
    return "\n".join(str(item) for item in value) if isinstance(value, list) else str(value)


async def image_parts(talk: Talk, outputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The pictures that the graph drew."""
    parts = []
    for name in talk.images:
        value = outputs.get(name, [])
        for picture in value if isinstance(value, list) else [value]:
            data = await asyncio.to_thread(encode_image, picture)
            parts.append({"type": "image_url", "image_url": {"url": data_url(data, "image/png")}})
    return parts


def usage_of(num_tokens: int) -> Usage:
    """Tokens that language models of the graph wrote."""
    return Usage(completion_tokens=num_tokens, total_tokens=num_tokens)


def build_router(context: Context) -> APIRouter:
    """The route /v1/chat/completions."""
    router = APIRouter(tags=["OpenAI"])
    router.add_api_route(
        "/v1/chat/completions",
        Chat(context).complete,
        methods=["POST"],
        **operation(
            "Answer a conversation",
            answer=ChatCompletion,
            content=EVENTS,
            body=ChatRequest,
            api="chat",
            errors=ERRORS,
            headers=("Idempotency-Key",),
        ),
    )
    return router
