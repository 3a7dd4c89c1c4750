"""Bounds on a request as bytes: size and pace of its body, pace and size of its headers, depth of its JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omni.server.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_guards(app: FastAPI, settings: ServerSettings) -> None:
    """Put CORS, access and body limits around an app, in this order. Call it last in `build_app`.

    `request.state.key` is the name of the caller's API key, or an empty string.
    """


def uvicorn_options(settings: ServerSettings) -> dict[str, Any]:
    """Keyword arguments of uvicorn.Config that bound headers, idle connections and their number."""
    return {}


def decode_json(body: bytes, settings: ServerSettings) -> Any:
    """A JSON body: UTF-8, no NaN, no key twice, no lone surrogates, bounded depth. Raises InputError."""
    raise NotImplementedError
