"""A server that speaks the HTTP API by heart, for looking at the page without graphs: python tests/server/page_stub.py."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import uuid
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from PIL import Image, ImageDraw

from omni.server.routes.page import build_router
from omni.server.settings import ServerSettings

SCHEMA = {
    "type": "object",
    "properties": {
        "prompt": {"type": "string", "description": "what to make", "x-omni-type": "text"},
        "negative_prompt": {"type": "string", "description": "what to avoid", "x-omni-type": "text"},
        "image": {"type": "string", "description": "picture to start from", "x-omni-type": "image"},
        "width": {"type": "integer", "minimum": 16, "maximum": 4096, "multipleOf": 16, "description": "pixels"},
        "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 20},
        "guidance_scale": {"type": "number", "default": 2.0},
        "tiling": {"type": "boolean", "default": False},
        "style": {"enum": ["oil", "ink"]},
        "extra": {"description": "anything"},
    },
    "required": ["prompt"],
}


def picture(step: float, w: int = 512) -> Image.Image:
    image = Image.radial_gradient("L").resize((w, w)).convert("RGB")
    ImageDraw.Draw(image).ellipse((w * 0.2, w * 0.2, w * (0.3 + step / 2), w * (0.3 + step / 2)), fill=(40, 80, 200))
    return image


def encode(image: Image.Image, form: str) -> bytes:
    f = io.BytesIO()
    image.save(f, form)
    return f.getvalue()


def build() -> FastAPI:
    app = FastAPI()
    jobs: dict[str, dict[str, Any]] = {}
    events: dict[str, list[tuple[str, dict]]] = {}
    changed = asyncio.Condition()
    tasks = {}

    async def tell(id, type, **data):
        async with changed:
            events[id].append((type, data))
            changed.notify_all()

    async def work(id):
        job = jobs[id]
        await tell(id, "queued")
        await asyncio.sleep(0.3)
        job.update(state="running", started_at=time.time())
        await tell(id, "stage_started", stage="rewrite")
        for w in "a painting of a harbour in the evening, oil on canvas".split():
            await asyncio.sleep(0.05)
            await tell(id, "text", stage="rewrite", text=w + " ")
        await tell(id, "stage_finished", stage="rewrite", seconds=0.7, bytes=60)
        await tell(id, "stage_started", stage="draw")
        if "fail" in job["inputs"]["prompt"]:
            job.update(state="failed", finished_at=time.time(), error=dict(stage="draw", cause="CUDA out of memory: 12 GiB wanted, 3 GiB free", remedy="use offload: {policy: sequential} in the graph, or a smaller picture", code="stage_failed"))
            await tell(id, "failed", error=job["error"])
            return
        n = job["inputs"].get("num_inference_steps", 20)
        for s in range(1, n + 1):
            await asyncio.sleep(0.25)
            await tell(id, "progress", stage="draw", step=s, num_steps=n, unit="denoise step", progress=s / n)
            await tell(id, "preview", stage="draw", step=s, image="data:image/jpeg;base64," + base64.b64encode(encode(picture(s / n, 64), "JPEG")).decode())
        await tell(id, "stage_finished", stage="draw", seconds=5, bytes=786432)
        job["outputs"] = {
            "image": [dict(url="x", type="image", media_type="image/png", bytes=12345)],
            "caption": [dict(url="x", type="text", media_type="text/plain", bytes=40, text="a painting of a harbour in the evening, oil on canvas")],
            "facts": [dict(url="x", type="json", media_type="application/json", bytes=40, text='{"a": [1, 2]}')],
        }
        job.update(state="done", finished_at=time.time())
        await tell(id, "done", seconds=6.0)

    @app.get("/v1/graphs")
    def graphs():
        return {"data": [{"name": "postcard", "description": "A language model rewrites the prompt, a painter draws it.", "inputs": SCHEMA, "outputs": {"image": "image"}}, {"name": "other", "description": "", "inputs": {"type": "object", "properties": {"pixels": {}}}, "outputs": {}}]}

    @app.get("/v1/graphs/{name}")
    def graph(name: str):
        return {**graphs()["data"][0], "plan": {}, "spec": {"stages": {"rewrite": {}, "draw": {}}}}

    @app.get("/v1/graphs/{name}/plan.svg")
    def svg(name: str):
        from omni.api import make_plan
        from omni.draw_svg import draw_svg
        from omni.load import load_graph

        return Response(draw_svg(make_plan(load_graph("configs/demo.yaml").graph)), media_type="image/svg+xml")

    @app.post("/v1/graphs/{name}/jobs", status_code=202)
    async def start(name: str, request: Request):
        if request.headers["content-type"].startswith("multipart"):
            form = await request.form()
            body = json.loads(form["request"])
        else:
            body = await request.json()
        if body["inputs"].get("width") == 32:
            return Response(json.dumps({"error": {"message": "'width' must be less odd", "param": "width"}}), 400)
        id = "job_" + uuid.uuid4().hex[:24]
        jobs[id] = dict(id=id, object="job", graph=name, state="queued", created_at=time.time(), started_at=None, finished_at=None, seed=body.get("seed", 7), inputs=body["inputs"], outputs={}, error=None, progress=0)
        events[id] = []
        tasks[id] = asyncio.create_task(work(id))
        return jobs[id]

    @app.get("/v1/jobs")
    def listed(limit: int = 20, after: str = ""):
        data = list(jobs.values())[::-1]
        return {"object": "list", "data": data[:limit], "has_more": len(data) > limit}

    @app.get("/v1/jobs/{id}")
    def one(id: str):
        return jobs[id]

    @app.delete("/v1/jobs/{id}")
    async def delete(id: str):
        if jobs[id]["finished_at"]:
            del jobs[id]
        else:
            tasks[id].cancel()
            jobs[id].update(state="aborted", finished_at=time.time())
            await tell(id, "aborted", reason="aborted by the caller")
        return {}

    @app.get("/v1/jobs/{id}/events")
    async def stream(id: str, request: Request):
        async def go():
            n = int(request.headers.get("last-event-id", 0))
            while True:
                async with changed:
                    await changed.wait_for(lambda: len(events[id]) > n)
                for type, data in events[id][n:]:
                    n += 1
                    yield f"id: {n}\nevent: {type}\ndata: {json.dumps(data)}\n\n"
                    if type in ("done", "failed", "aborted"):
                        return

        return StreamingResponse(go(), media_type="text/event-stream")

    @app.get("/v1/jobs/{id}/outputs/{name}")
    def output(id: str, name: str):
        return Response(encode(picture(1.0), "PNG"), media_type="image/png")

    app.include_router(build_router(ServerSettings()))
    return app


uvicorn.run(build(), port=8123, log_level="warning")
