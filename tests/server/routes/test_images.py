"""Pictures through OpenAI's own client, drawn by the demo painter."""

from __future__ import annotations

import base64
import io

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from tests.server.routes.conftest import Served

PROMPT = "a small blue circle on a white background"


def opened(b64_json: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json or "")))


def test_generate(client: OpenAI) -> None:
    answer = client.images.generate(
        model="draw", prompt=PROMPT, size="64x96", n=2, extra_body={"seed": 7, "steps": 4, "guidance_scale": 1.5}
    )
    pictures = [opened(image.b64_json) for image in answer.data or []]
    assert [(picture.format, picture.size) for picture in pictures] == [("PNG", (64, 96))] * 2
    assert (answer.size, answer.output_format, answer.background) == ("64x96", "png", "opaque")
    assert pictures[0].tobytes() != pictures[1].tobytes()
    again = client.images.generate(
        model="draw", prompt=PROMPT, size="64x96", extra_body={"seed": 8, "steps": 4, "guidance_scale": 1.5}
    )
    assert opened((again.data or [])[0].b64_json).tobytes() == pictures[1].tobytes()


def test_pictures_have_addresses(client: OpenAI, served: Served) -> None:
    extra = {"steps": 2, "seed": 1}
    answer = client.images.generate(
        model="draw", prompt=PROMPT, response_format="url", output_format="webp", size="64x64", extra_body=extra
    )
    url = (answer.data or [])[0].url or ""
    assert url.startswith(f"{served.url}/v1/jobs/job_")
    found = httpx.get(url)
    assert found.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(found.content)).size == (64, 64)


def test_stream_with_partial_images(client: OpenAI) -> None:
    events = list(
        client.images.generate(
            model="draw", prompt=PROMPT, stream=True, partial_images=2, size="64x64", extra_body={"steps": 9, "seed": 7}
        )
    )
    assert [event.type for event in events[:-1]] == ["image_generation.partial_image"] * (len(events) - 1)
    assert 1 <= len(events) - 1 <= 2
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
    assert events[-1].type == "image_generation.completed"
    assert events[-1].usage.total_tokens == 0
    whole = client.images.generate(model="draw", prompt=PROMPT, size="64x64", extra_body={"steps": 9, "seed": 7})
    assert opened(events[-1].b64_json).tobytes() == opened((whole.data or [])[0].b64_json).tobytes()


def test_edit(client: OpenAI) -> None:
    red = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(red, "PNG")
    fields = {"seed": 1, "steps": 5, "width": 64, "height": 64}
    answer = client.images.edit(
        model="edit", image=("red.png", red.getvalue()), prompt=PROMPT, extra_body={**fields, "strength": 0.2}
    )
    assert answer.data
    kept = opened(answer.data[0].b64_json)
    assert kept.size == (64, 64)
    url = f"data:image/png;base64,{base64.b64encode(red.getvalue()).decode()}"
    as_json = httpx.post(
        f"{client.base_url}images/edits",
        json={"model": "edit", "images": [{"image_url": url}], "prompt": PROMPT, **fields, "strength": 0.2},
        timeout=60,
    )
    assert opened(as_json.json()["data"][0]["b64_json"]).tobytes() == kept.tobytes()


def test_streamed_edit(client: OpenAI) -> None:
    red = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(red, "JPEG")
    events = client.images.edit(
        model="edit", image=[red.getvalue()], prompt=PROMPT, stream=True, output_format="jpeg",
        extra_body={"steps": 4, "width": 64, "height": 64},
    )  # fmt: skip
    last = list(events)[-1]
    assert (last.type, opened(last.b64_json).format) == ("image_edit.completed", "JPEG")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "99999x99999"}, "width", "at most 16384"),
        ({"n": 11}, "n", "at most 10"),
        ({"n": 0}, "n", ">= 1"),
        ({"model": "edit"}, "image", "missing"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"extra_body": {"num_inference_step": 5}}, "num_inference_step", "did you mean 'num_inference_steps'"),
        ({"extra_body": {"steps": 5, "num_inference_steps": 5}}, "num_inference_steps", "twice"),
        ({"extra_body": {"flow_shift": 5}}, "flow_shift", "takes no 'flow_shift'"),
        ({"extra_body": {"steps": 5000}}, "num_inference_steps", "at most 1000"),
        ({"extra_body": {"seed": -1}}, "seed", "whole number"),
        ({"extra_body": {"partial_images": 2}}, "partial_images", "needs"),
    ],
)
def test_wrong_fields_are_named(client: OpenAI, fields: dict[str, object], param: str, message: str) -> None:
    given = {"model": "draw", "prompt": PROMPT, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**given)  # type: ignore[arg-type]
    assert caught.value.param == param
    assert message in caught.value.message


def test_unknown_parameters_may_be_allowed_by_name(client: OpenAI) -> None:
    extra = {"extra_body": {"made_up": 1, "steps": 2}, "size": "64x64"}
    assert client.images.generate(model="draw", prompt=PROMPT, extra_body=extra).data


def test_an_unknown_model_is_not_there(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'draw'") as caught:
        client.images.generate(model="drawn", prompt=PROMPT)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="gives no image; these do: draw, edit"):
        client.images.generate(model="tell", prompt=PROMPT)
