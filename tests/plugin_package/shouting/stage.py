"""The stage of the kind `shout`."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from omni.messages import Output, StageItem, TextDelta
from omni.stage import Stage, StageCall


class ShoutStage(Stage):
    """Writes its prompt in capitals."""

    async def run(self, call: StageCall) -> AsyncGenerator[StageItem, None]:
        text = call.inputs["prompt"].upper() + "!" * self.context.spec.marks
        yield TextDelta(text=text)
        yield Output(payload={"text": text})
