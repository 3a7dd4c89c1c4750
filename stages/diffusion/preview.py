"""Previews: what a picture or clip looks like while it is drawn, off the denoising thread.

The denoising thread hands over a copy of the latents, or of what the denoiser takes the finished ones to be. One
worker thread per stage makes a small picture of it: with the VAE where that is small, else by a linear projection from
latents to RGB, fitted once per VAE to how it encodes a coloured pattern. While the worker is busy, previews are
dropped. Whatever cannot be previewed gives no previews, one warning, and the same result as ever.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import torch
from PIL import Image
from torch import Tensor, nn

from omni.errors import one_line
from omni.messages import Preview, StageItem
from stages.device import use_device
from stages.diffusion.families.latents import GRID_ARGUMENTS, UnknownLayout, vae_latents
from stages.diffusion.projection import Projection, fit_projection

log = logging.getLogger(__name__)

MAX_SIDE = 256
"""Pixels on the longer side of a preview."""
MAX_DECODED_PARAMETERS = 5_000_000
"""A VAE of no more parameters makes the previews itself; larger ones would take the time of several denoise steps."""


class Snapshot(msgspec.Struct, frozen=True):
    """What the denoising thread hands over."""

    latents: Tensor
    arguments: dict[str, Any]
    """Those of the denoiser's call that tell how tokens lie."""


class Previewer:
    """Makes the previews of one stage."""

    def __init__(self, stage: str, pipeline: Any, device: str, *, is_offloaded: bool, draws: bool = True) -> None:
        """`draws`: the pipeline makes pictures or clips, and not just sound."""
        self._stage, self._device = stage, device
        self._vae: nn.Module | None = getattr(pipeline, "vae", None)
        self._is_offloaded = is_offloaded
        self._scale = _compression(pipeline)
        self._projection: Projection | None = None
        self._fault = "" if draws else "it draws nothing"
        """Why there are no previews."""
        self._is_told = False
        self._preparing = threading.Lock()
        self._free = threading.Semaphore()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"preview-{stage}")
        self.num_dropped = 0
        """Previews that were due while the one before was being made."""

    def prepare(self) -> bool:
        """Whether previews can be made. Call in the stage's own thread, before the pipeline: it may use the VAE."""
        with self._preparing:
            if self._vae is not None and not self._decodes() and self._projection is None and not self._fault:
                try:
                    self._projection = fit_projection(
                        self._vae, self._scale, self._device, is_offloaded=self._is_offloaded
                    )
                except Exception as error:  # a preview is never worth a failed request
                    self._fault = one_line(error)
            self._tell_fault()
        return not self._fault

    def submit(self, snapshot: Snapshot, show: Callable[[Image.Image], None]) -> None:
        """Make a preview, unless one is being made; `show` is called with it in the worker's thread."""
        if self._fault:
            return
        if not self._free.acquire(blocking=False):
            self.num_dropped += 1
            return
        try:
            self._pool.submit(self._work, snapshot, show)
        except RuntimeError:  # closed meanwhile
            self._free.release()

    def close(self) -> None:
        """Wait for the preview that is being made, and end the worker."""
        self._pool.shutdown(cancel_futures=True)

    def _work(self, snapshot: Snapshot, show: Callable[[Image.Image], None]) -> None:
        try:
            use_device(self._device)
            with torch.no_grad():
                show(self.picture(snapshot))
        except Exception as error:  # the same: a request goes on without its previews
            self._fault = one_line(error)
            self._tell_fault()
        finally:
            self._free.release()

    def _tell_fault(self) -> None:
        if self._fault and not self._is_told:
            self._is_told = True
            log.warning("%s: no previews (%s)", self._stage, self._fault)

    def picture(self, snapshot: Snapshot) -> Image.Image:
        """A small picture of the latents: of several the first, of a clip the middle frame. Raises UnknownLayout."""
        if self._vae is None:
            colours = _pixels(snapshot.latents)
        else:
            frames = vae_latents(snapshot.latents, self._vae, snapshot.arguments)
            frame = frames[len(frames) // 2]
            colours = self._decode(frame) if self._projection is None else self._projection.apply(frame)
        pixels = colours.float().mul(255).round().clamp(0, 255).to("cpu", torch.uint8)
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return image

    def _decodes(self) -> bool:
        """Whether the VAE itself makes the previews. Never an offloaded one: its weights come and go with requests."""
        if self._vae is None or self._is_offloaded:
            return False
        return sum(parameter.numel() for parameter in self._vae.parameters()) <= MAX_DECODED_PARAMETERS

    def _decode(self, frame: Tensor) -> Tensor:
        """RGB from 0 to 1, (3, height, width), of latents (channels, height, width)."""
        # A copy, of which only the parts are shared: some VAEs keep the features of a call on themselves.
        vae: Any = copy.copy(self._vae)
        latents = frame[None].to(vae.dtype)
        if any(parameter.ndim == 5 for parameter in vae.decoder.parameters()):
            latents = latents[:, :, None]
        decoded = vae.decode(latents, return_dict=False)[0][0]
        if decoded.ndim == 4:
            decoded = decoded[:, decoded.shape[1] // 2]
        return decoded[:3].float() / 2 + 0.5


class StepPreviews:
    """The previews of one request: a watcher of its DenoiseRun."""

    def __init__(self, previewer: Previewer, every: int, emit: Callable[[StageItem], None]) -> None:
        self._previewer, self._every, self._emit = previewer, every, emit
        self._arguments: dict[str, Any] = {}
        self._step: tuple[Any, Tensor, Tensor, Any] | None = None
        self._telling = threading.Lock()
        self._is_over = False

    def denoiser_called(self, arguments: dict[str, Any]) -> None:
        """A denoiser is called with `arguments`."""
        self._arguments = arguments

    def noise_removed(self, scheduler: Any, answer: Tensor, sample: Tensor, result: Any) -> None:
        """The noise scheduler made `result` of `sample` and the denoiser's `answer`."""
        self._step = (scheduler, answer, sample, result)

    def step_finished(self, step: int, num_steps: int) -> None:
        """A denoise step is done: time for a preview, perhaps."""
        if step % self._every or self._step is None:
            return
        arguments = {name: self._arguments[name] for name in GRID_ARGUMENTS if name in self._arguments}
        snapshot = Snapshot(clean_estimate(*self._step).detach().clone(), arguments)

        def show(image: Image.Image) -> None:
            with self._telling:
                if not self._is_over:
                    self._emit(Preview(step=step, num_steps=num_steps, image=image))

        self._previewer.submit(snapshot, show)

    def close(self) -> None:
        """The request is over: what is still being made is not shown."""
        with self._telling:
            self._is_over = True
        self._step, self._arguments = None, {}


def clean_estimate(scheduler: Any, answer: Tensor, sample: Tensor, result: Any) -> Tensor:
    """What the denoiser takes the finished latents to be, or where that cannot be told those after the step."""
    parts = result if isinstance(result, tuple) else tuple(result.values())
    if len(parts) > 1 and isinstance(parts[1], Tensor) and parts[1].shape == sample.shape:
        return parts[1]
    config = scheduler.config
    kept = getattr(scheduler, "model_outputs", None)
    is_clean = config.get("predict_x0") or "++" in str(config.get("algorithm_type"))
    if kept and is_clean and isinstance(kept[-1], Tensor) and kept[-1].shape == sample.shape:
        return kept[-1]
    is_flow = type(scheduler).__name__.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    if is_flow and scheduler.step_index and answer.shape == sample.shape:
        return sample.float() - scheduler.sigmas[scheduler.step_index - 1].to(sample.device) * answer
    after: Tensor = parts[0]
    return after


def _pixels(latents: Tensor) -> Tensor:
    """RGB from 0 to 1 of a pipeline without a VAE, which denoises pixels."""
    if latents.ndim != 4 or latents.shape[1] != 3:
        raise UnknownLayout(f"latents of shape {tuple(latents.shape)}, and no VAE")
    return latents[0].float() / 2 + 0.5


def _compression(pipeline: Any) -> tuple[int, int]:
    """Frames and pixels a latent, as the pipeline has them from its VAE."""

    def first(names: tuple[str, ...], default: int) -> int:
        values = [getattr(pipeline, name, None) for name in names]
        return next((value for value in values if isinstance(value, int) and value > 0), default)

    frames = first(("vae_scale_factor_temporal", "vae_temporal_compression_ratio"), 4)
    pixels = first(("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"), 8)
    return frames, pixels
