"""Omni's graphs: what they take and give, their plans, and the plan as a picture."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from omni.draw_svg import draw_svg
from omni.plan_document import plan_document
from omni.server.answers import Answer, json_answer
from omni.server.context import Context
from omni.server.graph_facts import inputs_schema, output_types
from omni.server.openapi import operation


class GraphAnswer(Answer, frozen=True, kw_only=True, tag_field="object", tag="graph", omit_defaults=False):
    """What a graph takes and gives."""

    name: str
    description: str
    inputs: dict[str, Any]
    """JSON Schema of an object."""
    outputs: dict[str, str]
    """Name -> type: text, image, video, audio, tensor or json."""
    spec: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    """The graph file, with its bases and changes merged in."""
    plan: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    """What runs where, and why, as `omni plan --json` prints it."""


class GraphList(Answer, frozen=True, kw_only=True, tag_field="object", tag="list", omit_defaults=False):
    """GET /v1/graphs."""

    data: list[GraphAnswer]


class Graphs:
    """The routes of graphs."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def list_all(self, request: Request) -> Response:
        """All graphs."""
        return json_answer(GraphList(data=[self._describe(name) for name in self.context.graphs]))

    async def one(self, name: str) -> Response:
        """One graph, with its spec and plan."""
        omni = self.context.find(name)
        described = self._describe(name)
        spec = msgspec.to_builtins(omni.loaded.document)
        return json_answer(msgspec.structs.replace(described, spec=spec, plan=plan_document(omni.plan)))

    async def picture(self, name: str) -> Response:
        """The plan, drawn."""
        svg = await asyncio.to_thread(draw_svg, self.context.find(name).plan)
        # A picture that is opened as a page of its own shall run nothing.
        headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(svg, media_type="image/svg+xml", headers=headers)

    def _describe(self, name: str) -> GraphAnswer:
        graph = self.context.graphs[name].graph
        return GraphAnswer(
            name=name, description=graph.spec.description, inputs=inputs_schema(graph), outputs=output_types(graph)
        )


def build_router(context: Context) -> APIRouter:
    """Routes below /v1/graphs that only read."""
    router, graphs = APIRouter(tags=["Omni"]), Graphs(context)
    router.add_api_route(
        "/v1/graphs", graphs.list_all, methods=["GET"], **operation("List the graphs", answer=GraphList, errors=(401,))
    )
    router.add_api_route(
        "/v1/graphs/{name}",
        graphs.one,
        methods=["GET"],
        **operation("One graph, with its plan", answer=GraphAnswer, errors=(401, 404)),
    )
    router.add_api_route(
        "/v1/graphs/{name}/plan.svg",
        graphs.picture,
        methods=["GET"],
        **operation("The plan as a picture", content={"image/svg+xml": {"type": "string"}}, errors=(401, 404)),
    )
    return router
