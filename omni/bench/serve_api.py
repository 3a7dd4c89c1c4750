"""How `omni bench serve` asks a graph: by the OpenAI call that fits its outputs, or by a job that is waited for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from omni.errors import UsageError

if TYPE_CHECKING:
    from omni.bench.server_process import Server

PROMPT = "request {number}"
WAIT_SECONDS = 60
CALLS = {"text": "chat", "image": "image"}
"""Type of an output -> API that gives it."""


class Api(msgspec.Struct, frozen=True):
    """One kind of request; `{number}` in `body` and `expect` becomes its number."""

    name: str
    graph: str
    path: str
    body: str
    headers: dict[str, str] = {}
    expect: str = ""


def choose_api(server: Server, graph: str | None, api: str, inputs: Sequence[str] = (), prompt: str = PROMPT) -> Api:
    """How to ask `graph`, or the server's only graph. Raises UsageError."""
    found = server.ask("GET", "/v1/graphs")["data"]
    names = [item["name"] for item in found]
    chosen = [item for item in found if graph in (None, item["name"])]
    if len(chosen) != 1:
        raise UsageError(f"GRAPH must be one of the server's: {', '.join(names)}")
    name, outputs = chosen[0]["name"], chosen[0]["outputs"]
    if api == "auto":
        types = [str(port_type).removeprefix("list[").rstrip("]") for port_type in outputs.values()]
        api = next((CALLS[port_type] for port_type in types if port_type in CALLS), "job")
    is_echo = set(outputs) == {"text"} and name == "noop"
    values = {"prompt": prompt, **parse_inputs(inputs)}
    return _build(api, name, values, prompt if is_echo else "")


def _build(api: str, graph: str, inputs: dict[str, Any], expect: str) -> Api:
    if api == "chat":
        body: dict[str, Any] = {"model": graph, "messages": [{"role": "user", "content": inputs["prompt"]}]}
        return Api(api, graph, "/v1/chat/completions", json.dumps(body), expect=expect)
    if api == "image":
        body = {"model": graph, "prompt": inputs["prompt"], "response_format": "b64_json"}
        return Api(api, graph, "/v1/images/generations", json.dumps(body))
    body = {"inputs": inputs}
    headers = {"Prefer": f"wait={WAIT_SECONDS}"}
    return Api(api, graph, f"/v1/graphs/{graph}/jobs", json.dumps(body), headers, expect=expect)


def parse_inputs(texts: Sequence[str]) -> dict[str, Any]:
    """Inputs by NAME=VALUE: JSON where it is any, else text."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UsageError(f"--input {text}: give NAME=VALUE")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values
