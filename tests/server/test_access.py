"""Keys, names of the server, and web pages: who gets through, and what the others are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.errors import UsageError
from omni.server.access import ANY_ADDRESS, AccessGuard, ApiKey, find_key, parse_api_keys
from omni.server.settings import ServerSettings
from tests.server.asgi import Answer, call, echo

SECRET = "s3cret-" + "0123456789abcdef"
OTHER = "other-" + "0123456789abcdef"
KEYS = parse_api_keys([f"anna={SECRET}", f"ben={OTHER}"])


async def ask(settings: ServerSettings, path: str = "/v1/models", method: str = "GET", **headers: str) -> Answer:
    guard = AccessGuard(echo, settings)
    return await call(guard, path, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})


# Reading keys ------------------------------------------------------------------------------------------------------


def test_keys_come_from_arguments_files_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# people\n\nbob={'b' * 20}==\n  carl={'c' * 20}  \n")
    found = parse_api_keys(
        [f"anna={SECRET}", f"@{file}"], {"OMNI_API_KEYS": f"dora={'d' * 20},\n emil={'e' * 20} ", "HOME": "x=y"}
    )
    assert [key.name for key in found] == ["anna", "bob", "carl", "dora", "emil"]
    assert find_key(found, b"b" * 20 + b"==") == found[1]
    assert find_key(found, b"b" * 20) is None


def test_a_secret_is_not_kept() -> None:
    assert SECRET not in repr(KEYS) + repr(ServerSettings(api_keys=KEYS))
    assert repr(KEYS[0]) == "ApiKey('anna')"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SECRET, "--api-key: an API key is NAME=SECRET, its name of letters, digits and '_.-'"),
        (f"={SECRET}", "an API key is NAME=SECRET"),
        (f"a b={SECRET}", "an API key is NAME=SECRET"),
        ("anna=short", "the secret of API key 'anna' has 5 characters, at least 16 are needed; `openssl rand -hex 24`"),
        (f"anna={SECRET}\n", "the secret of API key 'anna' has characters that no HTTP header carries"),
        (f"anna={SECRET} x", "has characters that no HTTP header carries"),
        (f"anna={SECRET}\u00e9", "has characters that no HTTP header carries"),
        ("@nowhere", "--api-key @nowhere: cannot read it: No such file or directory"),
    ],
)
def test_bad_keys_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_api_keys([text])
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)


def test_bad_key_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    with pytest.raises(UsageError, match="has no keys; write NAME=SECRET, one a line"):
        parse_api_keys([f"@{file}"])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        parse_api_keys([f"@{file}"])
    file.write_text(f"anna={SECRET}\nben=short\n")
    with pytest.raises(UsageError, match="keys:2: the secret of API key 'ben'"):
        parse_api_keys([f"@{file}"])


def test_each_key_has_its_own_name_and_secret() -> None:
    with pytest.raises(UsageError, match="two API keys of the name 'anna'"):
        parse_api_keys([f"anna={SECRET}", f"anna={OTHER}"])
    with pytest.raises(UsageError, match="two API keys have the same secret"):
        parse_api_keys([f"anna={SECRET}", f"ben={SECRET}"])


@given(st.binary())
def test_no_other_secret_is_a_key(secret: bytes) -> None:
    found = find_key(KEYS, secret)
    assert (found is not None) == (secret in (SECRET.encode(), OTHER.encode()))


def test_all_keys_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert find_key(KEYS, SECRET.encode()) == KEYS[0]
    assert compared == [key.digest for key in KEYS]


# Keys in requests --------------------------------------------------------------------------------------------------


async def test_the_app_learns_whose_key_it_is() -> None:
    settings = ServerSettings(api_keys=KEYS)
    assert (await ask(settings, authorization=f"Bearer {OTHER}")).body == b"ben 0"
    assert (await ask(settings, authorization=f"bearer  {SECRET} ")).body == b"anna 0"
    assert (await ask(ServerSettings())).body == b" 0"


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {SECRET}", SECRET, f"Bearer {SECRET}x", f"Bearer {SECRET[:-1]}"],
)
async def test_wrong_keys_are_refused(authorization: str) -> None:
    answer = await ask(ServerSettings(api_keys=KEYS), authorization=authorization)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["connection"] == "close"
    assert answer.error == {
        "message": "the API key is not one of this server: 'Authorization: Bearer SECRET' needs the secret of a key",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }


async def test_a_missing_key_is_asked_for() -> None:
    answer = await ask(ServerSettings(api_keys=KEYS))
    assert answer.status == 401
    assert answer.error["message"] == "an API key is missing: send the header 'Authorization: Bearer SECRET'"


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 200),
        ("/health", "GET", 200),
        ("/ready", "HEAD", 200),
        ("/page/app.js", "GET", 200),
        ("/health", "POST", 401),
        ("/page", "GET", 401),
        ("/health/", "GET", 401),
        ("//", "GET", 401),
        ("/metrics", "GET", 401),
        ("/openapi.json", "GET", 401),
        ("/v1/jobs", "OPTIONS", 401),
        ("/v1/page/", "GET", 401),
    ],
)
async def test_open_paths(path: str, method: str, status: int) -> None:
    assert (await ask(ServerSettings(api_keys=KEYS), path, method)).status == status


async def test_other_traffic_passes_by() -> None:
    reached = []

    async def app(scope: object, receive: object, send: object) -> None:
        reached.append(scope)

    await call(AccessGuard(app, ServerSettings(api_keys=KEYS)), scope_type="lifespan")
    assert len(reached) == 1


# Hosts and origins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST.", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("a.studio.test", 200),
        ("studio.test", 400),
        ("evil.test", 400),
        ("localhost.evil.test:8000", 400),
        ("evilstudio.test", 400),
        ("127.0.0.1@evil.test", 400),
        ("evil.test:80:localhost", 400),
        ("[::1", 400),
        ("caf\u00e9", 400),
        ("", 400),
    ],
)
async def test_the_server_answers_to_its_own_names_only(host: str, status: int) -> None:
    settings = ServerSettings(trusted_hosts=("localhost", "127.0.0.1", "::1", "*.studio.test"))
    answer = await ask(settings, host=host)
    assert answer.status == status
    if status == 400:
        message = "this server does not go by the name in the header Host; reach it by its own name, or start it"
        assert answer.error["message"].startswith(message)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("https://localhost:8000", 200),
        ("https://public.test", 200),
        ("https://studio.test", 200),
        ("https://STUDIO.test", 200),
        ("http://studio.test", 403),
        ("https://studio.test:444", 403),
        ("http://localhost:8001", 403),
        ("http://evil.test", 403),
        ("null", 403),
        ("file://", 403),
        ("", 403),
    ],
)
async def test_pages_of_other_origins_are_refused(origin: str, status: int) -> None:
    settings = ServerSettings(cors_origins=("https://studio.test/",), public_url="https://public.test/omni")
    answer = await ask(settings, host="localhost:8000", origin=origin)
    assert answer.status == status
    if status == 403:
        message = "web pages of other origins may not call this server; start it with --cors-origin ORIGIN"
        assert answer.error["message"] == message


async def test_an_origin_without_a_host_is_foreign() -> None:
    for origin in ("null", "file://", "http://"):
        assert (await ask(ServerSettings(), origin=origin)).status == 403


async def test_the_public_url_is_a_name_of_the_server() -> None:
    settings = ServerSettings(trusted_hosts=("localhost",), public_url="https://public.test:8443/omni")
    assert [(await ask(settings, host=host)).status for host in ("public.test", "localhost", "evil.test")] == [
        200,
        200,
        400,
    ]


async def test_every_page_may_be_let_in() -> None:
    assert (await ask(ServerSettings(cors_origins=("*",)), host="a", origin="null")).status == 200


async def test_answers_carry_security_headers() -> None:
    for settings in (ServerSettings(), ServerSettings(api_keys=KEYS)):
        answer = await ask(settings)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'self'" in answer.headers["content-security-policy"]


async def test_the_app_may_set_a_security_header_itself() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Frame-Options", b"SAMEORIGIN")]})  # type: ignore[operator]

    answer = await call(AccessGuard(app, ServerSettings()))
    assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"
    assert "x-frame-options" not in answer.headers


def test_a_key_has_a_name_and_a_digest() -> None:
    assert len(ApiKey("a", KEYS[0].digest).digest) == 32


@pytest.mark.parametrize(
    ("host", "status"),
    [("192.168.0.7:8000", 200), ("[fd00::7]:8000", 200), ("localhost", 200), ("img.test", 200), ("evil.test", 400)],
)
async def test_a_page_with_a_name_of_its_own_making_reaches_no_address(host: str, status: int) -> None:
    """Its name leads to the server, and its origin is that name: only the name gives it away."""
    settings = ServerSettings(trusted_hosts=(ANY_ADDRESS, "localhost"), public_url="https://img.test/omni")
    assert (await ask(settings, host=host, origin=f"http://{host}")).status == status
