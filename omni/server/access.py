"""Who may use the server: API keys, the names it goes by, and the web pages that may call it.

A web page can make a browser send requests to a server that only the browser reaches (`127.0.0.1`, an office network).
Two checks stop that: the `Host` header must be a name of this server, since a page can point a name of its own at any
address; and a request with an `Origin` from elsewhere must come from an allowed one.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from omni.errors import UsageError
from omni.server.refusal import App, Message, Receive, Scope, Send, header, refuse

if TYPE_CHECKING:
    from omni.server.settings import ServerSettings

VARIABLE = "OMNI_API_KEYS"
"""Environment variable with further keys, separated by commas or white space."""
MIN_SECRET_CHARS = 16
MAX_KEY_FILE_BYTES = 1024**2
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
OPEN_PATHS = frozenset(("/", "/health", "/ready", "/favicon.ico"))
"""Answered without a key: whether the server is well, and the page on which a key is typed in."""
OPEN_FOLDER = "/page/"
"""The files of the page."""
ANY_ADDRESS = "[ip]"
"""Stands for every IP address among trusted hosts: a web page can give itself any name, but no address of ours."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; object-src 'none'; "
        b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
)
"""On every answer: no foreign scripts, no guessing of types, and no page around ours."""


# Keys --------------------------------------------------------------------------------------------------------------


class ApiKey(msgspec.Struct, frozen=True):
    """A key by its name and the SHA-256 of its secret; the secret itself is not kept."""

    name: str
    digest: bytes

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"


def parse_api_keys(values: Sequence[str], environment: Mapping[str, str] = {}) -> tuple[ApiKey, ...]:
    """Keys from texts `NAME=SECRET` and `@FILE` (a key a line, `#` for comments), and from OMNI_API_KEYS.

    `environment` is where that variable is looked up. Raises UsageError, which never quotes a secret.
    """
    texts = [(text, "--api-key") for text in values if not text.startswith("@")]
    for text in values:
        if text.startswith("@"):
            texts += [(line, f"{text[1:]}:{number}") for number, line in _lines(Path(text[1:]))]
    texts += [(text, VARIABLE) for text in re.split(r"[,\s]+", environment.get(VARIABLE, "")) if text]
    keys: dict[str, ApiKey] = {}
    for text, place in texts:
        key = _parse_key(text, place)
        if key.name in keys:
            raise UsageError(f"{place}: there are two API keys of the name '{key.name}'; each key has its own")
        keys[key.name] = key
    if len({key.digest for key in keys.values()}) < len(keys):
        raise UsageError("two API keys have the same secret; each key has its own")
    return tuple(keys.values())


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_KEY_FILE_BYTES).decode()
    except OSError as error:
        raise UsageError(f"--api-key @{path}: cannot read it: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--api-key @{path}: is not UTF-8 text") from error
    found = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    keys = [(number, line) for number, line in found if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"--api-key @{path}: has no keys; write NAME=SECRET, one a line")
    return keys


def _parse_key(text: str, place: str) -> ApiKey:
    name, equals, secret = text.partition("=")
    if not equals or not KEY_NAME.fullmatch(name):
        raise UsageError(f"{place}: an API key is NAME=SECRET, its name of letters, digits and '_.-'")
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise UsageError(f"{place}: the secret of API key '{name}' has characters that no HTTP header carries")
    if len(secret) < MIN_SECRET_CHARS:
        raise UsageError(
            f"{place}: the secret of API key '{name}' has {len(secret)} characters, at least {MIN_SECRET_CHARS} are "
            "needed; `openssl rand -hex 24` makes one"
        )
    return ApiKey(name, _digest(secret.encode()))


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def find_key(keys: Sequence[ApiKey], secret: bytes) -> ApiKey | None:
    """The key with this secret. Takes as long whichever key it is, and whether there is one."""
    digest = _digest(secret)
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


# The guard ---------------------------------------------------------------------------------------------------------


class AccessGuard:
    """ASGI middleware: 400 for a foreign `Host`, 403 for a foreign `Origin`, 401 without a known key.

    `scope["state"]["key"]` (`request.state.key`) becomes the name of the key, or an empty string.
    """

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self.app = app
        self.keys = settings.api_keys
        self.trusted_hosts = settings.trusted_hosts
        if self.trusted_hosts and settings.public_url:
            self.trusted_hosts += (urlsplit(settings.public_url).hostname or "",)
        self.origins = frozenset(origin.rstrip("/").lower() for origin in settings.cors_origins)
        self.own_origin = _origin_of(settings.public_url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_securely(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message.get("headers", ())}
                more = [pair for pair in SECURITY_HEADERS if pair[0] not in given]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        host = header(scope, b"host") or b""
        origin = header(scope, b"origin")
        if not self._is_trusted(host):
            remedy = "reach it by its own name, or start it with --trusted-host NAME"
            await refuse(
                send_securely, 400, f"this server does not go by the name in the header Host; {remedy}", "host"
            )
        elif origin is not None and not self._is_allowed(origin, host):
            message = "web pages of other origins may not call this server; start it with --cors-origin ORIGIN"
            await refuse(send_securely, 403, message, "origin")
        elif (name := self._key_name(scope)) is None:
            await _refuse_key(send_securely, header(scope, b"authorization"))
        else:
            scope.setdefault("state", {})["key"] = name
            await self.app(scope, receive, send_securely)

    def _is_trusted(self, host: bytes) -> bool:
        if not self.trusted_hosts:
            return True
        name = _host_name(host)
        return any(
            name == trusted or (trusted.startswith("*.") and name.endswith(trusted[1:]))
            for trusted in self.trusted_hosts
        ) or (ANY_ADDRESS in self.trusted_hosts and _is_address(name))

    def _is_allowed(self, origin: bytes, host: bytes) -> bool:
        text, own_host = origin.decode("latin-1").lower(), host.decode("latin-1").lower()
        is_own = own_host != "" and text in (f"http://{own_host}", f"https://{own_host}", self.own_origin)
        return is_own or text in self.origins or "*" in self.origins

    def _key_name(self, scope: Scope) -> str | None:
        """Name of the caller's key, empty where none is needed; None when it is missing or wrong."""
        if not self.keys:
            return ""
        scheme, _, secret = (header(scope, b"authorization") or b"").partition(b" ")
        key = find_key(self.keys, secret.strip()) if scheme.lower() == b"bearer" else None
        if key is not None:
            return key.name
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        return "" if is_open and scope["method"] in ("GET", "HEAD") else None


async def _refuse_key(send: Send, authorization: bytes | None) -> None:
    if authorization is None:
        message = "an API key is missing: send the header 'Authorization: Bearer SECRET'"
    else:
        message = "the API key is not one of this server: 'Authorization: Bearer SECRET' needs the secret of a key"
    await refuse(send, 401, message, "invalid_api_key", ((b"www-authenticate", b"Bearer"),))


def _host_name(host: bytes) -> str:
    """The name in a `Host` header, without port and brackets, in lower case."""
    try:
        return (urlsplit(f"//{host.decode('ascii')}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _origin_of(url: str) -> str:
    """`scheme://host[:port]` of a URL, empty for an empty one."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower() if url else ""
