"""The LLM stage for `engine: openai`: streams from any server that speaks OpenAI's chat completions.

The standard library's HTTP client, in a thread per request, is all that this takes: no dependency, and no worker
process, since the model is elsewhere.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from omni.errors import RequestAborted, StageError, StageSetupError
from omni.messages import Payload, Progress, TextDelta
from omni.spec import LlmSpec
from omni.stage import Report, StageCall, StageContext, ThreadedStage, Work
from stages.llm.prompt import build_messages

CONNECT_SECONDS = 10.0
CHUNK_SECONDS = 120.0
"""Longest silence of the server, before its first piece of text and between two."""
NUM_REQUESTS = 32
"""Requests sent at once; the server batches them as it likes."""
MAX_LINE_BYTES = 1 << 20
MAX_ERROR_BYTES = 1 << 16


class OpenAiStage(ThreadedStage):
    """A language model behind an address."""

    num_workers = NUM_REQUESTS

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        assert isinstance(context.spec, LlmSpec)
        self._spec = context.spec
        self._url = urlsplit(context.spec.base_url.rstrip("/") + "/chat/completions")
        self._key = ""
        self._sockets: dict[str, socket.socket] = {}

    def load(self, report: Report) -> None:
        name = self._spec.api_key_env
        if not name:
            return
        self._key = os.environ.get(name, "").strip()
        if not self._key:
            raise StageSetupError(
                self.context.name,
                f"the environment variable {name} is not set",
                f"put the key into it: export {name}=...",
            )

    def compute(self, call: StageCall, work: Work) -> Payload:
        num_tokens = self._spec.sampling.max_new_tokens
        text, step = "", 0
        connection = self._new_connection()
        try:
            for delta in self._stream(connection, call, work.stop):
                step += 1
                text += delta
                work.emit(Progress(step=min(step, num_tokens), num_steps=num_tokens, unit="token"))
                work.emit(TextDelta(text=delta))
        except (OSError, http.client.HTTPException, ValueError, StageError) as error:
            work.raise_if_aborted()  # `abort` has hung up
            if isinstance(error, StageError):
                raise
            raise self._failure(error) from error
        finally:
            self._sockets.pop(call.request_id, None)
            connection.close()
        return {"text": text}

    async def abort(self, request_id: str) -> None:
        await super().abort(request_id)
        self._hang_up(request_id)

    async def teardown(self) -> None:
        for request_id, (work, _, _) in list(self._runs.items()):
            work.stop.set()
            self._hang_up(request_id)
        await super().teardown()

    def _hang_up(self, request_id: str) -> None:
        """Wake the thread that reads from the server; closing the connection would not."""
        sock = self._sockets.get(request_id)
        if sock is not None:
            with contextlib.suppress(OSError):  # it is gone already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    # The request --------------------------------------------------------------------------------------------------

    def _body(self, call: StageCall) -> dict[str, Any]:
        sampling = self._spec.sampling
        body: dict[str, Any] = {
            "model": self._spec.model,
            "messages": build_messages(self._spec, call.inputs, self.context.name),
            "stream": True,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": call.seed,
        }
        # Not in OpenAI's own API, which refuses unknown fields; vLLM and others take them.
        extra = {"top_k": (sampling.top_k, 0), "repetition_penalty": (sampling.repetition_penalty, 1.0)}
        body |= {name: value for name, (value, default) in extra.items() if value != default}
        return body | ({"stop": sampling.stop} if sampling.stop else {})

    def _new_connection(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=context)
        return http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)

    def _stream(self, connection: http.client.HTTPConnection, call: StageCall, stop: threading.Event) -> Iterator[str]:
        """Pieces of the answer as they come."""
        body = json.dumps(self._body(call)).encode()
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.connect()
        connection.sock.settimeout(CHUNK_SECONDS)
        self._sockets[call.request_id] = connection.sock
        if stop.is_set():
            raise RequestAborted(call.request_id)
        connection.request("POST", self._url.path, body, headers)
        with contextlib.closing(connection.getresponse()) as response:
            if response.status != 200:
                raise self._refusal(response)
            yield from self._pieces(response, call, stop)

    def _pieces(self, response: http.client.HTTPResponse, call: StageCall, stop: threading.Event) -> Iterator[str]:
        finished = False
        for data in _events(response):
            if stop.is_set():
                raise RequestAborted(call.request_id)
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if not isinstance(chunk, dict):
                raise ValueError(f"an event of type {type(chunk).__name__}")
            if chunk.get("error"):
                raise self._error(f"broke off: {_message(chunk)}", "look at the server's log")
            for choice in chunk.get("choices") or ():
                delta = (choice.get("delta") or {}).get("content")
                if delta:
                    yield delta
                finished = finished or choice.get("finish_reason") is not None
        if not finished:
            raise self._error("closed the connection in the middle of its answer", "look at the server's log")

    # Errors -------------------------------------------------------------------------------------------------------

    def _error(self, fault: str, remedy: str) -> StageError:
        return StageError(self.context.name, f"the server at {self._spec.base_url} {fault}", remedy)

    def _failure(self, error: Exception) -> StageError:
        match error:
            case TimeoutError():
                return self._error("did not answer in time", "see whether it is overloaded or still loads its model")
            case ConnectionRefusedError():
                return self._error("refuses connections", "start the server, or correct base_url")
            case socket.gaierror():
                return self._error("has an unknown host name", "correct base_url")
            case ssl.SSLError():
                return self._error(f"has no valid certificate: {error.reason}", "correct base_url, or its certificate")
            case OSError() | http.client.HTTPException():
                return self._error(f"broke the connection: {type(error).__name__}: {error}", "look at the server's log")
        fault = f"sent what is not a chat completion: {error}"
        return self._error(fault, "base_url must be the part of the address before /chat/completions")

    def _refusal(self, response: http.client.HTTPResponse) -> StageError:
        status, text = response.status, response.read(MAX_ERROR_BYTES).decode(errors="replace")
        try:
            said = _message(json.loads(text))
        except ValueError:
            said = " ".join(text.split())[:200]
        key = self._spec.api_key_env
        remedies = {
            401: f"check the key in {key}" if key else "name the variable that holds your key: api_key_env",
            403: "the key may not use this model",
            404: f"check that base_url ends in /v1 or the like, and that the server has a model '{self._spec.model}'",
            429: "too many requests or no quota left; wait, or raise the limit",
        }
        remedy = remedies.get(status, "try again; if it stays, look at the server's log" if status >= 500 else "")
        return self._error(f"answers {status} {response.reason}: {said}", remedy)


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of each server-sent event; ValueError for a line that is too long."""
    data: list[str] = []
    while line := response.readline(MAX_LINE_BYTES):
        if len(line) >= MAX_LINE_BYTES:
            raise ValueError("a line of more than a megabyte")
        text = line.decode().rstrip("\r\n")
        if not text and data:
            yield "\n".join(data)
            data = []
        elif text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
    if data:
        yield "\n".join(data)


def _message(answer: Any) -> str:
    """What an error answer says, in OpenAI's shape or the usual others."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return " ".join(str(error).split())[:300]
