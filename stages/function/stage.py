"""The stage of kind `function`: calls the user's function, in a worker thread or, when it is async, on the loop."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import copy
import functools
import os
import traceback
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import msgspec

from omni.errors import RequestAborted, StageError, StageSetupError, one_line
from omni.graph import nearest
from omni.messages import Output, Payload, Progress, StageItem, Started
from omni.port_types import base_type
from omni.spec import FunctionSpec
from omni.stage import Report, Stage, StageCall, StageContext
from stages.function.hints import MEDIA, class_type
from stages.function.signature import SEED, Function, FunctionFault, add_module_path, find_function


class _Result(msgspec.Struct, frozen=True):
    """What one call returned."""

    value: Any


class _Work:
    """One request at work. Nothing but `news` tells how its calls go, so that nobody has to wait for a call's end."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[Started | _Result | BaseException] = asyncio.Queue()
        self.aborted = False
        self.call: asyncio.Task[None] | Future[None] | None = None

    def cancel(self) -> None:
        """Stop the call at work; one that a thread has begun goes on, and what it returns is not read."""
        if self.call is not None:
            self.call.cancel()


class FunctionStage(Stage):
    """Runs one function; several requests at once.

    A sync function cannot be stopped: after an abort its thread runs to the end by itself, and the result is dropped.
    """

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        assert isinstance(context.spec, FunctionSpec)
        self._spec = context.spec
        num_threads = max(4, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=f"stage-{context.name}")
        self._found: Function | None = None
        self._work: dict[str, _Work] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        """Keeps calls of an async function until they have ended; the event loop itself would let them be collected."""

    async def setup(self, report: Report) -> None:
        await asyncio.to_thread(add_module_path, self.context.base_dir)
        try:
            self._found = await asyncio.to_thread(find_function, self._spec, self.context.base_dir)
        except FunctionFault as error:
            raise StageSetupError(self.context.name, "; ".join(fault.message for fault in error.mistakes)) from error

    async def run(self, call: StageCall) -> AsyncGenerator[StageItem, None]:
        assert self._found is not None, "run after setup"
        found, payloads = self._found, []
        work = self._work[call.request_id] = _Work()
        try:
            items = self._items(found, call)
            for step, inputs in enumerate([call.inputs] if items is None else items, start=1):
                self._begin(found, inputs, call, work)
                while not isinstance(news := await self._next(work, call), _Result):
                    if step == 1:
                        yield news
                payloads.append(self._payload(found, news.value))
                if items is not None:
                    yield Progress(step=step, num_steps=len(items), unit="item")
        finally:
            work.cancel()
            self._work.pop(call.request_id, None)
        yield Output(payload=payloads[0] if items is None else _joined(found, payloads))

    async def abort(self, request_id: str) -> None:
        work = self._work.get(request_id)
        if work is not None:
            work.aborted = True
            work.cancel()
            work.news.put_nowait(RequestAborted(request_id))

    async def teardown(self) -> None:
        for request_id in list(self._work):
            await self.abort(request_id)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # Inputs -------------------------------------------------------------------------------------------------------

    def _items(self, found: Function, call: StageCall) -> list[dict[str, Any]] | None:
        """The inputs of each run when some port got a list instead of its item; None for a single run."""
        lists = {
            name: value
            for name, value in call.inputs.items()
            if name in found.ports.inputs and found.ports.inputs[name].each and isinstance(value, list | tuple)
        }
        if not lists:
            return None
        if len({len(value) for value in lists.values()}) > 1:
            lengths = ", ".join(f"'{name}' has {len(value)}" for name, value in lists.items())
            raise StageError(
                self.context.name,
                f"{self._spec.call} runs once per item, but its lists have different lengths: {lengths}",
                "give lists of one length, or one value for all",
            )
        rows = zip(*lists.values(), strict=True)
        return [{**call.inputs, **dict(zip(lists, row, strict=True))} for row in rows]

    def _arguments(self, found: Function, inputs: Mapping[str, Any], call: StageCall) -> dict[str, Any]:
        values = {**copy.deepcopy(self._spec.arguments), **inputs}  # what one request writes, no other may see
        for name, port in found.ports.inputs.items():
            if port.required and values.get(name) is None:
                raise StageError(self.context.name, f"its input '{name}' is missing", f"give '{name}' or wire it")
            if name not in values and name in found.needs_none:
                values[name] = None
        if self._spec.mutates_inputs:
            values = copy.deepcopy(values)
        return {**values, SEED: call.seed} if found.wants_seed else values

    # The call -----------------------------------------------------------------------------------------------------

    def _begin(self, found: Function, inputs: Mapping[str, Any], call: StageCall, work: _Work) -> None:
        """Call the function, or queue it for a thread, unless the request was aborted."""
        if work.aborted:
            return
        arguments = self._arguments(found, inputs, call)
        positional = [arguments.pop(name) for name in found.positional if name in arguments]
        bound = functools.partial(found.function, *positional, **arguments)
        if found.is_async:
            work.call = task = asyncio.create_task(_await_call(bound, work.news.put_nowait))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            loop = asyncio.get_running_loop()
            work.call = self._pool.submit(
                _make_call, bound, lambda news: loop.call_soon_threadsafe(work.news.put_nowait, news)
            )

    async def _next(self, work: _Work, call: StageCall) -> Started | _Result:
        news = await work.news.get()
        if work.aborted or isinstance(news, asyncio.CancelledError):
            raise RequestAborted(call.request_id)
        if isinstance(news, BaseException):
            raise self._failure(news) from news
        return news

    def _failure(self, error: BaseException) -> BaseException:
        if isinstance(error, StageError | RequestAborted):
            return error
        details = traceback.format_exception(type(error), error, _users_frames(error.__traceback__))
        return StageError(self.context.name, f"{self._spec.call}: {one_line(error)}", details="".join(details))

    # Outputs ------------------------------------------------------------------------------------------------------

    def _payload(self, found: Function, result: Any) -> Payload:
        ports = found.ports.outputs
        if found.returns == "nothing":
            return {}
        if found.returns == "value":
            payload = dict.fromkeys(ports, result)
        else:
            fields = _fields(result)
            missing = [name for name in ports if name not in fields]
            if missing:
                raise StageError(
                    self.context.name,
                    f"{self._spec.call} returned no '{missing[0]}'{nearest(missing[0], fields)}; it returned "
                    f"{', '.join(fields) or type(result).__name__}",
                    f"return a dict with {', '.join(ports)}",
                )
            payload = {name: fields[name] for name in ports}
        for name, value in payload.items():
            self._check_type(name, value, ports[name].type)
        return payload

    def _check_type(self, name: str, value: Any, port_type: str) -> None:
        is_list, kind = port_type.startswith("list["), base_type(port_type)
        if is_list and not isinstance(value, list | tuple):
            wrong = type(value).__name__
        elif kind in MEDIA:
            items = value if is_list else [value]
            wrong = next((type(item).__name__ for item in items if class_type(type(item)) != kind), "")
        else:
            wrong = ""
        if wrong:
            raise StageError(
                self.context.name,
                f"{self._spec.call} returned {wrong} for the output '{name}', which is {port_type}",
                "correct the function's return hint, or the stage's `outputs`",
            )


def _make_call(function: Callable[[], Any], put: Callable[[Any], Any]) -> None:
    """Call a sync function, in a thread. Its errors are news: a Future cannot carry each one, StopIteration least."""
    put(Started())
    try:
        result = function()
    except BaseException as error:
        put(error)
    else:
        put(_Result(result))


async def _await_call(function: Callable[[], Any], put: Callable[[Any], Any]) -> None:
    """Call an async function. Its errors are news: SystemExit and KeyboardInterrupt would end the event loop."""
    put(Started())
    try:
        result = await function()
    except GeneratorExit:
        raise
    except BaseException as error:  # a cancellation too: it is the end of this task
        put(error)
    else:
        put(_Result(result))


def _joined(found: Function, payloads: list[Payload]) -> Payload:
    """One payload of lists; an output that is a list already is continued."""
    return {
        name: [item for payload in payloads for item in payload[name]]
        if port.type.startswith("list[")
        else [payload[name] for payload in payloads]
        for name, port in found.ports.outputs.items()
    }


def _fields(result: Any) -> Mapping[str, Any]:
    if isinstance(result, Mapping):
        return result
    if hasattr(result, "_fields"):
        return {name: getattr(result, name) for name in result._fields}
    return {name: getattr(result, name) for name in getattr(result, "__dataclass_fields__", ())}


def _users_frames(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of the machinery that called the function."""
    ours = (__file__, concurrent.futures.thread.__file__)
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace
