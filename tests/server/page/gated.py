"""A painter whose every step the test lets go: PIL pictures, live text, previews and failures, without a model.

`with gated_stages() as gate:` makes the kind `gated` known, and `gate.let(n)` lets n steps of any of them happen.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from PIL import Image, ImageDraw

from omni import registry
from omni.errors import StageError
from omni.messages import Payload, Preview, Progress, TextDelta
from omni.registry import Port, Ports, StageKind
from omni.spec import StageSpec
from omni.stage import StageCall, ThreadedStage, Work

WAIT_SECONDS = 60.0
"""A painter gives up after this long, so that a broken test ends."""
SIDE = 96
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 70), "blue": (40, 80, 200)}


class Gate:
    """Steps that painters may take."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.steps = 0

    def let(self, num_steps: int) -> None:
        """Let so many more steps happen."""
        with self.changed:
            self.steps += num_steps
            self.changed.notify_all()

    def close(self) -> None:
        """Take back what was let and not taken."""
        with self.changed:
            self.steps = 0

    def pass_through(self, work: Work) -> None:
        """Wait for a step; raises RequestAborted when the request is aborted meanwhile."""
        with self.changed:
            passed = self.changed.wait_for(lambda: work.stop.is_set() or self.steps > 0, WAIT_SECONDS)
            work.raise_if_aborted()
            assert passed, "the test let no step happen"
            self.steps -= 1


GATE = Gate()


class GatedSpec(StageSpec, frozen=True, kw_only=True, tag="gated"):
    """What the painter does."""

    steps: int = 4


def gated_ports(spec: GatedSpec, base_dir: str) -> Ports:
    """A prompt and, if you like, a picture to paint on; gives a picture."""
    inputs = {
        "prompt": Port("text", required=True),
        "negative_prompt": Port("text"),
        "image": Port("image"),
        "num_inference_steps": Port("json"),
    }
    return Ports(inputs=inputs, outputs={"image": Port("image")})


KIND = StageKind(name="gated", spec_type=GatedSpec, stage="tests.server.page.gated:GatedStage", ports=gated_ports)


class GatedStage(ThreadedStage):
    """Paints a disc in the colour that the prompt names, one step at a time; fails when the prompt says so."""

    def compute(self, call: StageCall, work: Work) -> Payload:
        assert isinstance(self.context.spec, GatedSpec)
        prompt = call.inputs["prompt"]
        num_steps = call.inputs.get("num_inference_steps") or self.context.spec.steps
        ground = call.inputs.get("image") or Image.new("RGB", (SIDE, SIDE), "white")
        work.emit(TextDelta(text=f"painting {prompt}"))
        for step in range(1, num_steps + 1):
            GATE.pass_through(work)
            if "fail" in prompt:
                raise StageError(self.context.name, "the paint has run out", "buy paint, or say another colour")
            picture = paint(ground, prompt, step / num_steps)
            work.emit(Progress(step=step, num_steps=num_steps, unit="brush stroke"))
            if call.preview_every and step % call.preview_every == 0:
                work.emit(Preview(step=step, num_steps=num_steps, image=picture))
        return {"image": picture}

    async def abort(self, request_id: str) -> None:
        await super().abort(request_id)
        with GATE.changed:
            GATE.changed.notify_all()


def paint(ground: Image.Image, prompt: str, part: float) -> Image.Image:
    """The ground with a disc that grows with `part`, from 0 to 1."""
    picture = ground.copy()
    colour = next((value for name, value in COLOURS.items() if name in prompt), (20, 20, 20))
    radius = part * min(picture.size) * 0.4
    x, y = picture.width / 2, picture.height / 2
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return picture


def count_words(prompt: str, image: Image.Image) -> dict[str, object]:
    """Facts about a prompt and its picture, for an output of JSON."""
    return {"words": len(prompt.split()), "size": list(image.size)}


def shout(prompt: str, marks: int = 1) -> str:
    """The prompt in capitals, with marks behind it."""
    return prompt.upper() + "!" * marks


@contextlib.contextmanager
def gated_stages() -> Iterator[Gate]:
    """Make the kind `gated` known inside the block."""
    registry.BUILT_IN["gated"] = "tests.server.page.gated:KIND"
    registry.find_kind.cache_clear()
    try:
        yield GATE
    finally:
        del registry.BUILT_IN["gated"]
        registry.find_kind.cache_clear()
