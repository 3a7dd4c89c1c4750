"""From what a caller gives to the fields of a Request: names, types and defaults are checked here, once."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from omni.errors import InputError
from omni.graph import FromRequest, Graph, base_type, nearest, sources_of
from omni.media import Audio, Video
from omni.messages import Request
from omni.transport.payload import is_array, is_image, is_tensor

MAX_SEED = 2**32 - 1


def build_request(
    graph: Graph,
    fields: Mapping[str, Any],
    seed: int | None = None,
    request_id: str | None = None,
    preview_every: int = 0,
) -> Request:
    """A checked request. A missing seed is drawn at random; None values count as left out.

    Raises InputError naming the field, what is allowed and the nearest match.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name not in graph.inputs:
            allowed = ", ".join(sorted(graph.inputs)) or "none"
            raise InputError(f"unknown input '{name}'{nearest(name, graph.inputs)} (this graph takes: {allowed})")
        _check_type(graph, name, value)
        _check_unicode(name, value)
    specs = graph.inputs.items()
    # Copies: a stage may write into what it gets, and the graph's own would change for all later requests.
    defaults = {name: copy.deepcopy(spec.default) for name, spec in specs if spec.default is not msgspec.UNSET}
    values = {**defaults, **given}
    for name, stage in _required_fields(graph).items():
        if name not in values:
            raise InputError(f"input '{name}' is missing: stage '{stage}' needs it")
    if seed is None:
        seed = random.SystemRandom().randrange(MAX_SEED + 1)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed must be a whole number from 0 to {MAX_SEED}, not {seed!r}")
    if not isinstance(preview_every, int) or isinstance(preview_every, bool) or preview_every < 0:
        raise InputError(f"preview_every must be a number of steps, or 0 for no previews, not {preview_every!r}")
    return Request(id=request_id or uuid.uuid4().hex[:12], inputs=values, seed=seed, preview_every=preview_every)


def is_media(graph: Graph, name: str) -> bool:
    """Whether a field comes from a file: pictures, clips, sounds and tensors."""
    return name in graph.inputs and base_type(graph.inputs[name].type) in ("image", "video", "audio", "tensor")


def parse_field(graph: Graph, name: str, text: str) -> Any:
    """The value of a field given as text on a command line: text stays, JSON is parsed, media are files to open.

    For the types `json` and `any`, what is no JSON is text. Raises InputError for a file that cannot be read.
    """
    kind = base_type(graph.inputs[name].type) if name in graph.inputs else "text"
    if is_media(graph, name):
        from omni.files import read_media

        return read_media(text, kind)
    if kind in ("json", "any"):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(text)
    return text


def _required_fields(graph: Graph) -> dict[str, str]:
    """Request fields that some required port reads -> that stage."""
    return {
        source.field: stage
        for stage in graph.order
        for port, binding in graph.bindings[stage].items()
        for source in sources_of(binding)
        if isinstance(source, FromRequest)
        and port in graph.ports[stage].inputs
        and graph.ports[stage].inputs[port].required
    }


def _check_type(graph: Graph, name: str, value: Any) -> None:
    port_type = graph.inputs[name].type
    wanted = WANTED[base_type(port_type)]
    if port_type.startswith("list[") and not isinstance(value, list):
        raise InputError(f"input '{name}' must be a list, each item {wanted}, not {type(value).__name__}")
    if base_type(port_type) in ("json", "any") or not isinstance(value, list):
        items = [value]
    elif port_type.startswith("list[") or not (single := _takes_one(graph, name)):
        items = value
    else:
        raise InputError(f"input '{name}' must be {wanted}, not a list: stage '{single}' takes one")
    for item in items:
        if not _matches(item, base_type(port_type)):
            raise InputError(f"input '{name}' must be {wanted}, not {type(item).__name__}")


def _check_unicode(name: str, value: Any) -> None:
    """Refuse text with lone surrogates, which is how Python shows bytes that are no UTF-8: nothing can write it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"input '{name}' is not valid UTF-8 text: {value[:60]!a}") from error
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_unicode(name, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_unicode(name, key)
            _check_unicode(name, item)


def _takes_one(graph: Graph, name: str) -> str:
    """A stage that reads the field and takes no list of its type, or an empty string."""
    for stage in graph.order:
        for port, binding in graph.bindings[stage].items():
            known = graph.ports[stage].inputs.get(port)
            if known is None or known.many or known.type.startswith("list[") or base_type(known.type) == "any":
                continue
            if any(isinstance(source, FromRequest) and source.field == name for source in sources_of(binding)):
                return stage
    return ""


WANTED = {
    "text": "text",
    "image": "a PIL image",
    "video": "an omni.media.Video",
    "audio": "an omni.media.Audio",
    "tensor": "a torch tensor or numpy array",
    "json": "a JSON value",
    "any": "anything",
}


def _matches(value: Any, kind: str) -> bool:
    match kind:
        case "text":
            return isinstance(value, str)
        case "image":
            return is_image(value)
        case "video":
            return isinstance(value, Video)
        case "audio":
            return isinstance(value, Audio)
        case "tensor":
            return is_tensor(value) or is_array(value)
        case "json":
            return isinstance(value, (str, int, float, bool, list, dict))
    return True
