"""A job's pictures, clips, sounds and tensors come back without loss: sent again, they give the same job."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from safetensors.numpy import save

from omni.files import write_output
from omni.media import Audio, Video
from omni.server.app import build_app
from omni.server.routes.job_inputs import float_wav
from omni.server.settings import ServerSettings
from tests.server.conftest import MakeService

GRAPH = {
    "inputs": {"pictures": "list[image]", "sound": "audio", "clip": "video", "numbers": "tensor", "text": "text"},
    "stages": {"look": {"kind": "function", "call": "tests.server.routes.looking:look"}},
}
MERGE = {"kind": "function", "call": "tests.server.functions:merge"}
Files = list[tuple[str, tuple[str, bytes]]]


def media(folder: Path) -> Files:
    """Two pictures, a sound, a clip and a tensor, as the files of a form."""
    numbers = np.random.default_rng(5)
    clip = folder / "clip.mp4"
    write_output(Video(numbers.integers(0, 255, (3, 16, 32, 3), dtype=np.uint8), 12.5), clip)
    given: Files = [("clip", ("c.mp4", clip.read_bytes()))]
    for size in ((8, 4), (5, 9)):
        file = io.BytesIO()
        Image.frombytes("RGB", size, numbers.bytes(3 * size[0] * size[1])).save(file, "PNG")
        given.append(("pictures", ("p.png", file.getvalue())))
    sound = Audio(numbers.uniform(-1, 1, (2, 300)).astype(np.float32), 22050)
    given.append(("sound", ("s.wav", float_wav(sound))))
    given.append(("numbers", ("n.safetensors", save({"any": numbers.random((2, 3))}))))
    return given


async def run(client: httpx.AsyncClient, files: Files) -> dict[str, Any]:
    """A finished job."""
    form = {"request": json.dumps({"inputs": {"text": "hello"}})}
    answer = await client.post("/v1/graphs/look/jobs", data=form, files=files, headers={"Prefer": "wait=30"})
    job = answer.json()
    assert job.get("state") == "done", job
    return job


async def test_media_come_back_as_they_were(make_service: MakeService, tmp_path: Path) -> None:
    service = make_service({"look": GRAPH})
    await service.start()
    transport = httpx.ASGITransport(build_app(service, ServerSettings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        job = await run(client, media(tmp_path))
        facts = json.loads(job["outputs"]["json"][0]["text"])
        again: Files = []
        kinds = {"clip": "video/x-matroska", "sound": "audio/wav", "numbers": "application/octet-stream"}
        for name, index in [("pictures", 0), ("pictures", 1), ("clip", 0), ("sound", 0), ("numbers", 0)]:
            answer = await client.get(f"/v1/jobs/{job['id']}/inputs/{name}?index={index}")
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == kinds.get(name, "image/png")
            assert answer.headers["x-content-type-options"] == "nosniff"
            again.append((name, ("x", answer.content)))
        second = await run(client, again)
        assert json.loads(second["outputs"]["json"][0]["text"]) == facts
        assert [size for size, _ in facts["pictures"]] == [[8, 4], [5, 9]]

        for path in ("inputs/text", "inputs/pictures?index=2", "inputs/none", "inputs/..%2Fjobs.db"):
            answer = await client.get(f"/v1/jobs/{job['id']}/{path}")
            assert answer.status_code == 404, path
        assert (await client.get(f"/v1/jobs/{job['id']}/inputs/clip?index=-1")).status_code == 400
        answer = await client.get("/v1/jobs/job_0123456789abcdef01234567/inputs/clip")
        assert answer.status_code == 404


async def test_long_texts_and_json_come_back(make_service: MakeService) -> None:
    service = make_service({"g": {"inputs": {"text": "text", "more": "json"}, "stages": {"work": MERGE}}})
    await service.start()
    given = {"text": "\u00e9" * 40_000, "more": {"a": ["x" * 70_000]}}
    transport = httpx.ASGITransport(build_app(service, ServerSettings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        job = (await client.post("/v1/graphs/g/jobs", json={"inputs": given}, headers={"Prefer": "wait=30"})).json()
        assert job["state"] == "done", job
        assert job["inputs"] == {"text": {"type": "text"}, "more": {"type": "json"}}
        text = await client.get(f"/v1/jobs/{job['id']}/inputs/text")
        more = await client.get(f"/v1/jobs/{job['id']}/inputs/more")
    assert (text.text, text.headers["content-type"]) == (given["text"], "text/plain; charset=utf-8")
    assert (more.json(), more.headers["content-type"]) == (given["more"], "application/json")
