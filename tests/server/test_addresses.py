"""Fetches for a client: which hosts and addresses are reached, and what a real server can do to them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import example, given
from hypothesis import strategies as st

from omni.errors import InputError
from omni.server import addresses
from omni.server.addresses import (
    AddressRules,
    GuardedTransport,
    check_url,
    checked_address,
    fetch,
    is_public,
    open_addresses,
)

ANY = AddressRules(("*",))
PRIVATE = "is on a private, local or reserved network"

CLOSED = (
    *("0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16"),
    *("169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1"),
    *("192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1"),
    *("255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:db8::1"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1"),
    *("fe80::1%eth0", "2606:4700::1%eth0", "ff02::1"),
)
OPEN = ("1.1.1.1", "8.8.8.8", "93.184.215.14", "172.32.0.1", "100.128.0.1", "2606:4700::1", "64:ff9b::808:808")


def resolver(*found: str) -> addresses.Resolver:
    async def resolve(host: str, port: int) -> list[str]:
        return list(found)

    return resolve


# Addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CLOSED)
def test_closed_addresses(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", [*OPEN, "::ffff:8.8.8.8"])
def test_public_addresses(text: str) -> None:
    assert is_public(ip_address(text))


@given(st.ip_addresses(v=4))
@example(IPv4Address("192.0.0.9"))
def test_no_ipv4_address_is_public_that_python_calls_private(address: IPv4Address) -> None:
    if is_public(address):
        assert address.is_global
        assert not any((address.is_private, address.is_multicast, address.is_reserved, address.is_link_local))
    mapped, translated = IPv6Address(f"::ffff:{address}"), IPv6Address(int(addresses.NAT64[0]) + int(address))
    assert is_public(mapped) == is_public(translated) == is_public(address)


@given(st.ip_addresses(v=6))
def test_no_ipv6_address_is_public_that_python_calls_private(address: IPv6Address) -> None:
    if is_public(address):
        assert not any((address.is_private, address.is_multicast, address.is_link_local, address.is_site_local))
        assert address.teredo is None
        assert address.sixtofour is None


# All ways in which a browser or a C library writes 127.0.0.1: the resolver turns them into it.
NOTATIONS = (
    *("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0"),
    *("127.0.0.1.", "localhost", "LOCALHOST", "[::1]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:0:0:1]", "[::]"),
)


@pytest.mark.parametrize("host", NOTATIONS)
async def test_no_notation_reaches_this_machine(host: str) -> None:
    with pytest.raises(InputError, match=f"{PRIVATE}|has no address|is not a URL"):
        await fetch(f"http://{host}/", ANY, 100, 5.0)


@given(st.sampled_from(OPEN), st.sampled_from(CLOSED), st.booleans())
def test_one_closed_address_closes_a_name(good: str, bad: str, first: bool) -> None:
    resolve = resolver(*((bad, good) if first else (good, bad)))
    with pytest.raises(InputError, match=PRIVATE):
        asyncio.run(open_addresses("mixed.test", 80, ANY, resolve))


async def test_a_name_without_an_address_is_told() -> None:
    with pytest.raises(InputError, match=r"'gone\.test' has no address$"):
        await open_addresses("gone.test", 80, ANY, resolver())
    with pytest.raises(InputError, match=r"'gone\.test' has no address: "):
        await open_addresses("gone.test", 80, ANY, resolver("nonsense"))

    async def fail(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(InputError, match="Name or service not known"):
        await open_addresses("gone.test", 80, ANY, fail)


async def test_a_webhooks_address_is_checked() -> None:
    hooks = AddressRules(("hooks.test",), addresses.WEBHOOK_REMEDY)
    assert await checked_address("https://hooks.test/a", hooks, resolver("8.8.8.8", "1.1.1.1")) == "8.8.8.8"
    with pytest.raises(InputError, match=PRIVATE):
        await checked_address("https://hooks.test/a", hooks, resolver("10.0.0.1"))
    with pytest.raises(InputError, match=r"'other\.test' is not a host .*; start the server with --webhook-host HOST"):
        await checked_address("https://other.test/a", hooks, resolver("8.8.8.8"))


async def test_a_webhooks_host_is_looked_up_within_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(addresses, "CONNECT_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"'hooks\.test' could not be looked up within 0\.1 s"):
        await checked_address("https://hooks.test/a", ANY, hang)


# URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("media.test", "http://media.test/a.png"),
        ("media.test", "https://MEDIA.test./a.png"),
        ("media.test:8080", "http://media.test:8080/"),
        ("*.media.test", "https://a.b.media.test/"),
        ("*", "https://anything.test/"),
        ("*:81", "https://anything.test:81/"),
        ("b\u00fccher.test".encode("idna").decode(), "https://b\u00fccher.test/"),
    ],
)
def test_allowed_hosts(allowed: str, url: str) -> None:
    assert check_url(url, AddressRules((allowed,)))


@pytest.mark.parametrize(
    ("allowed", "url", "message"),
    [
        ("", "http://media.test/", "'media.test' is not a host that this server sends requests to; start the"),
        ("media.test", "http://other.test/", "'other.test' is not a host"),
        ("media.test", "http://evilmedia.test/", "'evilmedia.test' is not a host"),
        ("media.test", "http://media.test.evil.test/", "'media.test.evil.test' is not a host"),
        ("media.test", "http://media.test:8080/", "'media.test:8080' is not a host"),
        ("media.test", "https://media.test:80/", "'media.test:80' is not a host"),
        ("*.media.test", "http://media.test/", "'media.test' is not a host"),
        ("media.test:81", "http://media.test/", "'media.test' is not a host"),
        ("*", "http://user:secret@media.test/", "a URL with a user name or password is not allowed"),
        ("*", "http://media.test\\@evil.test/", "a URL with a user name or password is not allowed"),
        ("*", "ftp://media.test/", "only http and https are allowed, not 'ftp'"),
        ("*", "file:///etc/passwd", "only http and https are allowed, not 'file'"),
        ("*", "gopher://media.test/", "not 'gopher'"),
        ("*", "//media.test/", "not ''"),
        ("*", "http:///a", "names no host"),
        ("*", "http://a\r\nHost: b/", "is not a URL"),
        ("*", "http://a:99999999/", "is not a"),
        ("*", "http://\u2460.test/", "is not a URL"),
        ("*", "http://a/" + "a" * 5000, "a URL of 5009 characters is too long"),
    ],
)
def test_refused_urls(allowed: str, url: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_url(url, AddressRules((allowed,) if allowed else ()))
    assert message in str(caught.value)


@given(st.text(max_size=60) | st.text(max_size=40).map("http://".__add__) | st.text(max_size=40).map("//a@".__add__))
def test_any_text_is_a_url_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        assert check_url(text, AddressRules(("media.test",))).host.lower().rstrip(".") == "media.test"


# A real server -----------------------------------------------------------------------------------------------------


class Site:
    """An ASGI app with good and bad answers; `requests` holds what was asked for."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.clients: set[int] = set()
        """Ports from which connections came."""
        self.port = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        path = scope["path"]
        self.clients.add(scope["client"][1])
        self.requests.append((path, {key.decode(): value.decode() for key, value in scope["headers"]}))
        headers, body, status = [], b"content", 200
        match path.strip("/").split("/"):
            case ["redirect", host]:
                status, headers = 302, [(b"location", f"http://{host}/ok".encode())]
            case ["around"]:
                status, headers = 302, [(b"location", b"/around")]
            case ["file"]:
                status, headers = 302, [(b"location", b"file:///etc/passwd")]
            case ["gone"]:
                status = 404
            case ["packed"]:
                headers = [(b"content-encoding", b"gzip")]
            case ["says-big"]:
                headers, body = [(b"content-length", b"1000000")], b"x" * 1_000_000
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if path == "/endless":
            with contextlib.suppress(OSError):
                for _ in range(10_000):
                    await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
        if path == "/hangs":
            await receive()
            await receive()  # until the client leaves
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        site.port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(site, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield site
        server.should_exit = True
        thread.join(30)


def rules(site: Site) -> AddressRules:
    """Lets the site in, though it is on this machine."""
    return AddressRules((f"media.test:{site.port}",), is_open=lambda address: str(address) == "127.0.0.1")


async def get(site: Site, path: str, seconds: float = 20.0, resolve: addresses.Resolver | None = None) -> bytes:
    resolve = resolve or resolver("127.0.0.1")
    return await fetch(f"http://media.test:{site.port}{path}", rules(site), 1000, seconds, resolve=resolve)


async def test_content_is_fetched_from_the_checked_address(site: Site) -> None:
    assert await get(site, "/ok") == b"content"
    path, headers = site.requests[-1]
    assert path == "/ok"
    assert headers["host"] == f"media.test:{site.port}"
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in headers


async def test_a_name_is_looked_up_once(site: Site) -> None:
    """A name made to attack gives a good address to the check, and another to the connection."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    async def rebind(host: str, port: int) -> list[str]:
        return next(answers)

    assert await get(site, "/ok", resolve=rebind) == b"content"
    assert next(answers) == ["10.0.0.1"]  # never asked for


async def test_no_connection_is_used_twice(site: Site) -> None:
    """It could be one of another name: connections are kept by address, and the certificate was another's."""
    before = len(site.clients)
    async with httpx.AsyncClient(transport=GuardedTransport(rules(site), resolver("127.0.0.1"))) as client:
        for _ in range(3):
            assert (await client.get(f"http://media.test:{site.port}/ok")).content == b"content"
    assert len(site.clients) == before + 3


async def test_the_next_address_is_tried(site: Site) -> None:
    is_open = AddressRules((f"media.test:{site.port}",), is_open=lambda address: True)
    url = f"http://media.test:{site.port}/ok"
    assert await fetch(url, is_open, 1000, 20.0, resolve=resolver("127.0.0.2", "::1", "127.0.0.1")) == b"content"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/redirect/other.test", "'other.test' is not a host"),
        ("/redirect/169.254.169.254", "'169.254.169.254' is not a host"),
        ("/redirect/127.0.0.1", "'127.0.0.1' is not a host"),
        ("/redirect/user@media.test", "a URL with a user name or password is not allowed"),
        ("/file", "only http and https are allowed, not 'file'"),
        ("/around", "leads on more than 3 times"),
        ("/gone", "it answers 404"),
        ("/packed", "is sent packed"),
        ("/says-big", "has 1000000 bytes; at most 1000 are read"),
        ("/endless", "has more than 1000 bytes"),
    ],
)
async def test_refused_answers(site: Site, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        await get(site, path)


async def test_a_redirect_may_stay_on_the_host(site: Site) -> None:
    assert await get(site, f"/redirect/media.test:{site.port}") == b"content"
    assert site.requests[-1][0] == "/ok"


async def test_an_allowed_host_that_moves_inside_is_refused(site: Site) -> None:
    with pytest.raises(InputError, match=PRIVATE):
        await get(site, "/ok", resolve=resolver("10.0.0.1"))


async def test_a_server_that_hangs_is_left(site: Site) -> None:
    with pytest.raises(InputError, match=r"did not answer within 0\.2 s"):
        await get(site, "/hangs", seconds=0.2)


async def test_a_resolver_that_hangs_is_left(site: Site) -> None:
    async def hang(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    with pytest.raises(InputError, match=r"did not answer within 0\.1 s"):
        await get(site, "/ok", seconds=0.1, resolve=hang)


async def test_a_closed_port_is_told() -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        is_open = AddressRules((f"media.test:{port}",), is_open=lambda address: True)
        with pytest.raises(InputError, match="cannot be fetched: ConnectError"):
            await fetch(f"http://media.test:{port}/", is_open, 1000, 5.0, resolve=resolver("127.0.0.1"))


async def test_tls_asks_for_the_name_and_not_for_the_address() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=b"ok")

    transport = GuardedTransport(ANY, resolver("2606:4700::1"))
    transport._inner = httpx.MockTransport(answer)  # type: ignore[assignment]
    async with httpx.AsyncClient(transport=transport) as client:
        response = await client.post("https://Media.test/hook", content=b"{}")
    assert response.content == b"ok"
    [request] = seen
    assert str(request.url) == "https://[2606:4700::1]/hook"
    assert request.headers["host"] == "media.test"
    assert request.extensions["sni_hostname"] == "media.test"
