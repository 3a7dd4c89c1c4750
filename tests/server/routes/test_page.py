"""The route of the page: types, caching, policy, and its size. No browser."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from omni.server.routes.page import build_router
from omni.server.settings import ServerSettings

MAX_BYTES = 90_000
MAX_PACKED_BYTES = 32_000


@pytest.fixture
def client() -> Iterator[TestClient]:
    """An app with the page only."""
    app = FastAPI()
    app.include_router(build_router(ServerSettings(max_media_bytes=12345)))
    with TestClient(app) as client:
        yield client


def files_of(client: TestClient) -> list[str]:
    """What index.html loads."""
    return sorted(set(re.findall(r'(?:src|href)="(page/[^"]+)"', client.get("/").text)))


def test_index(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert 'name="omni-max-media-bytes" content="12345"' in answer.text
    assert "{" not in answer.text
    assert client.get("/", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert client.get("/", headers={"If-None-Match": '"another"'}).status_code == 200
    assert client.head("/").headers["etag"] == answer.headers["etag"]


def test_policy_leaves_nothing_open(client: TestClient) -> None:
    for path in ("/", *files_of(client), "page/none.js"):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    html = client.get("/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", html)


def test_files_are_kept_for_ever_under_their_version(client: TestClient, root: Path) -> None:
    paths = files_of(client)
    folder = root / "omni/server/page"
    assert {path.rpartition("/")[2] for path in paths} == {file.name for file in folder.iterdir()} - {"index.html"}
    types = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    for path in paths:
        answer = client.get(path)
        assert answer.headers["content-type"] == types[path.rpartition(".")[2]]
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.text == (folder / path.rpartition("/")[2]).read_text()


@pytest.mark.parametrize("path", ["", "index.html", "x/app.js", "../settings.py", "%2e%2e/settings.py"])
def test_nothing_else_is_there(client: TestClient, path: str) -> None:
    assert client.get(f"page/{path}").status_code == 404


def test_small(client: TestClient) -> None:
    plain = packed = 0
    for path in ("/", *files_of(client)):
        with client.stream("GET", path, headers={"Accept-Encoding": "gzip"}) as answer:
            assert answer.headers["content-encoding"] == "gzip"
            sent = b"".join(answer.iter_raw())
        alone = client.get(path, headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in alone.headers
        assert gzip.decompress(sent) == alone.content
        packed, plain = packed + len(sent), plain + len(alone.content)
    assert plain < MAX_BYTES
    assert packed < MAX_PACKED_BYTES


def test_files_are_ascii_and_short(root: Path) -> None:
    for file in (root / "omni/server/page").iterdir():
        text = file.read_text()
        assert text.isascii(), file.name
        assert len(text.splitlines()) < 400, file.name
