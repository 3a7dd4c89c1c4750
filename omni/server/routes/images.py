"""OpenAI's images: generations and edits, as one answer or streamed with partial images."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from PIL import Image as Pictures
from PIL import ImageOps

from omni.api import AsyncOmni
from omni.messages import Done, StagePreview
from omni.server.answers import Image, ImageEvent, ImagesAnswer, ImageUsage, json_answer
from omni.server.bodies import ImageEditRequest, ImageRequest
from omni.server.calls import (
    count_token,
    events_of,
    orders_for,
    raise_if_over,
    run_all,
    run_one,
    until_left,
)
from omni.server.context import Context, base_url, idempotency_key, key_of
from omni.server.encoding import encode_image
from omni.server.errors import ApiError, bad_request
from omni.server.fields import translate
from omni.server.graph_facts import output_types, steps_of
from omni.server.jobs import Job, JobOrder, output_url
from omni.server.limits import JsonTexts
from omni.server.media_room import RequestMedia
from omni.server.openapi import EVENTS, operation
from omni.server.reading import read_body, split_fields
from omni.server.stored import finish_job
from omni.server.streaming import EventStream, ServerEvent

BATCH_INPUT = "num_images_per_prompt"
"""A graph that declares it draws all pictures of a request at once."""
ERRORS = (400, 401, 404, 409, 413, 415, 429, 500, 503, 504)
Verb = Literal["image_generation", "image_edit"]


class Drawing(msgspec.Struct, frozen=True):
    """A checked request for pictures."""

    body: ImageRequest
    omni: AsyncOmni
    order: JobOrder

    @property
    def size(self) -> str:
        """As the request says, or `auto`."""
        width, height = self.order.inputs.get("width"), self.order.inputs.get("height")
        return f"{width}x{height}" if width and height else "auto"


class Images:
    """The routes of pictures."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def generate(self, request: Request) -> Response:
        """Draw pictures from a prompt."""
        form = await read_body(request, self.context.settings)
        body, rest = split_fields(form, ImageRequest)
        return await self._answer(request, self._prepare(request, body, rest, form.texts, {}), "image_generation")

    async def edit(self, request: Request) -> Response:
        """Change pictures by a prompt."""
        form = await read_body(request, self.context.settings)
        body, rest = split_fields(form, ImageEditRequest)
        if body.image is not None and body.images is not None:
            raise bad_request("'image' and 'images' say the same thing twice", "images")
        pictures = body.image if body.image is not None else body.images
        if pictures is None:
            raise bad_request("'image' is missing", "image", "missing_required_parameter")
        media = {"image": pictures, "mask_image": body.mask}
        return await self._answer(request, self._prepare(request, body, rest, form.texts, media), "image_edit")

    async def _prepare(
        self, request: Request, body: ImageRequest, rest: dict[str, Any], texts: JsonTexts | None, media: dict[str, Any]
    ) -> Drawing:
        settings = self.context.settings
        if body.n > settings.max_n:
            raise bad_request(f"'n' must be at most {settings.max_n}, not {body.n}", "n")
        if body.stream and body.n > 1:
            raise bad_request("a streamed answer holds one picture: leave 'n' out, or 'stream'", "n")
        if body.stream and body.response_format == "url":
            raise bad_request("a streamed picture comes as b64_json", "response_format")
        if body.partial_images and not body.stream:
            raise bad_request("'partial_images' needs \"stream\": true", "partial_images")
        name = self.context.choose(body.model, "image")
        omni = self.context.graphs[name]
        raw = translate(
            omni.graph,
            rest,
            "image",
            extra=body.extra_body,
            texts=texts,
            allow_unknown=settings.allow_unknown_fields,
        )
        if "background" in omni.graph.inputs:
            raw["background"] = body.background
        elif body.background == "transparent":
            raise bad_request("this graph draws opaque pictures", "background", "unsupported_parameter")
        counted = self.context.open_media(request, name)
        inputs = await self.context.read_inputs(omni.graph, raw, counted, body.n)
        for field, value in media.items():
            if value is not None:
                inputs[field] = await self._read_picture(omni, field, value, counted)
        if body.n > 1 and BATCH_INPUT in omni.graph.inputs:
            inputs[BATCH_INPUT] = body.n
        every = max(1, steps_of(omni.graph, inputs) // (body.partial_images + 1)) if body.partial_images else 0
        order = JobOrder(
            graph=name,
            inputs=inputs,
            seed=body.seed,
            kind="image",
            key=key_of(request),
            idempotency_key=idempotency_key(request),
            preview_every=every,
        )
        return Drawing(body, omni, order)

    async def _read_picture(self, omni: AsyncOmni, name: str, value: Any, counted: RequestMedia) -> Any:
        param = "mask" if name == "mask_image" else name
        if name not in omni.graph.inputs:
            raise bad_request(f"this graph takes no '{name}'", param, "unsupported_parameter")
        picture = await self.context.read_medium(value, "image", param, counted, alpha=name == "mask_image")
        if name == "mask_image":
            picture = await asyncio.to_thread(as_mask, picture)
        if isinstance(picture, list) and len(picture) == 1:
            picture = picture[0]
        is_list = omni.graph.inputs[name].type.startswith("list[")
        return [picture] if is_list and not isinstance(picture, list) else picture

    async def _answer(self, request: Request, preparing: Coroutine[Any, Any, Drawing], verb: Verb) -> Response:
        ends_at = self.context.ends_at()

        async def work() -> Response:
            drawing = await preparing
            if drawing.body.stream:
                return await EventStream.open(self._stream(drawing, verb), ends_at - time.monotonic())
            return json_answer(await self._draw(request, drawing))

        return await until_left(request, work(), ends_at - time.monotonic())

    async def _draw(self, request: Request, drawing: Drawing) -> ImagesAnswer:
        """All pictures of an answer, drawn at the same time."""
        body = drawing.body
        batched = BATCH_INPUT in drawing.order.inputs
        orders = orders_for(drawing.order, 1 if batched else body.n)
        if body.response_format == "url":
            jobs = await run_all([finish_job(self.context.service, order) for order in orders])
            base = base_url(request, self.context.settings)
            data = [image for job in jobs for image in image_links(job, base, body.output_format)]
            return ImagesAnswer(created=int(time.time()), data=data, output_format=body.output_format)
        outcomes = await run_all([run_one(self.context, order) for order in orders])
        pictures = [picture for outcome in outcomes for picture in pictures_of(drawing.omni, outcome.outputs)]
        data = []
        for picture in pictures:
            data.append(Image(b64_json=await asyncio.to_thread(self._encode, drawing, picture)))
        size = f"{pictures[0].width}x{pictures[0].height}" if pictures else None
        return ImagesAnswer(
            created=int(time.time()),
            data=data,
            output_format=body.output_format,
            size=size,
            background="transparent" if pictures and "A" in pictures[0].getbands() else "opaque",
            usage=usage_of(sum(outcome.num_tokens for outcome in outcomes)),
        )

    async def _stream(self, drawing: Drawing, verb: Verb) -> AsyncGenerator[ServerEvent, None]:
        """The partial images, and the picture."""
        count = 0
        tokens: dict[str, int] = {}
        async with contextlib.aclosing(events_of(self.context, drawing.order)) as events:
            async for event in events:
                count_token(event, tokens)
                raise_if_over(event)
                if isinstance(event, StagePreview) and count < drawing.body.partial_images:
                    yield await self._event(drawing, f"{verb}.partial_image", event.image, partial_image_index=count)
                    count += 1
                elif isinstance(event, Done):
                    picture = pictures_of(drawing.omni, event.outputs)[0]
                    usage = usage_of(sum(tokens.values()))
                    yield await self._event(drawing, f"{verb}.completed", picture, usage=usage)

    async def _event(self, drawing: Drawing, kind: Any, picture: Pictures.Image, **fields: Any) -> ServerEvent:
        event = ImageEvent(
            type=kind,
            b64_json=await asyncio.to_thread(self._encode, drawing, picture),
            created_at=int(time.time()),
            size=f"{picture.width}x{picture.height}" if kind.endswith("completed") else drawing.size,
            quality="auto",
            background=drawing.body.background,
            output_format=drawing.body.output_format,
            **fields,
        )
        return ServerEvent(event, kind)

    def _encode(self, drawing: Drawing, picture: Pictures.Image) -> bytes:
        return encode_image(picture, drawing.body.output_format, max(1, drawing.body.output_compression))


def usage_of(num_tokens: int) -> ImageUsage:
    """Tokens that language models of the graph wrote on the way to the picture."""
    return ImageUsage(output_tokens=num_tokens, total_tokens=num_tokens)


def as_mask(picture: Pictures.Image) -> Pictures.Image:
    """OpenAI's mask, which is transparent where the picture may change, as diffusers': white there."""
    if "A" not in picture.getbands():
        return picture.convert("L")
    alpha = picture.getchannel("A")
    if alpha.getextrema() == (255, 255):  # nothing is transparent: white means what it says
        return picture.convert("L")
    return ImageOps.invert(alpha)


def pictures_of(omni: AsyncOmni, outputs: dict[str, Any]) -> list[Pictures.Image]:
    """The pictures of the first output that has some. Raises ApiError for a graph that gave none."""
    for name, kind in output_types(omni.graph).items():
        if kind == "image" and outputs.get(name):
            value = outputs[name]
            return list(value) if isinstance(value, list) else [value]
    raise ApiError(500, "the graph gave no picture", None, "no_output")


def image_links(job: Job, base: str, image_format: str) -> list[Image]:
    """Addresses of a finished job's pictures. Raises ApiError for a job that did not end well."""
    if job.state != "done":
        cause = job.error.cause if job.error else "it was aborted"
        raise ApiError(500, f"the picture could not be drawn: {cause}", None, "stage_failed")
    found = [output for output in job.outputs if output.type == "image"]
    suffix = "" if image_format == "png" else f"&format={image_format}"
    return [
        Image(url=f"{base}{output_url(job.id, output)}{suffix}") for output in found if output.name == found[0].name
    ]


def build_router(context: Context) -> APIRouter:
    """Routes below /v1/images."""
    router, images = APIRouter(tags=["OpenAI"]), Images(context)
    described: dict[str, Any] = {
        "answer": ImagesAnswer,
        "content": EVENTS,
        "api": "image",
        "errors": ERRORS,
        "headers": ("Idempotency-Key",),
    }
    router.add_api_route(
        "/v1/images/generations",
        images.generate,
        methods=["POST"],
        **operation("Draw pictures from a prompt", body=ImageRequest, **described),
    )
    router.add_api_route(
        "/v1/images/edits",
        images.edit,
        methods=["POST"],
        **operation("Change pictures", body=ImageEditRequest, files=("image", "image[]", "mask"), **described),
    )
    return router
