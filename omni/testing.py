"""Test doubles: stages without models whose every behaviour is chosen in their spec.

`with doubles():` makes the kind `double` known. Nothing here sleeps: a double waits for an abort or computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from omni import registry
from omni.errors import RequestAborted
from omni.messages import LoadProgress, Payload, Preview, Progress, TextDelta
from omni.registry import Port, Ports, StageKind
from omni.spec import StageSpec
from omni.stage import Report, StageCall, StageContext, ThreadedStage, Work
from omni.transport.payload import leaves

HOLD_SECONDS = 120.0
"""A held double gives up after this long, so that a broken test ends."""


release_deaf = threading.Event()
"""Set it to let the deaf doubles of this process go on."""


class DoubleSpec(StageSpec, frozen=True, kw_only=True, tag="double"):
    """What a double does."""

    ports: dict[str, str] = msgspec.field(default_factory=lambda: {"prompt": "text"})
    """Input ports and their types."""
    gives: Literal["text", "image", "tensor"] = "text"
    steps: int = 2
    """Progress events before the output."""
    step_seconds: float = 0.0
    """Computing time of a step: the double is busy, it does not sleep."""
    num_bytes: int = 0
    """Size of a tensor output, in bytes."""
    fail_in: Literal["", "setup", "run", "die", "port", "abort"] = ""
    """Where it fails: raises in setup, run or abort, kills its process, or gives no output port."""
    fail_on: str = ""
    """Fail only for requests whose inputs contain this text; empty: always."""
    hold: bool = False
    """Wait in the last step until aborted."""
    deaf: bool = False
    """Ignore aborts, as a stage stuck in foreign code does."""
    writes_input: bool = False
    """Write into the first tensor input."""
    model: bool = True
    """Whether the planner shall see a stage with weights of its own (`weight_bytes`)."""


def double_ports(spec: DoubleSpec, base_dir: str) -> Ports:
    """Ports of a double: all inputs are optional."""
    inputs = {name: Port(port_type) for name, port_type in spec.ports.items()}
    return Ports(inputs=inputs, outputs={spec.gives: Port(spec.gives)})


KIND = StageKind(
    name="double",
    spec_type=DoubleSpec,
    stage="omni.testing:DoubleStage",
    ports=double_ports,
    checkpoint=lambda spec: registry.CheckpointRef("double") if spec.model else None,
)


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """Make the kind `double` known inside the block."""
    registry.BUILT_IN["double"] = "omni.testing:KIND"
    registry.find_kind.cache_clear()
    try:
        yield
    finally:
        del registry.BUILT_IN["double"]
        registry.find_kind.cache_clear()


class DoubleStage(ThreadedStage):
    """Carries out a DoubleSpec; its output is a digest of its inputs and the seed."""

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        assert isinstance(context.spec, DoubleSpec)
        self.spec = context.spec

    def load(self, report: Report) -> None:
        if self.spec.fail_in == "setup":
            raise RuntimeError("the double fails in setup")
        report(LoadProgress(stage=self.context.name, component="model", done_bytes=1, total_bytes=1, state="ready"))

    def compute(self, call: StageCall, work: Work) -> Payload:
        spec = self.spec
        digest = digest_of({"seed": call.seed, "stage": self.context.name, **call.inputs})
        fails = not spec.fail_on or spec.fail_on in repr(call.inputs)
        for step in range(spec.steps):
            if not spec.deaf:
                work.raise_if_aborted()
            busy_until = time.perf_counter() + spec.step_seconds
            while time.perf_counter() < busy_until:
                pass
            if step == spec.steps - 1:
                self._last_step(call, work, fails)
            work.emit(Progress(step=step + 1, num_steps=spec.steps))
            if call.preview_every and (step + 1) % call.preview_every == 0:
                work.emit(Preview(step=step + 1, num_steps=spec.steps, image=_picture(digest)))
        if spec.gives == "text":
            work.emit(TextDelta(text=digest))
        return {} if spec.fail_in == "port" and fails else {spec.gives: self._value(digest)}

    async def abort(self, request_id: str) -> None:
        if self.spec.fail_in == "abort":
            raise RuntimeError("the double fails in abort")
        await super().abort(request_id)

    def _last_step(self, call: StageCall, work: Work, fails: bool) -> None:
        if self.spec.writes_input:
            next(leaf for _, leaf in leaves(call.inputs) if hasattr(leaf, "add_")).add_(1)
        if fails and self.spec.fail_in == "run":
            raise RuntimeError("the double fails in run")
        if fails and self.spec.fail_in == "die":
            os.kill(os.getpid(), 9)
        if self.spec.hold:
            (release_deaf if self.spec.deaf else work.stop).wait(HOLD_SECONDS)
            raise RequestAborted(call.request_id)

    def _value(self, digest: str) -> Any:
        if self.spec.gives == "text":
            return digest
        if self.spec.gives == "image":
            return _picture(digest)
        import torch

        generator = torch.Generator().manual_seed(int(digest[:8], 16))
        return torch.randint(0, 255, (max(self.spec.num_bytes, 1),), dtype=torch.uint8, generator=generator)


def _picture(digest: str) -> Any:
    from PIL import Image

    return Image.frombytes("RGB", (4, 2), bytes.fromhex(digest[:48]))


def digest_of(value: Any) -> str:
    """Hex digest of nested text, numbers, images and tensors: equal values give equal digests in every process."""
    sha = hashlib.sha256()
    for path, leaf in sorted(leaves(value), key=lambda item: item[0]):
        data = leaf.numpy() if hasattr(leaf, "numpy") else leaf
        sha.update(path.encode() + (data.tobytes() if hasattr(data, "tobytes") else repr(data).encode()))
    return sha.hexdigest()
