"""Request bodies: JSON or forms to plain fields, and fields to a checked struct and what is left over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from omni.server.errors import ApiError, bad_request
from omni.server.limits import JsonTexts, decode_json, form_limits
from omni.server.settings import ServerSettings

T = TypeVar("T", bound=msgspec.Struct)
MULTIPART = "multipart/form-data"
FORMS = (MULTIPART, "application/x-www-form-urlencoded")
BRACKETS = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*)\])?")
"""`name`, `name[]` (an item of a list) or `name[key]` (an entry of an object), as OpenAI's client writes them."""
PLACE = re.compile(r" - at `\$\.?([^`]*)`$")
MISSING = re.compile(r"Object missing required field `([^`]+)`")


class WholeParser(MultiPartParser):
    """starlette's parser, which itself drops a part that the body ends in, and reads broken UTF-8 as Latin-1."""

    is_whole = False

    def on_end(self) -> None:
        self.is_whole = True

    def on_part_begin(self) -> None:
        self._charset = "utf-8"  # whatever the header says
        super().on_part_begin()

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode()
            except UnicodeDecodeError as error:
                raise MultiPartException(f"the form's field {part.field_name[:60]!a} is not UTF-8 text") from error
        super().on_part_end()


async def read_parts(request: Request, limits: dict[str, int]) -> list[tuple[str, Any]]:
    """Names and values of a form, a file as its bytes: a client's name of it goes no further. Raises ApiError."""
    parser = WholeParser(request.headers, request.stream(), **limits)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise bad_request(error.message, None, "invalid_form") from None
    try:
        if not parser.is_whole:
            raise bad_request("the form ends before its last boundary: it is not whole", None, "invalid_form")
        items = form.multi_items()
        return [(name, await value.read() if isinstance(value, UploadFile) else value) for name, value in items]
    finally:
        await form.close()


class Body(msgspec.Struct, frozen=True):
    """The fields of a request; a file is bytes."""

    fields: dict[str, Any]
    texts: JsonTexts | None = None
    """Of a form: numbers and truth values come as text, and so does JSON, which this reads."""

    @property
    def is_form(self) -> bool:
        """Whether values come as text."""
        return self.texts is not None


async def read_body(request: Request, settings: ServerSettings) -> Body:
    """The body as fields: a JSON object, or a form. Fields that are null count as left out. Raises ApiError."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type in FORMS:
        limits = form_limits(settings)
        if media_type == MULTIPART:
            return Body(_nested(await read_parts(request, limits)), JsonTexts(settings))
        async with request.form(**limits) as form:  # no files in this kind
            return Body(_nested(list(form.multi_items())), JsonTexts(settings))
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(
            415,
            f"the body is {media_type!a}; send application/json or multipart/form-data",
            "Content-Type",
            "unsupported_media_type",
        )
    fields = decode_json(await request.body(), settings)
    if not isinstance(fields, dict):
        raise bad_request(f"the body must be a JSON object, not {_json_type(fields)}", None, "invalid_json")
    return Body({name: value for name, value in fields.items() if value is not None})


def split_fields(body: Body, struct: type[T]) -> tuple[T, dict[str, Any]]:
    """The struct's own fields, checked, and all others as they came. Raises ApiError naming the field."""
    names = set(struct.__struct_fields__)
    own = {name: value for name, value in body.fields.items() if name in names}
    rest = {name: value for name, value in body.fields.items() if name not in names}
    return convert(own, struct, body.is_form), rest


def convert(value: Any, wanted: Any, is_form: bool = False, name: str = "") -> Any:
    """`value` as the type `wanted`; from a form, text is read as numbers. Raises ApiError naming the field."""
    try:
        return msgspec.convert(value, wanted, strict=not is_form)
    except msgspec.ValidationError as error:
        message = str(error)
        place = PLACE.search(message)
        path = ".".join(part for part in (name, place.group(1) if place else "") if part)
        if missing := MISSING.match(message):
            path = ".".join(part for part in (path, missing.group(1)) if part)
            raise bad_request(f"'{path}' is missing", path, "missing_required_parameter") from None
        fault = PLACE.sub("", message)
        raise bad_request(f"'{path}': {fault[:1].lower()}{fault[1:]}" if path else fault, path or None) from None


def _nested(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Form fields with their brackets resolved; a name that comes again makes a list."""
    fields: dict[str, Any] = {}
    for name, key, value in _parts(items):
        if key:
            entry = fields.setdefault(name, {})
            if not isinstance(entry, dict):
                raise bad_request(f"'{name}' is given both as a value and as '{name}[{key}]'", name)
            entry[key] = value
        elif key == "" or name in fields:
            _append(fields, name, value)
        else:
            fields[name] = value
    return fields


def _parts(items: list[tuple[str, Any]]) -> Iterator[tuple[str, str | None, Any]]:
    for full_name, value in items:
        match = BRACKETS.fullmatch(full_name)
        yield (match.group(1), match.group(2), value) if match else (full_name, None, value)


def _append(fields: dict[str, Any], name: str, value: Any) -> None:
    held = fields.setdefault(name, [])
    if isinstance(held, dict):
        raise bad_request(f"'{name}' is given both as a value and as an object", name)
    fields[name] = [*(held if isinstance(held, list) else [held]), value]


def _json_type(value: Any) -> str:
    words = {list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return words.get(type(value), "a number")
