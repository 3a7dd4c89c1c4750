"""Requests of the server to other machines for a client: allowed hosts only, and never a private address."""

from __future__ import annotations

import httpx
import msgspec


class AddressRules(msgspec.Struct, frozen=True):
    """Hosts that may be reached: `host`, `host:port`, `*.host` or `*`; without a port, 80 and 443 are."""

    allowed_hosts: tuple[str, ...] = ()


def check_url(url: str, rules: AddressRules) -> httpx.URL:
    """The URL, when its scheme, host and port are allowed; nothing is looked up. Raises InputError."""
    raise NotImplementedError


class GuardedTransport(httpx.AsyncBaseTransport):
    """For httpx.AsyncClient: each request, redirects too, is checked, resolved once, and sent to that address."""

    def __init__(self, rules: AddressRules) -> None:
        """`rules`: which hosts may be reached."""


async def fetch(url: str, rules: AddressRules, max_bytes: int, seconds: float) -> bytes:
    """The content behind a URL. Raises InputError when it is not allowed, too large, too slow or not there."""
    raise NotImplementedError
