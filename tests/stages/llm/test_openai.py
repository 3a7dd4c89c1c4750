"""`engine: openai` against a real server on this machine."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from omni.errors import RequestAborted, StageError, StageSetupError
from omni.messages import Output, Progress, StageItem, TextDelta
from omni.registry import find_kind, import_string
from omni.spec import LlmSpec, SamplingSpec
from omni.stage import StageCall, StageContext
from stages.llm import openai

Answer = Callable[[BaseHTTPRequestHandler], None]
WAIT_SECONDS = 30


class Server:
    """A server of chat completions on this machine; `answer` writes the reply, `requests` holds what came."""

    def __init__(self) -> None:
        self.answer: Answer = stream("hello", " world")
        self.requests: list[dict[str, Any]] = []
        self.hung_up = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
                server.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def send(handler: BaseHTTPRequestHandler, *events: str) -> None:
    for event in events:
        handler.wfile.write(event.encode())
    handler.wfile.flush()


def begin(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()


def chunk(text: str | None, finish: str | None = None) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}, 'finish_reason': finish}]})}\n\n"


def stream(*pieces: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        send(handler, ": a comment\n\n", chunk(""), *(chunk(piece) for piece in pieces), chunk(None, "stop"))
        send(handler, 'data: {"choices": [], "usage": {"total_tokens": 3}}\n\n', "data: [DONE]\n\n")

    return answer


def refuse(status: int, body: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        send(handler, body)

    return answer


def say(*lines: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        send(handler, *lines)

    return answer


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@contextlib.asynccontextmanager
async def running(url: str, **options: Any) -> AsyncGenerator[Any, None]:
    spec = LlmSpec(model="qwen", engine="openai", base_url=url, **options)
    stage = import_string(find_kind("llm").stage)(StageContext(name="rewrite", spec=spec, base_dir="."))
    await stage.setup(lambda progress: None)
    try:
        yield stage
    finally:
        await stage.teardown()


async def items_of(stage: Any, request_id: str = "r", **inputs: str) -> list[StageItem]:
    call = StageCall(request_id=request_id, inputs=inputs or {"prompt": "hi"}, seed=7)
    return [item async for item in stage.run(call)]


async def test_text_is_streamed(server: Server) -> None:
    async with running(server.url) as stage:
        items = await items_of(stage)
    assert [item.text for item in items if isinstance(item, TextDelta)] == ["hello", " world"]
    assert [(item.step, item.unit) for item in items if isinstance(item, Progress)] == [(1, "token"), (2, "token")]
    assert items[-1] == Output(payload={"text": "hello world"})


async def test_what_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret\n")
    sampling = SamplingSpec(max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=4, stop=["."])
    options = {"system": "be brief", "template": "Draw {prompt}", "sampling": sampling, "api_key_env": "MY_KEY"}
    async with running(server.url + "/", **options) as stage:
        await items_of(stage)
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == "Bearer secret"
    assert request["body"] == {
        "model": "qwen",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Draw hi"}],
        "stream": True,
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 7,
        "stop": ["."],
    }


async def test_only_openais_own_fields_are_sent_by_default(server: Server) -> None:
    async with running(server.url) as stage:
        await items_of(stage)
    assert "Authorization" not in server.requests[0]["headers"]
    assert set(server.requests[0]["body"]) == {
        "model", "messages", "stream", "max_tokens", "temperature", "top_p", "seed",
    }  # fmt: skip


async def test_several_requests_at_once(server: Server) -> None:
    arrived = threading.Barrier(4)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        arrived.wait(WAIT_SECONDS)
        stream(server.requests[0]["body"]["model"])(handler)

    server.answer = answer
    async with running(server.url) as stage:
        all_items = await asyncio.gather(*(items_of(stage, request_id=str(number)) for number in range(4)))
    assert [items[-1] for items in all_items] == [Output(payload={"text": "qwen"})] * 4


OPENAI_ERROR = '{"error": {"message": "no such model", "type": "invalid_request_error"}}'


@pytest.mark.parametrize(
    ("answer", "fault", "remedy"),
    [
        (refuse(401, OPENAI_ERROR), "answers 401 Unauthorized: no such model", "check the key in MY_KEY"),
        (refuse(404, '{"detail": "Not Found"}'), "answers 404 Not Found: Not Found", "has a model 'qwen'"),
        (refuse(429, '{"error": "slow down"}'), "answers 429 Too Many Requests: slow down", "no quota left"),
        (refuse(500, "<html>oh\n no</html>"), "answers 500 Internal Server Error: <html>oh no</html>", "try again"),
        (refuse(503, ""), "answers 503 Service Unavailable", "try again"),
        (say("data: no json\n\n"), "sent what is not a chat completion", "the part of the address before"),
        (say("data: [1]\n\n"), "sent what is not a chat completion: an event of type list", "the part of the address"),
        (say("hello"), "closed the connection in the middle of its answer", "server's log"),
        (say(chunk("half")), "closed the connection in the middle of its answer", "server's log"),
        (say(chunk("half"), f"data: {OPENAI_ERROR}\n\n"), "broke off: no such model", "server's log"),
    ],
    ids=["401", "404", "429", "500", "503", "no json", "no object", "no event", "half", "error event"],
)
async def test_errors_of_the_server(
    server: Server, answer: Answer, fault: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    server.answer = answer
    async with running(server.url, api_key_env="MY_KEY") as stage:
        with pytest.raises(StageError) as caught:
            await items_of(stage)
    error = caught.value
    assert error.cause.startswith(f"the server at {server.url} {fault}")
    assert remedy in error.remedy
    assert "secret" not in str(error) + error.details


async def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        async with running(url) as stage:
            with pytest.raises(
                StageError, match=rf"{url} refuses connections \(start the server, or correct base_url\)"
            ):
                await items_of(stage)


async def test_a_server_that_falls_silent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "CHUNK_SECONDS", 0.05)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        send(handler, chunk("one"))
        handler.rfile.read(1)  # until the stage hangs up

    server.answer = answer
    async with running(server.url) as stage:
        with pytest.raises(StageError, match="did not answer in time"):
            await items_of(stage)


@pytest.mark.parametrize("pieces", [0, 1])
async def test_an_abort_hangs_up_at_once(server: Server, pieces: int) -> None:
    working = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if pieces:
            begin(handler)
            send(handler, chunk("one"))
        working.set()
        assert handler.rfile.read(1) == b""
        server.hung_up.set()

    server.answer = answer
    async with running(server.url) as stage:
        run = asyncio.ensure_future(items_of(stage, request_id="a"))
        assert await asyncio.to_thread(working.wait, WAIT_SECONDS)
        await stage.abort("a")
        with pytest.raises(RequestAborted):
            await asyncio.wait_for(run, WAIT_SECONDS)
        assert await asyncio.to_thread(server.hung_up.wait, WAIT_SECONDS)
        server.answer = stream("fine")
        assert (await items_of(stage, request_id="a"))[-1] == Output(payload={"text": "fine"})


async def test_an_empty_input(server: Server) -> None:
    async with running(server.url) as stage:
        with pytest.raises(StageError, match="its input 'prompt' is empty"):
            await items_of(stage, prompt="")
    assert not server.requests


async def test_a_key_that_is_not_set(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(StageSetupError, match=r"the environment variable MY_KEY is not set .*export MY_KEY="):
        async with running(server.url, api_key_env="MY_KEY"):
            pass
