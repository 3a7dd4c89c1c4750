"""Errors of the HTTP API in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, with their statuses."""

from __future__ import annotations

import http
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from omni.errors import InputError, OmniError, RequestAborted, RequestFailed, StageError, UsageError
from omni.graph import nearest
from omni.server.jobs import Draining, IdempotencyConflict, QueueFull, StoreError

RETRY_SECONDS = 5
"""When another try is worth it while this server stops, or its store is away: another one may have taken over then."""
RETRIED = (408, 409)
"""Statuses besides 5xx with which OpenAI's clients send a request again, twice."""
MAX_QUOTED = 100
"""Characters of a client's text in a message."""
NAMED_INPUT = re.compile(r"(?:unknown )?input '([^']+)'|(seed|preview_every) must")


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong."""

    message: str
    """One line: what, where, and what to do."""
    type: str
    """invalid_request_error, rate_limit_error or server_error."""
    param: str | None = None
    """The field that is wrong."""
    code: str | None = None
    """A short word for programs."""
    stage: str | None = None
    """The stage of the graph that failed."""


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every answer with a status of 400 or more."""

    error: ErrorDetail


class ApiError(OmniError):
    """A request that is answered with an error. `status` is the HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        stage: str | None = None,
    ) -> None:
        super().__init__(status, message, param, code, headers, stage)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.stage = stage

    def __str__(self) -> str:
        return self.message

    def body(self) -> ErrorAnswer:
        """The answer's body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return ErrorAnswer(
            error=ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code, stage=self.stage)
        )


def answer_headers(error: ApiError) -> dict[str, str]:
    """Headers of the answer. OpenAI's clients are told not to repeat what would fail again, or cost as much again.

    Worth another try is what says when, by Retry-After.
    """
    if "Retry-After" in error.headers or (error.status < 500 and error.status not in RETRIED):
        return error.headers
    return {"x-should-retry": "false", **error.headers}


def quoted(name: str, known: Iterable[str], where: str = "") -> str:
    """A client's name in quotes, `where`, and the nearest known one; a long one is cut, and not compared."""
    if len(name) > MAX_QUOTED:
        return f"'{name[:MAX_QUOTED]}...'{where}"
    return f"'{name}'{where}{nearest(name, known)}"


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """400: the request says something that cannot be done."""
    return ApiError(400, message, param, code)


def not_found(message: str, param: str | None = None, code: str = "not_found") -> ApiError:
    """404: what the request names is not there."""
    return ApiError(404, message, param, code)


def as_api_error(error: BaseException) -> ApiError:
    """The answer to any error; what nobody raised on purpose is a 500 without details."""
    if isinstance(error, BaseExceptionGroup):  # several requests of one call: the first that failed tells
        error = error.exceptions[0]
    match error:
        case ApiError():
            return error
        case QueueFull():
            seconds = str(max(1, math.ceil(error.retry_after_seconds)))
            return ApiError(429, str(error), None, "queue_full", {"Retry-After": seconds})
        case Draining():
            return ApiError(503, str(error), None, "draining", {"Retry-After": str(RETRY_SECONDS)})
        case StoreError():
            return ApiError(503, _one_line(str(error)), None, "store_unavailable", {"Retry-After": str(RETRY_SECONDS)})
        case IdempotencyConflict():
            return ApiError(409, str(error), "Idempotency-Key", "idempotency_conflict")
        case InputError() | UsageError():
            return bad_request(str(error), _named_input(str(error)))
        case RequestFailed(error=cause):
            return as_api_error(cause)
        case StageError():
            return ApiError(500, _one_line(str(error)), None, "stage_failed", stage=error.stage)
        case RequestAborted():
            return ApiError(503, f"the request was aborted: {error.reason}", None, "aborted")
        case RequestValidationError():
            return _invalid_parameters(error.errors())
        case HTTPException():
            return _http_error(error)
        case ClientDisconnect():
            return ApiError(499, "the client left", None, "client_left")
        case TimeoutError():
            return ApiError(504, "the request took too long and was aborted", None, "timeout")
        case OmniError():
            return ApiError(500, _one_line(str(error)), None, "server_error")
    return ApiError(500, "the server failed; its log says how", None, "server_error")


def _named_input(message: str) -> str | None:
    found = NAMED_INPUT.match(message)
    return next((name for name in found.groups() if name), None) if found else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _invalid_parameters(faults: Sequence[Any]) -> ApiError:
    """What FastAPI says of path, query and header parameters."""
    place, *path = [str(part) for part in faults[0]["loc"]]
    name = ".".join(path) or place
    return bad_request(f"{place} parameter '{name}': {faults[0]['msg']}", name)


def _http_error(error: HTTPException) -> ApiError:
    """What the routing and the guards say: 404 for an unknown path, 405, 413 and others."""
    phrase = http.HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    messages = {404: "there is no such address here", 405: "this address does not take this method"}
    detail = messages.get(error.status_code, str(error.detail)) if error.detail == phrase else str(error.detail)
    return ApiError(error.status_code, detail, None, code, error.headers)
