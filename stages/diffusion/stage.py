"""The stage that runs a stock diffusers pipeline, one request at a time per worker thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from omni.errors import StageError, StageTimeoutError
from omni.messages import Output, Payload, StageItem
from omni.spec import DiffusionSpec
from omni.stage import Report, StageCall, StageContext, ThreadedStage
from stages.diffusion.build import Built, build_pipeline
from stages.diffusion.denoiser import DenoiseRun
from stages.diffusion.faults import run_faults
from stages.diffusion.inputs import ArgumentFault, build_arguments
from stages.diffusion.outputs import audio_rate, build_payload, frames_per_second, output_type


class DiffusionStage(ThreadedStage):
    """Any diffusers pipeline. A request's pictures depend on its inputs and seed only, not on what runs beside it."""

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        assert isinstance(context.spec, DiffusionSpec)
        self.spec = context.spec
        self._built: Built | None = None
        # The pipeline's call blocks until it is done, so that its progress has to come from a thread of its own.
        self._callers = ThreadPoolExecutor(self.num_workers, thread_name_prefix=f"pipeline-{context.name}")

    @property
    def built(self) -> Built:
        """The loaded pipeline with its seams."""
        assert self._built is not None, "used before load or after unload"
        return self._built

    def load(self, report: Report) -> None:
        """Load the pipeline. Raises StageSetupError."""
        self._built = build_pipeline(self.context, report)

    def compute(self, call: StageCall, stop: threading.Event) -> Iterator[StageItem]:
        """Progress of each denoise step, then the payload.

        Raises RequestAborted within one denoise step after `stop` is set, StageError with a remedy on any fault.
        """
        items: queue.SimpleQueue[StageItem | None] = queue.SimpleQueue()
        run = DenoiseRun(call.request_id, stop, items.put)
        future = self._callers.submit(self._call_pipeline, run, call)
        future.add_done_callback(lambda _: items.put(None))
        try:
            while (item := items.get(timeout=self.spec.timeouts.run_seconds)) is not None:
                yield item
        except queue.Empty:
            stop.set()
            limit = self.spec.timeouts.run_seconds
            raise StageTimeoutError(self.context.name, f"no denoise step within {limit:g} s") from None
        yield Output(payload=future.result())

    def unload(self) -> None:
        """Drop the pipeline and free its device memory."""
        self._callers.shutdown(wait=True, cancel_futures=True)
        if self._built is not None:
            for seam in self._built.seams:
                seam.remove()
        self._built = None
        if self.context.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _call_pipeline(self, run: DenoiseRun, call: StageCall) -> Payload:
        built, name = self.built, self.context.name
        try:
            arguments = build_arguments(built.signature, self.spec.call, call.inputs, built.device, built.dtype)
        except ArgumentFault as error:
            raise StageError(name, str(error), f"change the request's inputs or stages.{name}.inputs") from error
        fps = frames_per_second(arguments, built.signature, self.spec.fps)
        with run.active(), torch.no_grad(), run_faults(name, built.pipeline, built.device):
            result = run.fork(built.pipeline)(**arguments, **self._owned_arguments(built, call.seed))
            return build_payload(result, built.signature, fps, audio_rate(built.pipeline))

    def _owned_arguments(self, built: Built, seed: int) -> dict[str, Any]:
        """What Omni itself passes. The generator is the CPU's, so that a seed means the same on every device."""
        owned = {
            "generator": torch.Generator("cpu").manual_seed(seed),
            "return_dict": True,
            "output_type": output_type(built.signature.outputs),
        }
        return {name: value for name, value in owned.items() if name in built.signature.accepts}
