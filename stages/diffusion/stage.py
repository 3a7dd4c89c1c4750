"""The stage that runs a stock diffusers pipeline, one request at a time per worker thread; with `batching` in the spec
there are several, which meet in the denoiser."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from omni.errors import StageError
from omni.messages import Payload
from omni.spec import DiffusionSpec
from omni.stage import Report, StageCall, StageContext, ThreadedStage, Work
from stages.device import peak_device_bytes, use_device
from stages.diffusion.build import Built, build_pipeline
from stages.diffusion.denoiser import DenoiseRun
from stages.diffusion.faults import is_out_of_memory, run_faults
from stages.diffusion.inputs import ArgumentFault, build_arguments
from stages.diffusion.outputs import audio_rate, build_payload, frames_per_second, output_type
from stages.diffusion.preview import Previewer, StepPreviews


class DiffusionStage(ThreadedStage):
    """Any diffusers pipeline. A request's pictures depend on its inputs and seed only, not on what runs beside it."""

    def __init__(self, context: StageContext) -> None:
        assert isinstance(context.spec, DiffusionSpec)
        self.spec = context.spec
        self.num_workers = max(self.num_workers, self.spec.batching.max_requests)
        super().__init__(context)
        self.built: Built | None = None
        self.previewer: Previewer | None = None

    def load(self, report: Report) -> None:
        """Load the pipeline. Raises StageSetupError."""
        use_device(self.context.device)
        self.built = built = build_pipeline(self.context, report)
        self.previewer = Previewer(
            self.context.name,
            built.pipeline,
            built.device,
            is_offloaded=built.offload is not None,
            draws=bool({"images", "video"} & built.signature.outputs.keys()),
        )

    def compute(self, call: StageCall, work: Work) -> Payload:
        """Call the pipeline; progress comes with each denoise step.

        Raises RequestAborted within one denoise step after an abort, StageError with a remedy on any fault.
        """
        built, name = self.built, self.context.name
        assert built is not None, "compute before load"
        use_device(self.context.device)

        def draw() -> Payload:
            arguments = self._arguments(built, call)
            fps = frames_per_second(arguments, built.signature, self.spec.fps)
            previews = self._previews(call, work)
            run = DenoiseRun(work, previews, built.meeting)
            with run.active(), torch.no_grad(), contextlib.closing(previews) if previews else contextlib.nullcontext():
                result = run.fork(built.pipeline)(**arguments, **self._owned_arguments(built, call.seed))
                run.check()
                return build_payload(result, built.signature, fps, audio_rate(built.pipeline))

        with run_faults(name, built.pipeline, built.device):
            return draw() if built.correction is None else built.correction.run(draw, is_out_of_memory)

    def peak_device_bytes(self) -> int:
        return peak_device_bytes(self.context.device)

    def unload(self) -> None:
        """Drop the pipeline and free its device memory."""
        if self.previewer is not None:
            self.previewer.close()
            self.previewer = None
        if self.built is not None:
            if self.built.locks is not None:
                self.built.locks.remove()
            for seam in self.built.seams:
                seam.remove()
            if self.built.offload is not None:
                self.built.offload.reset()
        self.built = None
        if self.context.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _previews(self, call: StageCall, work: Work) -> StepPreviews | None:
        if not call.preview_every or self.previewer is None or not self.previewer.prepare():
            return None
        return StepPreviews(self.previewer, call.preview_every, work.emit)

    def _arguments(self, built: Built, call: StageCall) -> dict[str, Any]:
        try:
            return build_arguments(built.signature, self.spec.call, call.inputs, built.device, built.dtype)
        except ArgumentFault as error:
            name = self.context.name
            raise StageError(name, str(error), f"change the request's inputs or stages.{name}.inputs") from error

    def _owned_arguments(self, built: Built, seed: int) -> dict[str, Any]:
        """What Omni itself passes. The generator is the CPU's, so that a seed means the same on every device."""
        owned = {
            "generator": torch.Generator("cpu").manual_seed(seed),
            "return_dict": True,
            "output_type": output_type(built.signature.outputs),
        }
        return {name: value for name, value in owned.items() if name in built.signature.accepts}
