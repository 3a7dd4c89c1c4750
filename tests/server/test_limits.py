"""Bodies, headers and JSON: what is too large, too slow or too deep, and what is just right."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect

from omni.errors import InputError
from omni.server.limits import BodyGuard, decode_json, form_limits, uvicorn_options
from omni.server.settings import ServerSettings
from tests.server.asgi import HELD, call, echo

SMALL = ServerSettings(max_body_bytes=100, body_seconds=0.1, min_body_rate=1000)


# Bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(b"x" * 100,), (b"x" * 50, b"x" * 50), (b"",), (b"x" * 50, b"", b"x")])
async def test_bodies_within_the_limits_pass(parts: tuple[bytes, ...]) -> None:
    answer = await call(BodyGuard(echo, SMALL), method="POST", parts=parts)
    assert (answer.status, answer.body) == (200, f"None {sum(map(len, parts))}".encode())


@pytest.mark.parametrize(
    ("headers", "parts"),
    [
        ({"content-length": "101"}, [HELD]),  # nothing is read
        ({"content-length": "9" * 30}, [HELD]),
        ({}, [b"x" * 101]),
        ({}, [b"x" * 60, b"x" * 60, HELD]),  # in chunks, without a length
        ({"content-length": "10"}, [b"x" * 101]),
    ],
)
async def test_large_bodies_are_refused(headers: dict[str, str], parts: list[bytes | None]) -> None:
    answer = await call(BodyGuard(echo, SMALL), method="POST", headers=headers, parts=parts)
    assert answer.status == 413
    assert answer.headers["connection"] == "close"
    assert answer.error == {
        "message": "the body is larger than 100 bytes, the limit of this server",
        "type": "invalid_request_error",
        "param": None,
        "code": "body_too_large",
    }


@pytest.mark.parametrize("parts", [[HELD], [b"x", HELD], [b"x" * 50, b"x" * 50, HELD]])
async def test_slow_bodies_are_refused(parts: list[bytes | None]) -> None:
    answer = await call(BodyGuard(echo, SMALL), method="POST", parts=parts)
    assert answer.status == 408
    assert answer.error["message"] == "the body came too slowly: 0.1 s and 1000 bytes/s more are allowed"
    assert answer.error["code"] == "body_too_slow"


async def test_large_headers_are_refused() -> None:
    settings = ServerSettings(max_header_bytes=100)
    assert (await call(BodyGuard(echo, settings), headers={"x": "y" * 99})).status == 200
    answer = await call(BodyGuard(echo, settings), headers={"x": "y" * 50, "z": "y" * 49})
    assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
    assert answer.error["message"] == "the headers are larger than 100 bytes, the limit of this server"


async def test_after_a_refusal_the_app_is_not_heard() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.disconnect"
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 500, "headers": []})
        raise ClientDisconnect

    assert (await call(BodyGuard(app, SMALL), parts=[b"x" * 101])).status == 413


async def test_an_answer_that_has_begun_is_not_answered_again() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"

    assert (await call(BodyGuard(app, SMALL), parts=[b"x" * 101])).status == 200


async def test_waiting_for_the_client_to_leave_has_no_deadline() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        with pytest.raises(TimeoutError):  # ours, later than the guard's
            async with asyncio.timeout(0.3):
                await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    left = asyncio.Event()
    messages = iter([{"type": "http.request", "body": b"x", "more_body": False}])
    sent = []

    async def receive() -> Any:
        message = next(messages, None)
        if message is None:
            await left.wait()
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    await BodyGuard(app, SMALL)({"type": "http", "headers": []}, receive, send)
    assert [message["status"] for message in sent] == [200]


def test_form_limits_are_those_of_the_settings() -> None:
    assert form_limits(ServerSettings(max_files=2, max_fields=3, max_field_bytes=4)) == {
        "max_files": 2,
        "max_fields": 3,
        "max_part_size": 4,
    }


# A real server -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def server(settings: ServerSettings) -> AsyncIterator[int]:
    """The port of a server on this machine."""
    options = uvicorn_options(settings)
    app = BodyGuard(echo, settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", **options))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            async with asyncio.timeout(30):
                await task


async def say(port: int, *parts: bytes, hold: bool = True) -> bytes:
    """All that comes back until the server closes the connection, or the first answer when not held open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(20):
        for part in parts:
            writer.write(part)
            await writer.drain()
        answer = await reader.read() if hold else await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return answer


QUICK = ServerSettings(header_seconds=0.3, body_seconds=0.3, keep_alive_seconds=0.6, max_body_bytes=1000)
WHOLE = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def test_slow_headers_end_the_connection() -> None:
    async with server(QUICK) as port:
        assert await say(port) == b""
        assert await say(port, b"GET / HTTP/1.1\r\nHost: a\r\nX-A: ") == b""
        # The second request of a connection, too: a byte of it stops the clock of idle connections.
        answer = await say(port, WHOLE + b"G")
        assert answer.count(b"HTTP/1.1 200") == 1


async def test_quick_requests_pass_one_after_another() -> None:
    async with server(QUICK) as port:
        answer = await say(port, WHOLE, WHOLE + WHOLE[:9], WHOLE[9:])
        assert answer.count(b"HTTP/1.1 200") == 3
        assert b"server: uvicorn" not in answer


async def test_slow_and_large_bodies_end_the_connection() -> None:
    async with server(QUICK) as port:
        post = b"POST / HTTP/1.1\r\nHost: a\r\n"
        assert b" 408 Request Timeout" in await say(port, post + b"Content-Length: 10\r\n\r\nabc")
        assert b" 413 " in await say(port, post + b"Content-Length: 1001\r\n\r\n")
        chunk = b"1f4\r\n" + b"x" * 500 + b"\r\n"
        assert b" 413 " in await say(port, post + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
        assert b"None 500" in await say(port, post + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n")


async def test_huge_headers_are_refused() -> None:
    async with server(QUICK) as port:
        answer = await say(port, b"GET / HTTP/1.1\r\nHost: a\r\nX-A: " + b"x" * 40_000)
        assert answer.startswith(b"HTTP/1.1 400 ")


async def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends goes on then, and the app's other waits see the client leave."""
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 50_000_000, "more_body": True})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        ended.set()

    monkeypatch.setattr(sys.modules[__name__], "echo", app)
    async with server(ServerSettings(write_seconds=0.2)) as port, asyncio.timeout(20):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(WHOLE)
            await ended.wait()
            num_bytes = 0
            with contextlib.suppress(ConnectionResetError):
                while chunk := await asyncio.to_thread(client.recv, 65536):
                    num_bytes += len(chunk)
            assert num_bytes < 50_000_000


async def test_a_client_that_reads_slowly_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole takes longer than `write_seconds`, each step does not."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 12_000_000})

    monkeypatch.setattr(sys.modules[__name__], "echo", app)
    async with server(ServerSettings(write_seconds=0.3)) as port, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        started_at = time.monotonic()
        writer.write(WHOLE)
        num_bytes = 0
        while num_bytes < 12_000_000:
            num_bytes += len(await reader.read(1_000_000))
            if time.monotonic() - started_at < 0.6:
                await asyncio.sleep(0.02)
        writer.close()


async def test_connections_are_bounded() -> None:
    async with server(ServerSettings(max_connections=1)) as port:
        assert (await say(port, WHOLE, hold=False)).startswith(b"HTTP/1.1 503 ")


# JSON --------------------------------------------------------------------------------------------------------------

SETTINGS = ServerSettings(max_json_depth=5, max_json_items=50)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # No lone surrogates.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)


@given(JSON, st.booleans())
@example("\U0001f600 \\ud800", True)
@example("[" * 100, True)
def test_json_is_read_as_it_is(value: Any, escape: bool) -> None:
    text = json.dumps(value, ensure_ascii=escape)
    assert decode_json(text.encode(), ServerSettings(max_json_depth=100)) == value


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_body_is_json_or_an_input_error(body: bytes) -> None:
    with contextlib.suppress(InputError):
        json.dumps(decode_json(body, SETTINGS), allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON: Expecting value, line 1, column 1"),
        (b'{"a": 1,}', "the body is not JSON: "),
        (b'{"a": 1} x', "the body is not JSON: Extra data, line 1, column 10"),
        (b"\xef\xbb\xbf{}", "the body is not JSON: "),
        (b'{"a": "\xff"}', "the body is not UTF-8 text, at byte 7"),
        (b'{"a": NaN}', "the body has the number NaN, which is too large or none; numbers have up to 64 bits"),
        (b"[-Infinity]", "the body has the number -Infinity"),
        (b"[1e999]", "the body has the number 1e999"),
        (b"[9223372036854775808]", "the body has the number 9223372036854775808"),
        (b"[" + b"9" * 5000 + b"]", "the body has the number 9999999999999999999999999999999999999999, which"),
        (b'{"a": {"b": 1, "b": 2}}', "the body has the field 'b' twice"),
        (b'{"caf\xc3\xa9": 1, "caf\\u00e9": 2}', "the body has the field 'caf\\xe9' twice"),
        (b'["\\ud800"]', "the body has half a surrogate pair"),
        (b'{"\\udfff": 1}', "the body has half a surrogate pair"),
        (b"[[[[[[]]]]]]", "the body has brackets inside brackets, more than 5 deep"),
        (b'{"a":' * 7 + b"1" + b"}" * 7, "the body has brackets inside brackets, more than 5 deep"),
        (b"[" * 1_000_000, "the body has more than 50 JSON values, the limit of this server"),
        (b"[" + b"1," * 60 + b"1]", "the body has more than 50 JSON values, the limit of this server"),
    ],
)
def test_bad_json_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(InputError) as caught:
        decode_json(body, SETTINGS)
    assert message in str(caught.value)


@pytest.mark.parametrize("rest", [b'"' + b'\\"' * 500_000, b'"' + b"\\" * 1_000_001, b'"x' * 500_000])
def test_texts_without_an_end_take_no_longer_than_others(rest: bytes) -> None:
    """The event loop waits: what took the square of the length took hours."""
    started_at = time.monotonic()
    with pytest.raises(InputError, match="is not JSON"):
        decode_json(b"[]" * 6 + rest, SETTINGS)
    assert time.monotonic() - started_at < 5


def test_brackets_in_texts_are_no_depth() -> None:
    value = {"a": '[[[[[[\\"[[[[', "b": ["]]]", "{{{{{{"]}
    assert decode_json(json.dumps(value).encode(), SETTINGS) == value
