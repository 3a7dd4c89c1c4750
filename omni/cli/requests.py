"""From the arguments of `omni run` to requests, and their way to files: everything is checked before models load."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from omni.api import AsyncOmni, Result, ResultBuilder
from omni.cli.events import Written, encode_event
from omni.cli.outputs import PRINTED, OutputPlan, items_of, plan_outputs
from omni.cli.progress import View
from omni.errors import OmniError, RequestFailed, UsageError
from omni.files import kind_of
from omni.inputs import MAX_SEED, is_media, parse_fields
from omni.messages import Message, Request
from omni.recipe import Recipe, SourceFile, check_files, digest_file, encode, installed_versions, needs_trust, read_recipe


class Outcome(msgspec.Struct, kw_only=True):
    """How one request ended: files and texts, or an error."""

    label: str
    """`2/4 ` when there are several requests, else empty."""
    request: Request
    result: Result | None = None
    files: list[Path] = []
    texts: list[str] = []
    error: OmniError | None = None


class Job:
    """The requests of one `omni run` and all that is needed to carry them out."""

    def __init__(
        self, omni: AsyncOmni, requests: Sequence[Request], outputs: OutputPlan, recipes: Sequence[str], events: bool
    ) -> None:
        self.omni = omni
        self.requests = requests
        self.outputs = outputs
        self.recipes = recipes
        """Metadata of the pictures of each request."""
        self._events = events
        self.view = View()

    async def run(self) -> list[Outcome]:
        """Load the graph, then run all requests at once. A failed request does not keep the others."""
        async with self.omni:
            return await asyncio.gather(*(self._run_one(index) for index in range(len(self.requests))))

    async def _run_one(self, index: int) -> Outcome:
        request = self.requests[index]
        outcome = Outcome(label=self.view.labels.get(request.id, ""), request=request)
        builder = ResultBuilder(request, self.omni.loaded)
        try:
            async with contextlib.aclosing(self.omni.stream(request)) as events:
                async for event in events:
                    self.view.event(event)
                    self.print_event(event)
                    outcome.result = builder.add(event) or outcome.result
            assert outcome.result is not None
            await self._keep(index, outcome)
        except (RequestFailed, UsageError) as error:
            outcome.error = error
        return outcome
