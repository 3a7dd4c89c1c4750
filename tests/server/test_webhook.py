"""Webhooks over real connections: to the checked address, signed so that OpenAI's client believes them, tried again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from sqlalchemy import select, update

from omni.errors import InputError, UsageError
from omni.server.jobs import JobOrder
from omni.server.service import Service
from omni.server.tables import JOBS
from omni.server.webhook import sign
from tests.server.conftest import WAIT_SECONDS, MakeService

SECRET = "whsec_c2VjcmV0IG9mIHRoZSB0ZXN0cw=="


class Receiver:
    """Takes POST requests on 127.0.0.1 and answers with the next status of `answers`, then 204."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.requests: asyncio.Queue[tuple[str, dict[str, str], bytes]] = asyncio.Queue()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        status = self.answers.pop(0) if self.answers else 204
        writer.write(f"HTTP/1.1 {status} X\r\nlocation: http://127.0.0.1/\r\ncontent-length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()
        await self.requests.put((head[0], headers, body))

    async def next(self) -> tuple[str, dict[str, str], dict[str, Any]]:
        line, headers, body = await asyncio.wait_for(self.requests.get(), WAIT_SECONDS)
        return line, headers, json.loads(body)

    async def check(self, url: str) -> str:
        """The address of the one host that is allowed."""
        if "//hooks.test" not in url:
            raise InputError("not a host that this server sends requests to")
        return "127.0.0.1"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    yield receiver
    server.close()
    await server.wait_closed()


def order(receiver: Receiver, prompt: str = "hi") -> JobOrder:
    meta = {"webhook": f"http://hooks.test:{receiver.port}/path?a=b"}
    return JobOrder(graph="g", inputs={"prompt": prompt}, meta=meta, key="alice")


async def webhook_of(service: Service, job_id: str) -> tuple[Any, int]:
    statement = select(JOBS.c.webhook_at, JOBS.c.webhook_tries).where(JOBS.c.id == job_id)
    row = await service.store.read(lambda connection: connection.execute(statement).one())
    return row[0], row[1]


async def test_a_finished_job_is_told(make_service: MakeService, receiver: Receiver) -> None:
    service = make_service({"g": "echo"}, check_address=receiver.check, webhook_secret=SECRET)
    await service.start()
    job = await service.submit(order(receiver))
    line, headers, message = await receiver.next()
    assert line == "POST /path?a=b HTTP/1.1"
    assert headers["host"] == f"hooks.test:{receiver.port}"
    assert (message["type"], message["data"]["id"], message["data"]["state"]) == ("job.done", job.id, "done")
    assert message["data"]["outputs"][0]["text"] == "hi"
    assert "alice" not in json.dumps(message)
    client = openai.OpenAI(api_key="x", webhook_secret=SECRET)
    body = json.dumps(message, separators=(",", ":"))
    client.webhooks.verify_signature(body, headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body.replace("done", "gone"), headers)
    while (await webhook_of(service, job.id))[0] is not None:
        await asyncio.sleep(0)
    assert (await webhook_of(service, job.id))[1] == 1


async def test_failed_and_aborted_jobs_are_told(make_service: MakeService, receiver: Receiver) -> None:
    service = make_service({"g": "fail", "h": "hold"}, check_address=receiver.check, max_running=1)
    await service.start()
    await service.submit(order(receiver))
    _, headers, message = await receiver.next()
    assert message["type"] == "job.failed"
    assert "webhook-signature" not in headers
    jobs = [
        await service.submit(JobOrder(graph="h", inputs={"prompt": "hold"}, meta=order(receiver).meta))
        for _ in range(2)
    ]
    for job in jobs:
        await service.abort(job.id)
    assert {(await receiver.next())[2]["type"] for _ in jobs} == {"job.aborted"}


@pytest.mark.parametrize("answer", [500, 302, 404])
async def test_a_refused_delivery_is_tried_again(make_service: MakeService, receiver: Receiver, answer: int) -> None:
    """By whatever server lives then."""
    first = make_service({"g": "echo"}, check_address=receiver.check)
    receiver.answers = [answer]
    await first.start()
    job = await first.submit(order(receiver))
    await receiver.next()
    async with asyncio.timeout(WAIT_SECONDS):
        while (await webhook_of(first, job.id))[1] != 1:
            await asyncio.sleep(0)
    await first.stop(0)
    second = make_service({"g": "echo"}, check_address=receiver.check)
    due_at, _ = await webhook_of(second, job.id)
    assert due_at is not None
    await second.store.write(lambda c: c.execute(update(JOBS).values(webhook_at=due_at - 3600)))
    await second.start()
    assert (await receiver.next())[2]["data"]["id"] == job.id


async def test_it_is_given_up_in_the_end(make_service: MakeService, receiver: Receiver) -> None:
    service = make_service({"g": "echo"}, check_address=receiver.check, webhook_tries=1)
    receiver.answers = [500] * 9
    await service.start()
    job = await service.submit(order(receiver))
    await receiver.next()
    assert await webhook_of(service, job.id) == (None, 1)


async def test_an_address_is_checked_before_the_job_is_taken(make_service: MakeService, receiver: Receiver) -> None:
    service = make_service({"g": "echo"}, check_address=receiver.check)
    await service.start()
    with pytest.raises(InputError, match="not a host that this server sends requests to"):
        await service.submit(JobOrder(graph="g", inputs={"prompt": "x"}, meta={"webhook": "http://elsewhere/"}))


def test_the_signature_is_the_standards() -> None:
    """The example of the standard's own documentation."""
    secret, message = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    signature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, message) == signature
    with pytest.raises(UsageError, match="begins with whsec_, but no base64 follows"):
        sign("whsec_?", "m", 1, b"")


@pytest.mark.parametrize("secret", ["whsec_", "whsec_?"])
def test_a_wrong_secret_is_found_at_the_start(make_service: MakeService, secret: str) -> None:
    with pytest.raises(UsageError, match="the webhook secret begins with whsec_, but no base64 follows; copy it whole"):
        make_service({"g": "echo"}, webhook_secret=secret)
