"""Videos through OpenAI's own client: created, polled, downloaded, listed, deleted."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

import av
import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from tests.server.routes.conftest import Served

PROMPT = "a bar that moves"
SHAPE = "a red circle moving left on white"


@pytest.fixture(autouse=True)
def _sora_is_gone() -> Iterator[None]:
    """The client says that OpenAI's own video models are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def test_create_poll_download_delete(client: OpenAI, served: Served) -> None:
    video = client.videos.create_and_poll(
        model="film", prompt=PROMPT, seconds="4", size="64x48", poll_interval_ms=50, extra_body={"seed": 5}
    )  # type: ignore[call-overload]
    assert (video.status, video.progress, video.model) == ("completed", 100, "film")
    assert (video.size, video.seconds, video.prompt) == ("64x48", "4", PROMPT)
    content = client.videos.download_content(video.id).read()
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert (len(frames), frames[0].size) == (64, (64, 48))
    url = f"{served.url}/v1/videos/{video.id}/content"
    part = httpx.get(url, headers={"Range": "bytes=4-11"})
    assert (part.status_code, part.content) == (206, content[4:12])
    assert part.headers["content-range"] == f"bytes 4-11/{len(content)}"
    thumbnail = client.videos.download_content(video.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (64, 48)
    with pytest.raises(openai.BadRequestError):
        client.videos.download_content(video.id, variant="spritesheet")
    assert client.videos.retrieve(video.id).created_at == video.created_at
    deleted = client.videos.delete(video.id)
    assert (deleted.deleted, deleted.object) == (True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_the_demo_draws_videos(client: OpenAI) -> None:
    video = client.videos.create_and_poll(model="video", prompt=SHAPE, poll_interval_ms=100)
    assert (video.status, video.size) == ("completed", "64x64")
    with av.open(io.BytesIO(client.videos.download_content(video.id).read())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    assert (frames[0] != frames[-1]).any()
    assert client.videos.delete(video.id).deleted


def test_lists_go_page_by_page(client: OpenAI) -> None:
    made = [client.videos.create(model="film", prompt=f"{PROMPT} {number}").id for number in range(3)]
    found = [video.id for video in client.videos.list(limit=2)]
    assert found[:3] == made[::-1]
    assert [video.id for video in client.videos.list(limit=1, order="desc").data] == [made[2]]
    for video in made:
        client.videos.delete(video)


def test_json_makes_videos_too(served: Served) -> None:
    fields = {"model": "film", "prompt": PROMPT, "num_frames": 3, "width": 32}
    answer = httpx.post(f"{served.url}/v1/videos", json=fields).json()
    assert (answer["object"], answer["model"]) == ("video", "film")
    assert answer["seconds"] == f"{3 / 16:.4g}"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seconds": "soon"}, "seconds"),
        ({"size": "wide"}, "size"),
        ({"input_reference": ("x.png", b"x")}, "input_reference"),
        ({"extra_body": {"num_frames": "100000"}}, "num_frames"),
        ({"extra_body": {"frames": 3}}, "frames"),
    ],
)
def test_wrong_fields_are_named(client: OpenAI, fields: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(model="film", prompt=PROMPT, **fields)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_jobs_of_other_kinds_are_no_videos(client: OpenAI, served: Served) -> None:
    body = {"inputs": {"prompt": PROMPT}}
    job = httpx.post(f"{served.url}/v1/graphs/film/jobs", json=body).json()["id"]
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(job)
