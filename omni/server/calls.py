"""Requests whose answer is waited for: run, collected, and aborted at once when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from omni.errors import RequestAborted, RequestFailed, RunnerError
from omni.inputs import MAX_SEED
from omni.messages import Aborted, Done, Event, Failed, StageProgress, StageText
from omni.server.context import Context
from omni.server.errors import ApiError, bad_request
from omni.server.jobs import JobOrder
from omni.server.stored import stored_events
from omni.server.timing import note_graph_seconds

T = TypeVar("T")
TOKEN = "token"
"""Unit of the progress of language models."""


class ClientLeft(ApiError):
    """The client closed its connection; nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__(499, "the client left", None, "client_left")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended well."""

    outputs: dict[str, Any]
    num_tokens: int = 0
    """Tokens that language models wrote."""
    cut: tuple[str, ...] = ()
    """The stages that wrote as much as they may."""


async def until_left(request: Request, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Await `work`; cancel it at once when the client leaves (ClientLeft) or after `seconds` (TimeoutError)."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(client_left(request.receive))
    try:
        await asyncio.wait({task, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft if leaving.done() else TimeoutError
    finally:
        for waiting in (task, leaving):
            waiting.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def client_left(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the connection is closed; the body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def events_of(context: Context, order: JobOrder) -> AsyncGenerator[Event, None]:
    """The events of one request. With an idempotency key it is a job, which the same key finds again."""
    if order.idempotency_key is not None:
        return stored_events(context.service, order)
    return _live_events(context, order)


async def _live_events(context: Context, order: JobOrder) -> AsyncGenerator[Event, None]:
    async with contextlib.aclosing(context.service.stream(order)) as events:
        async for event in events:
            yield event


async def run_one(context: Context, order: JobOrder) -> Outcome:
    """Run a request to its end. Raises RequestFailed or RequestAborted, and what the service raises."""
    tokens: dict[str, int] = {}
    ends: dict[str, bool] = {}
    async with contextlib.aclosing(events_of(context, order)) as events:
        async for event in events:
            count_token(event, tokens)
            if isinstance(event, StageProgress):
                ends[event.stage] = is_cut(event)
            if isinstance(event, Done):
                note_graph_seconds(event.seconds)
                cut = tuple(stage for stage, ended in ends.items() if ended)
                return Outcome(outputs=event.outputs, num_tokens=sum(tokens.values()), cut=cut)
            raise_if_over(event)
    raise RunnerError("the request ended without a final event")


async def run_all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run several at once; when one fails, the others are aborted and its error is raised."""
    if len(work) == 1:
        return [await work[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item) for item in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def count_token(event: Event, tokens: dict[str, int]) -> None:
    """Keep how many tokens each stage has written."""
    if isinstance(event, StageProgress) and event.unit == TOKEN:
        tokens[event.stage] = event.step
    elif isinstance(event, StageText):
        tokens.setdefault(event.stage, 0)


def is_cut(event: StageProgress) -> bool:
    """Whether a language model has written as much as it may."""
    return event.unit == TOKEN and event.step >= event.num_steps


def raise_if_over(event: Event) -> None:
    """Raise RequestFailed or RequestAborted for these final events."""
    if isinstance(event, Failed):
        raise RequestFailed(event.request_id, event.error)
    if isinstance(event, Aborted):
        raise RequestAborted(event.request_id, event.reason)


def orders_for(order: JobOrder, n: int) -> list[JobOrder]:
    """`n` orders with the seeds `seed`, `seed` + 1, ...; drawn for each when there is none."""
    if order.seed is not None and not 0 <= order.seed <= MAX_SEED:
        raise bad_request(f"seed must be a whole number from 0 to {MAX_SEED}, not {order.seed}", "seed")
    if n == 1:
        return [order]
    return [
        msgspec.structs.replace(
            order,
            seed=None if order.seed is None else (order.seed + number) % (MAX_SEED + 1),
            idempotency_key=f"{order.idempotency_key}/{number}" if order.idempotency_key else None,
        )
        for number in range(n)
    ]
