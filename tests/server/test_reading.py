"""Bodies to fields: JSON, forms with brackets, and faults that name their field."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from fastapi import Request

from omni.server.errors import ApiError
from omni.server.limits import JsonTexts
from omni.server.reading import Body, convert, read_body, split_fields
from omni.server.settings import ServerSettings


class Asked(msgspec.Struct):
    """What a route takes."""

    count: int = 1
    flag: bool = False
    inner: dict[str, int] = {}


def request_of(body: bytes, media_type: str | None) -> Request:
    sent = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return sent.pop()

    headers = [(b"content-type", media_type.encode())] if media_type else []
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""}, receive)


async def read(body: bytes, media_type: str | None = "application/json") -> Body:
    return await read_body(request_of(body, media_type), ServerSettings())


def form(**fields: str | list[str]) -> tuple[bytes, str]:
    parts = []
    for name, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            parts.append(f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n')
    return "".join([*parts, "--b--\r\n"]).encode(), "multipart/form-data; boundary=b"


async def test_json() -> None:
    for media_type in ("application/json; charset=utf-8", "application/vnd.api+json", None):
        body = await read(b'{"a": 1, "b": null}', media_type)
        assert (body.fields, body.is_form) == ({"a": 1}, False)


@pytest.mark.parametrize(
    ("content", "media_type", "status", "message"),
    [
        (b"[1]", "application/json", 400, "must be a JSON object, not a list"),
        (b"null", "application/json", 400, "must be a JSON object, not null"),
        (b"1", "application/json", 400, "must be a JSON object, not a number"),
        (b"a", "text/plain", 415, "send application/json or multipart/form-data"),
    ],
)
async def test_other_bodies_are_refused(content: bytes, media_type: str, status: int, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        await read(content, media_type)
    assert caught.value.status == status


async def test_forms_have_lists_and_objects() -> None:
    body = await read(*form(**{"a": "1", "b[]": ["x", "y"], "c[d]": "2", "c[e]": "3", "f": ["p", "q"], "g[h[i]": "4"}))
    assert body.is_form
    expected = {"a": "1", "b": ["x", "y"], "c": {"d": "2", "e": "3"}, "f": ["p", "q"], "g[h[i]": "4"}
    assert body.fields == expected


async def test_form_fields_have_one_shape() -> None:
    with pytest.raises(ApiError, match="'a' is given both as a value and as"):
        await read(*form(**{"a": "1", "a[b]": "2"}))
    with pytest.raises(ApiError, match="'a' is given both as a value and as an object"):
        await read(*form(**{"a[b]": "2", "a": "1"}))


def test_known_fields_are_split_from_others() -> None:
    asked, rest = split_fields(Body({"count": "3", "flag": "true", "steps": "4"}, JsonTexts(ServerSettings())), Asked)
    assert (asked, rest) == (Asked(3, True), {"steps": "4"})


@pytest.mark.parametrize(
    ("fields", "is_form", "param", "message"),
    [
        ({"count": "3"}, False, "count", "'count': expected `int`, got `str`"),
        ({"count": "x"}, True, "count", "'count': expected `int`, got `str`"),
        ({"inner": {"a": "x"}}, False, "inner[...]", "'inner[...]': expected `int`, got `str`"),
    ],
)
def test_faults_name_their_field(fields: dict[str, Any], is_form: bool, param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        split_fields(Body(json.loads(json.dumps(fields)), JsonTexts(ServerSettings()) if is_form else None), Asked)
    assert (caught.value.param, str(caught.value)) == (param, message)


def test_single_values_are_named_by_their_caller() -> None:
    with pytest.raises(ApiError, match="'steps': expected `int`") as caught:
        convert("x", int, False, "steps")
    assert caught.value.param == "steps"
