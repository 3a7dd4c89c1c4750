"""Webhooks: a POST to the address that the client named, when its job is over.

Signed as Standard Webhooks (https://www.standardwebhooks.com) says, which OpenAI's clients check: `webhook-id`,
`webhook-timestamp` and `webhook-signature: v1,BASE64(HMAC-SHA256(secret, "ID.TIMESTAMP.BODY"))`. A delivery that is
not answered with 2xx is tried again with growing pauses, by whatever server lives then; so it may come twice.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec
from sqlalchemy import Connection, select, update

from omni.errors import InputError, UsageError
from omni.server.changes import to_json
from omni.server.jobs import Job
from omni.server.service_settings import ServiceSettings
from omni.server.store import JobStore
from omni.server.tables import JOBS

CheckAddress = Callable[[str], Awaitable[str]]
"""From an address to the IP address that it may be sent to. Raises InputError."""
RenderJob = Callable[[Job], dict[str, Any]]

FIRST_PAUSE_SECONDS = 1.0
"""After the first failure; each further pause is four times as long."""
MAX_AT_ONCE = 16
log = logging.getLogger(__name__)


def plain_job(job: Job) -> dict[str, Any]:
    """A job as JSON, without what is the server's own affair."""
    shown = to_json(job)
    del shown["idempotency_key"], shown["key"]
    return dict(shown)


def sign(secret: str, webhook_id: str, timestamp: int, body: bytes) -> str:
    """The signature header. A secret `whsec_BASE64` is decoded, any other is used as it is."""
    message = f"{webhook_id}.{timestamp}.".encode() + body
    digest = hmac.new(signing_key(secret), message, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def signing_key(secret: str) -> bytes:
    """The bytes that sign. Raises UsageError for `whsec_` without base64 behind it."""
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if not key:
        raise UsageError("the webhook secret begins with whsec_, but no base64 follows; copy it whole")
    return key


class Webhooks:
    """Delivers what is due. Raises UsageError for a secret that cannot sign."""

    def __init__(
        self,
        store: JobStore,
        settings: ServiceSettings,
        check_address: CheckAddress | None,
        render_job: RenderJob,
    ) -> None:
        signing_key(settings.webhook_secret)
        self._store = store
        self._settings = settings
        self._check_address = check_address
        self._render_job = render_job
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Let connections go."""
        if self._client is not None:
            await self._client.aclose()

    async def deliver(self) -> None:
        """One round: every delivery that is due, each once. Raises StoreError."""
        if self._check_address is None:
            return
        statement = (
            select(JOBS.c.id, JOBS.c.webhook, JOBS.c.webhook_tries)
            .where(JOBS.c.webhook_at <= time.time())
            .limit(MAX_AT_ONCE)
        )
        due = await self._store.read(lambda connection: connection.execute(statement).all())
        await asyncio.gather(*(self._deliver(*row) for row in due))

    async def _deliver(self, job_id: str, address: str, tries: int) -> None:
        if not await self._take(job_id, tries):
            return
        job = await self._store.get(job_id)
        if job is not None and await self._post(job, address):
            statement = update(JOBS).where(JOBS.c.id == job_id).values(webhook_at=None)
            await self._store.write(lambda connection: connection.execute(statement))

    async def _take(self, job_id: str, tries: int) -> bool:
        """Claim one delivery: the next one is due later, or never when this is the last."""
        pause = self._settings.webhook_seconds + FIRST_PAUSE_SECONDS * 4**tries
        next_at = time.time() + pause if tries + 1 < self._settings.webhook_tries else None
        statement = (
            update(JOBS)
            .where(JOBS.c.id == job_id, JOBS.c.webhook_tries == tries, JOBS.c.webhook_at.is_not(None))
            .values(webhook_tries=tries + 1, webhook_at=next_at)
        )

        def work(connection: Connection) -> bool:
            return connection.execute(statement).rowcount == 1

        return await self._store.write(work)

    async def _post(self, job: Job, address: str) -> bool:
        """Whether the other side took it."""
        assert self._check_address is not None
        body = msgspec.json.encode(
            {"type": f"job.{job.state}", "created_at": job.finished_at, "data": self._render_job(job)}
        )
        timestamp = int(time.time())
        headers = {"content-type": "application/json", "webhook-id": job.id, "webhook-timestamp": str(timestamp)}
        if self._settings.webhook_secret:
            headers["webhook-signature"] = sign(self._settings.webhook_secret, job.id, timestamp, body)
        try:
            url = httpx.URL(address)
            target = url.copy_with(host=await self._check_address(address))
            headers["host"] = url.netloc.decode()
            async with asyncio.timeout(self._settings.webhook_seconds):
                request = self._http().build_request(
                    "POST", target, content=body, headers=headers, extensions={"sni_hostname": url.host}
                )
                answer = await self._http().send(request, stream=True)
                await answer.aclose()
        except (httpx.HTTPError, httpx.InvalidURL, InputError, TimeoutError) as error:
            log.warning("webhook of job %s: %s: %s", job.id, type(error).__name__, error)
            return False
        if not answer.is_success:
            log.warning("webhook of job %s: answered %d", job.id, answer.status_code)
        return answer.is_success

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:  # redirects are not followed, and proxies of the environment not used
            self._client = httpx.AsyncClient(
                timeout=self._settings.webhook_seconds,
                trust_env=False,
                # Connections are kept by IP address, and the certificate was checked for the name of the first use.
                limits=httpx.Limits(max_keepalive_connections=0),
            )
        return self._client
