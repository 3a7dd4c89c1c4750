"""What every router needs, and the choice of a graph for a request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import Request

from omni.api import AsyncOmni
from omni.errors import InputError
from omni.graph import Graph, base_type
from omni.server.errors import ApiError, bad_request, not_found, quoted
from omni.server.graph_facts import FPS_INPUTS, FRAMES_INPUTS, default_of, output_types
from omni.server.media_inputs import MediaReader
from omni.server.media_room import RequestMedia
from omni.server.service import Service
from omni.server.settings import ServerSettings

MEDIA = ("image", "video", "audio", "tensor")
REFERENCES = ("image_url", "url")
"""Keys of an object that stands for a medium."""
BATCH_INPUTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
SECONDS_INPUTS = ("seconds", "duration", "audio_end_in_s", "audio_length_in_s")


class Context(msgspec.Struct, frozen=True):
    """The service behind the routes, and what it accepts."""

    service: Service
    settings: ServerSettings
    media: MediaReader

    @property
    def graphs(self) -> Mapping[str, AsyncOmni]:
        """The served graphs by name."""
        return self.service.graphs

    def find(self, name: str, param: str | None = None) -> AsyncOmni:
        """The graph of that name. Raises ApiError (404) with the nearest one."""
        if name not in self.graphs:
            served = ", ".join(sorted(self.graphs))
            message = f"there is no graph {quoted(name, self.graphs, ' here')} (served: {served})"
            raise not_found(message, param, "model_not_found" if param == "model" else "graph_not_found")
        return self.graphs[name]

    def choose(self, model: str | None, *types: str) -> str:
        """Name of the graph that a request is for: `model`, or the only one that gives one of `types`.

        Raises ApiError when there is none, or several.
        """
        wanted = " or ".join(types)
        fitting = [name for name, omni in self.graphs.items() if set(types) & set(output_types(omni.graph).values())]
        if model is not None:
            self.find(model, "model")
            if model not in fitting:
                others = f"; these do: {', '.join(sorted(fitting))}" if fitting else ""
                raise bad_request(f"graph '{model}' gives no {wanted}{others}", "model", "model_not_supported")
            return model
        if not fitting:
            raise not_found(f"no graph here gives {wanted}", "model", "model_not_found")
        if len(fitting) > 1:
            raise bad_request(
                f"several graphs give {wanted}: name one as 'model' ({', '.join(sorted(fitting))})",
                "model",
                "missing_required_parameter",
            )
        return fitting[0]

    def ends_at(self) -> float:
        """When a synchronous request that begins now is over, media and waiting included; see time.monotonic."""
        return time.monotonic() + self.settings.request_seconds

    def open_media(self, request: Request, graph: str) -> RequestMedia:
        """The count of the media that a request for a graph brings; it ends with the answer."""
        counted = self.media.open(lambda: self.service.check_room(graph, key_of(request)))
        request.state.held.callback(counted.close)
        return counted

    async def read_inputs(
        self, graph: Graph, raw: Mapping[str, Any], counted: RequestMedia, n: int = 1
    ) -> dict[str, Any]:
        """Values for the inputs of a graph: media are decoded, sizes and lengths are bounded. Raises ApiError.

        `n` is how often the graph will run with them.
        """
        check_bounds(graph, raw, self.settings, n)
        inputs: dict[str, Any] = {}
        for name, value in raw.items():
            kind = base_type(graph.inputs[name].type) if name in graph.inputs else "any"
            if isinstance(value, bytes) and kind not in MEDIA:
                raise bad_request(f"'{name}' takes {'text' if kind == 'text' else 'a value'}, not a file", name)
            if kind in MEDIA:
                value = await self.read_medium(value, kind, name, counted)
            elif hasattr(value, "read"):
                raise bad_request(f"'{name}' must be a value, not a file", name)
            if name in graph.inputs and graph.inputs[name].type.startswith("list[") and not isinstance(value, list):
                value = [value]
            inputs[name] = value
        return inputs

    async def read_medium(self, value: Any, kind: Any, name: str, counted: RequestMedia, alpha: bool = False) -> Any:
        """A picture, clip, sound or tensor, or a list of them. Raises ApiError naming the field."""
        try:
            return await self.media.resolve(reference(value, name), kind, name, counted, alpha=alpha)
        except InputError as error:
            raise bad_request(str(error), name) from None


def reference(value: Any, name: str) -> Any:
    """What a medium's object refers to: `{"image_url": "..."}` and `{"image_url": {"url": "..."}}` are the address."""
    if isinstance(value, list):
        return [reference(item, name) for item in value]
    if not isinstance(value, dict):
        return value
    if "file_id" in value:
        raise bad_request(f"'{name}': there are no stored files here; send a data URL or a file", name)
    for key in REFERENCES:
        if key in value:
            return reference(value[key], name)
    raise bad_request(f"'{name}' must be a file, a URL, or an object with image_url", name)


def check_bounds(graph: Graph, inputs: Mapping[str, Any], settings: ServerSettings, n: int = 1) -> None:
    """Refuse what would take too long or too much memory. Raises ApiError naming the input."""

    def bound(name: str, most: float, unit: str = "") -> None:
        value = inputs.get(name)
        if isinstance(value, (int, float)) and not value <= most:
            raise bad_request(f"'{name}' must be at most {most:g}{unit}, not {value:g}", name)

    bound("num_inference_steps", settings.max_steps)
    for name in FRAMES_INPUTS:
        bound(name, settings.max_output_frames)
    for name in BATCH_INPUTS:
        bound(name, settings.max_n)
    bound("width", settings.max_side)
    bound("height", settings.max_side)
    for name in SECONDS_INPUTS:
        bound(name, settings.max_output_seconds, " s")
    width, height = inputs.get("width"), inputs.get("height")
    if isinstance(width, int) and isinstance(height, int) and width * height > settings.max_output_pixels:
        most = settings.max_output_pixels
        raise bad_request(f"{width}x{height} are {width * height} pixels; at most {most} are drawn", "size")
    if (pixels := n * made_pixels(graph, inputs)) > settings.max_made_pixels:
        most = settings.max_made_pixels
        raise bad_request(f"the request asks for {pixels:.0f} pixels in all; at most {most} are made", "size")
    for name, value in inputs.items():
        is_medium = name in graph.inputs and base_type(graph.inputs[name].type) in MEDIA
        texts = [] if is_medium else value if isinstance(value, list) else [value]
        num_chars = sum(len(text) for text in texts if isinstance(text, str))
        if num_chars > settings.max_text_chars:
            raise bad_request(f"'{name}' has {num_chars} characters; at most {settings.max_text_chars} are read", name)


def made_pixels(graph: Graph, inputs: Mapping[str, Any]) -> float:
    """Pixels of all frames and pictures of one run, as far as the request and the graph tell; else 0."""

    def said(names: Sequence[str]) -> float:
        values = (inputs.get(name, default_of(graph, name)) for name in names)
        return next((value for value in values if isinstance(value, (int, float)) and value > 0), 0)

    frames = said(FRAMES_INPUTS) or said(SECONDS_INPUTS) * said(FPS_INPUTS)
    return said(("width",)) * said(("height",)) * max(frames, 1) * max(said(BATCH_INPUTS), 1)


def key_of(request: Request) -> str:
    """Name of the caller's API key, or an empty string."""
    return str(getattr(request.state, "key", ""))


def base_url(request: Request, settings: ServerSettings) -> str:
    """Start of the addresses in answers, without a slash at its end."""
    return (settings.public_url or str(request.base_url)).rstrip("/")


def idempotency_key(request: Request) -> str | None:
    """The header Idempotency-Key. Raises ApiError for one that is too long."""
    value = request.headers.get("idempotency-key")
    if value is not None and not 0 < len(value) <= 255:
        raise ApiError(400, "Idempotency-Key must have 1 to 255 characters", "Idempotency-Key", "invalid_value")
    return value
