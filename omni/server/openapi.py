"""The OpenAPI document: bodies and answers are described by their msgspec structs, errors by one schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi

from omni.server.errors import ErrorAnswer
from omni.server.fields import PARAMETERS, Api

REF = "#/components/schemas/{name}"
ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "What the request names is not there.",
    409: "The request does not fit what is there.",
    413: "The body is too large.",
    415: "The body is of another type.",
    429: "Too many requests wait; `Retry-After` says when to try again.",
    500: "A stage failed; `stage` names it.",
    503: "The server stops, or a stage does not answer.",
    504: "The request took too long.",
}
FILE = {"type": "string", "format": "binary"}
EVENT = {"type": "object", "properties": {name: {"type": "string"} for name in ("event", "data", "id")}}
"""One server-sent event; its data is JSON."""
EVENTS = {"text/event-stream": EVENT}


NO_CONTENT = 204


Routes = tuple[tuple[str, str, Any, dict[str, Any]], ...]
"""Method, path, handler, and what `operation` is told of it; by default with ROUTE_ERRORS."""
ROUTE_ERRORS = (400, 401, 404)


def add_routes(router: APIRouter, routes: Routes) -> None:
    """Add routes with their descriptions."""
    for method, path, handler, described in routes:
        router.add_api_route(path, handler, methods=[method], **operation(**{"errors": ROUTE_ERRORS, **described}))


def operation(
    summary: str,
    *,
    answer: Any = None,
    status: int = 200,
    also: Sequence[int] = (),
    content: dict[str, Any] | None = None,
    body: type[msgspec.Struct] | None = None,
    api: Api | None = None,
    files: Sequence[str] = (),
    errors: Sequence[int] = (400, 401),
    headers: Sequence[str] = (),
) -> dict[str, Any]:
    """Arguments of a route that describe it.

    `answer` is the struct of its JSON, sent with `status` or one of `also`; `content` describes what it may answer
    besides (media type -> schema), `api` adds the parameters of omni/server/fields.py to `body`, `files` name the
    fields of a form that are files, `headers` the request headers that it reads.
    """
    answers: dict[str, Any] = {}
    if answer is not None:
        answers["application/json"] = {"schema": reference(answer)}
    answers |= {media_type: {"schema": schema} for media_type, schema in (content or {}).items()}
    described: dict[int | str, Any] = {code: {"description": summary, "content": answers} for code in (status, *also)}
    if NO_CONTENT in described:
        described[NO_CONTENT] = {"description": f"{summary}: nothing more"}
    for code in errors:
        described[code] = {"description": ERRORS[code], "content": {"application/json": {"schema": _error()}}}
    extra: dict[str, Any] = {}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": _body_content(body, api, files)}
    if headers:
        extra["parameters"] = [
            {"name": name, "in": "header", "required": False, "schema": {"type": "string"}} for name in headers
        ]
    return {"summary": summary, "responses": described, "status_code": status, "openapi_extra": extra}


def describe(app: FastAPI, structs: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    """The whole document; `structs` are all that routes refer to."""
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    _, components = msgspec.json.schema_components([*structs, ErrorAnswer], ref_template=REF)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # answered as 400 in OpenAI's shape
        schemas.pop(name, None)
    schemas.update(components)
    for path in document["paths"].values():
        for described in path.values():
            described["responses"].pop("422", None)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]
    return document


def reference(answer: Any) -> dict[str, Any]:
    """The schema of a struct that `describe` is given; a schema stays as it is."""
    if isinstance(answer, dict):
        return answer
    return {"$ref": REF.format(name=answer.__name__)}


def _error() -> dict[str, Any]:
    return reference(ErrorAnswer)


def _body_content(body: type[msgspec.Struct], api: Api | None, files: Sequence[str]) -> dict[str, Any]:
    schema = body_schema(body, api)
    content = {"application/json": {"schema": schema}}
    if files:
        as_form = {"type": "array", "items": FILE}
        properties = schema["properties"] | {name: {"anyOf": [FILE, as_form]} for name in files}
        content["multipart/form-data"] = {"schema": schema | {"properties": properties}}
    return content


def body_schema(body: type[msgspec.Struct], api: Api | None) -> dict[str, Any]:
    """JSON Schema of a route's body: its own fields, the parameters, and any input of the graph."""
    (_,), components = msgspec.json.schema_components([body], ref_template=REF)
    schema = dict(components[body.__name__])
    properties = dict(schema.get("properties", {}))
    for parameter in PARAMETERS:
        if api in parameter.apis:
            described = msgspec.json.schema(parameter.type) | {"description": parameter.description}
            properties |= dict.fromkeys(parameter.names, described)
    extra = {"description": "Any other input of the graph."} if api else schema.get("additionalProperties", True)
    return schema | {"properties": properties, "additionalProperties": extra}
