"""Requests of the server to other machines for a client: allowed hosts only, and never a private address.

A name is looked up once, all its addresses are checked, and the connection goes to one of exactly these: a name that
points elsewhere a moment later changes nothing. TLS still checks the certificate against the name. Proxies of the
environment are not used, since these would look names up themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from socket import SOCK_STREAM, gaierror

import httpx
import msgspec

from omni.errors import InputError

IPAddress = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Looks up the addresses of a host, for a port. Raises OSError."""

PORTS = {"http": 80, "https": 443}
WEBHOOK_REMEDY = "start the server with --webhook-host HOST"
MAX_REDIRECTS = 3
MAX_ADDRESSES = 8
"""Addresses of one name that are tried."""
MAX_URL_CHARS = 4096
CONNECT_SECONDS = 5.0

CLOSED_V4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind a carrier's NAT; a cloud keeps its metadata here
        "127.0.0.0/8",
        "168.63.129.16/32",  # the host of a virtual machine in a large cloud, though of a public range
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # relays to IPv6
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)
"""IPv4 ranges that are not of the public internet: IANA's special-purpose registry, and what clouds use.
Listed here, since what `ipaddress` calls global differs between Python's versions."""
OPEN_V6 = IPv6Network("2000::/3")
"""The only range of IPv6 from which IANA gives public addresses."""
CLOSED_V6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # an IPv4 address inside, reached through relays
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
NAT64 = IPv6Network("64:ff9b::/96")
"""IPv4 addresses as networks without IPv4 write them: as good as the address inside."""


def is_public(address: IPAddress) -> bool:
    """Whether an address is of the public internet, also when it is an IPv4 one inside an IPv6 one."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in CLOSED_V4)
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in OPEN_V6 and not any(address in network for network in CLOSED_V6)


class AddressRules(msgspec.Struct, frozen=True):
    """Hosts that may be reached: `host`, `host:port`, `*.host` or `*`; without a port, 80 and 443 are.

    `remedy` says in messages what lets a host in; `is_open` judges addresses.
    """

    allowed_hosts: tuple[str, ...] = ()
    remedy: str = "start the server with --allow-host HOST, or send a data URL or an upload"
    is_open: Callable[[IPAddress], bool] = is_public

    def allows(self, scheme: str, host: str, port: int) -> bool:
        """Whether a host is on the list, for a port."""
        for allowed in self.allowed_hosts:
            name, colon, wanted_port = allowed.lower().rpartition(":")
            if not colon or not wanted_port.isdigit():
                name, wanted_port = allowed.lower(), str(PORTS[scheme])
            fits = name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:]))
            if fits and int(wanted_port) == port:
                return True
        return False


def check_url(url: str, rules: AddressRules) -> httpx.URL:
    """The URL, when its scheme, host and port are allowed; nothing is looked up. Raises InputError."""
    if len(url) > MAX_URL_CHARS:
        raise InputError(f"a URL of {len(url)} characters is too long; at most {MAX_URL_CHARS} are read")
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:  # ValueError: of names that cannot be written in ASCII
        raise InputError(f"{_quote(url)} is not a URL: {error}") from error
    _check_parts(parsed, rules)
    return parsed


def _check_parts(url: httpx.URL, rules: AddressRules) -> None:
    if url.scheme not in PORTS:
        raise InputError(f"{_quote(str(url))}: only http and https are allowed, not '{url.scheme[:20]}'")
    if url.userinfo:
        raise InputError(f"{_quote(url.host)}: a URL with a user name or password is not allowed")
    host = _host_of(url)
    if not host:
        raise InputError(f"{_quote(str(url))} names no host")
    if not rules.allows(url.scheme, host, _port_of(url)):
        port = "" if url.port is None else f":{url.port}"
        raise InputError(f"'{host[:100]}{port}' is not a host that this server sends requests to; {rules.remedy}")


def _host_of(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii").lower().rstrip(".")


def _port_of(url: httpx.URL) -> int:
    return url.port if url.port is not None else PORTS[url.scheme]


def _quote(text: str) -> str:
    return repr(text[:100].encode("ascii", "backslashreplace").decode())


async def look_up(host: str, port: int) -> list[str]:
    """The addresses of a host, by the system's resolver. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def open_addresses(host: str, port: int, rules: AddressRules, resolve: Resolver = look_up) -> list[str]:
    """The addresses of a host, looked up once. Raises InputError when there are none or one of them is not open."""
    try:
        found = list(dict.fromkeys(await resolve(host, port)))
        addresses = [ip_address(text) for text in found]
    except (gaierror, UnicodeError, ValueError) as error:
        raise InputError(f"'{host[:100]}' has no address: {error}") from error
    except OSError as error:
        raise InputError(f"'{host[:100]}' could not be looked up: {error.strerror or error}") from error
    if not addresses:
        raise InputError(f"'{host[:100]}' has no address")
    # One closed address closes the name: no public service has both, and a name made to attack may.
    if not all(rules.is_open(address) for address in addresses):
        raise InputError(f"'{host[:100]}' is on a private, local or reserved network; no request is sent there")
    return found[:MAX_ADDRESSES]


async def checked_address(url: str, rules: AddressRules, resolve: Resolver = look_up) -> str:
    """The IP address that a request for `url` may be sent to. Raises InputError."""
    parsed = check_url(url, rules)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return (await open_addresses(_host_of(parsed), _port_of(parsed), rules, resolve))[0]
    except TimeoutError as error:
        raise InputError(f"'{_host_of(parsed)[:100]}' could not be looked up within {CONNECT_SECONDS:g} s") from error


class GuardedTransport(httpx.AsyncBaseTransport):
    """For httpx.AsyncClient: each request, redirects too, is checked, looked up once, and sent to that address.

    Raises InputError for what is not allowed. No connection is used twice, as that could be one of another name.
    """

    def __init__(self, rules: AddressRules, resolve: Resolver = look_up) -> None:
        self._rules = rules
        self._resolve = resolve
        limits = httpx.Limits(max_keepalive_connections=0)
        self._inner = httpx.AsyncHTTPTransport(verify=_tls(), trust_env=False, limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        _check_parts(request.url, self._rules)
        host = _host_of(request.url)
        addresses = await open_addresses(host, _port_of(request.url), self._rules, self._resolve)
        for number, address in enumerate(addresses, start=1):
            pinned = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,  # with the name in Host
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await self._inner.handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(addresses):
                    raise
        raise AssertionError("a name without addresses was refused before")

    async def aclose(self) -> None:
        await self._inner.aclose()


@functools.cache
def _tls() -> ssl.SSLContext:
    """Reading the authorities takes some 20 ms, and they stay the same."""
    return httpx.create_ssl_context(trust_env=False)


async def fetch(url: str, rules: AddressRules, max_bytes: int, seconds: float, *, resolve: Resolver = look_up) -> bytes:
    """The content behind a URL. Raises InputError when it is not allowed, too large, too slow or not there.

    `max_bytes` bounds the content, `seconds` all of it, from the look-up to the last byte, redirects and all.
    """
    parsed = check_url(url, rules)
    timeout = httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
    client = httpx.AsyncClient(
        transport=GuardedTransport(rules, resolve),
        follow_redirects=True,
        max_redirects=MAX_REDIRECTS,
        timeout=timeout,
        trust_env=False,
        # Not packed: a few KB could unpack to gigabytes.
        headers={"accept-encoding": "identity", "user-agent": "omni", "accept": "*/*"},
    )
    try:
        async with asyncio.timeout(seconds), client, client.stream("GET", parsed) as response:
            return await _read(response, max_bytes)
    except (TimeoutError, httpx.TimeoutException) as error:
        raise InputError(f"{_quote(url)} did not answer within {seconds:g} s") from error
    except httpx.TooManyRedirects as error:
        raise InputError(f"{_quote(url)} leads on more than {MAX_REDIRECTS} times") from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise InputError(f"{_quote(url)} cannot be fetched: {type(error).__name__}") from error


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    where = _quote(str(response.url))
    if response.status_code != 200:
        raise InputError(f"{where} cannot be fetched: it answers {response.status_code}")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise InputError(f"{where} is sent packed, though it was asked for as it is")
    length = response.headers.get("content-length", "")
    data = bytearray()
    with contextlib.suppress(ValueError):
        if int(length) > max_bytes:
            raise InputError(f"{where} has {int(length)} bytes; at most {max_bytes} are read")
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > max_bytes:
            raise InputError(f"{where} has more than {max_bytes} bytes; at most these are read")
    return bytes(data)
