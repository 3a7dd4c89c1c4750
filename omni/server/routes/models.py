"""OpenAI's models: the served graphs."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from omni.server.answers import Model, ModelList, json_answer
from omni.server.context import Context
from omni.server.openapi import operation


class Models:
    """The routes of models."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.created = int(time.time())

    async def list_all(self, request: Request) -> Response:
        """All served graphs."""
        return json_answer(ModelList(data=[self._model(name) for name in self.context.graphs]))

    async def one(self, model: str) -> Response:
        """One served graph."""
        self.context.find(model, "model")
        return json_answer(self._model(model))

    def _model(self, name: str) -> Model:
        description = self.context.graphs[name].graph.spec.description
        return Model(id=name, created=self.created, owned_by="omni", description=description)


def build_router(context: Context) -> APIRouter:
    """Routes below /v1/models."""
    router, models = APIRouter(tags=["OpenAI"]), Models(context)
    router.add_api_route(
        "/v1/models", models.list_all, methods=["GET"], **operation("List the graphs", answer=ModelList, errors=(401,))
    )
    router.add_api_route(
        "/v1/models/{model}",
        models.one,
        methods=["GET"],
        **operation("One graph", answer=Model, errors=(401, 404)),
    )
    return router
