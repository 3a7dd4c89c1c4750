"""The seam: the denoiser's forward, where Omni meets a stock pipeline once or twice a denoise step.

Where requests are batched, text encoders have seams too.

Each request runs the pipeline's own `__call__` in its own thread, on its own fork of the pipeline, as a `DenoiseRun`.
The denoiser modules are shared; the seam in their forward finds the run that is calling and acts for it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.guiders.guider_utils import BaseGuidance
from tqdm import tqdm  # type: ignore[import-untyped]

from omni.messages import Progress
from omni.stage import Work
from stages.diffusion.batching.batch import is_finite
from stages.diffusion.batching.join import Joiner, tensors_of
from stages.diffusion.batching.meeting import Meeting
from stages.diffusion.faults import NotFinite

DENOISER_NAMES = ("transformer", "unet")
DENOISER_PACKAGES = ("diffusers.models.transformers", "diffusers.models.unets")

_current: ContextVar[DenoiseRun | None] = ContextVar("current denoise run", default=None)


def current_run() -> DenoiseRun | None:
    """The run that the calling thread works for."""
    return _current.get()


class Watcher(Protocol):
    """Sees one request's denoising, in its thread; it must only look."""

    def denoiser_called(self, arguments: dict[str, Any]) -> None:
        """A denoiser is called with these keyword arguments."""

    def noise_removed(self, scheduler: Any, answer: torch.Tensor, sample: torch.Tensor, result: Any) -> None:
        """A noise scheduler has made `result` of `sample` and the denoiser's `answer`."""

    def step_finished(self, step: int, num_steps: int) -> None:
        """A denoise step is done and reported."""


class DenoiseRun:
    """One request's way through its pipeline: stops it when asked, reports its denoise steps."""

    priority = 0
    """Its calls are joined and served before those of a lower one."""

    def __init__(self, work: Work, watcher: Watcher | None = None, meeting: Meeting | None = None) -> None:
        self._work = work
        self.watcher = watcher
        self._meeting = meeting
        self._step = 0
        self._schedulers: list[Any] = []
        self._broken: torch.Tensor | None = None
        """On a GPU: whether any answer so far was not finite; to read it waits for the GPU."""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Calls of a denoiser from this thread belong to this run."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            self._leave()

    def check_answer(self, answer: Any) -> None:
        """Look at a denoiser's answer. Raises NotFinite, on a GPU only from `check`."""
        if not is_finite(answer):
            raise NotFinite(self._step + 1)
        for tensor in tensors_of(answer):
            if tensor.device.type != "cpu":
                broken = torch.isfinite(tensor).all().logical_not()
                self._broken = broken if self._broken is None else self._broken | broken

    def check(self) -> None:
        """After the last step. Raises NotFinite when the denoiser gave numbers that are not finite."""
        if self._broken is not None and bool(self._broken):
            raise NotFinite(None)

    def _leave(self) -> None:
        if self._meeting is not None:
            self._meeting.leave(self)

    def fork(self, pipeline: Any) -> Any:
        """A copy of `pipeline` that shares its modules, with noise schedulers and guiders of its own.

        Pipelines keep a call's parameters on themselves and their loop state on the noise scheduler, so two requests
        must share neither. Pipelines inside the pipeline (combined ones) are forked too.
        """
        own = copy.copy(pipeline)
        for name, value in list(vars(own).items()):
            if isinstance(value, (SchedulerMixin, BaseGuidance)):
                vars(own)[name] = self._watched(copy.deepcopy(value))
            elif isinstance(value, DiffusionPipeline):
                vars(own)[name] = self.fork(value)
        vars(own)["progress_bar"] = self.step_bar
        return own

    def _watched(self, part: Any) -> Any:
        """`part`; a noise scheduler tells the watcher, where there is one, about its steps."""
        if self.watcher is not None and isinstance(part, SchedulerMixin) and hasattr(part, "step"):
            part.__class__ = _watched_class(type(part))
            self._schedulers.append(part)
        return part

    def noise_removed(self, scheduler: Any, arguments: dict[str, Any], result: Any) -> None:
        """A step of a noise scheduler: tell the watcher, unless it is a pipeline's own copy, as for sound."""
        if self.watcher is not None and any(scheduler is own for own in self._schedulers):
            self.watcher.noise_removed(scheduler, arguments["model_output"], arguments["sample"], result)

    def step_bar(self, iterable: Any = None, total: int | None = None, **_: Any) -> StepBar:
        """What the fork takes for its progress bar: the pipeline's own count of its denoise steps."""
        return StepBar(self, iterable, total)

    def raise_if_aborted(self) -> None:
        """Raise RequestAborted when the request was aborted."""
        self._work.raise_if_aborted()

    def finish_step(self, steps_left: int) -> None:
        """Report one more denoise step; `steps_left` follow in this loop (a pipeline may have several loops)."""
        self._step += 1
        num_steps = self._step + steps_left
        self._work.emit(Progress(step=self._step, num_steps=num_steps, unit="denoise step"))
        if not steps_left:
            self._leave()
        self.raise_if_aborted()
        if self.watcher is not None:
            self.watcher.step_finished(self._step, num_steps)


class StepBar(tqdm):  # type: ignore[misc]
    """A progress bar that shows nothing and tells a run about each finished step."""

    def __init__(self, run: DenoiseRun, iterable: Any, total: int | None) -> None:
        super().__init__(iterable, total=total, disable=True)
        self._run = run

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        """`n` more steps are done."""
        for _ in range(int(n or 0)):
            self.n += 1
            self._run.finish_step(max(0, int(self.total or 0) - self.n))
        return None


class Seam:
    """Stands in the place of one denoiser's forward. What works per call or across requests is plugged in here."""

    def __init__(
        self,
        denoiser: torch.nn.Module,
        meeting: Meeting | None = None,
        pixels_per_value: float = 1.0,
        *,
        is_denoiser: bool = True,
    ) -> None:
        """`meeting`: where calls of several requests are joined, of samples with so many pixels for each number.
        Answers of a denoiser must be finite."""
        self.denoiser = denoiser
        self._forward = denoiser.forward
        self._meeting, self._pixels_per_value, self._is_denoiser = meeting, pixels_per_value, is_denoiser
        self._joiner = Joiner(denoiser, self._forward)
        functools.update_wrapper(self, denoiser.forward)  # pipelines read the forward's signature
        denoiser.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _current.get()
        if run is None:
            return self._forward(*args, **kwargs)
        run.raise_if_aborted()
        if run.watcher is not None and self._is_denoiser:
            run.watcher.denoiser_called(kwargs)
        answer = self._forward(*args, **kwargs) if self._meeting is None else self._meet(run, args, kwargs)
        if self._is_denoiser:
            run.check_answer(answer)
        return answer

    def remove(self) -> None:
        """Give the denoiser its own forward back."""
        del self.denoiser.forward

    def _meet(self, run: DenoiseRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._meeting is not None
        form = self._joiner.form(args, kwargs)
        modes = (torch.is_grad_enabled(), *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")))
        num_pixels = 1.0 if form is None else form.num_values * self._pixels_per_value
        return self._meeting.run(run, (id(self), modes), form, self._forward_for_all, (args, kwargs), num_pixels)

    def _forward_for_all(self, *args: Any, **kwargs: Any) -> Any:
        """The forward on behalf of whoever is in the call: denoisers inside it see no run, and run at once."""
        token = _current.set(None)
        try:
            return self._forward(*args, **kwargs)
        finally:
            _current.reset(token)


@functools.cache
def _watched_class(kind: type[Any]) -> type[Any]:
    """A noise scheduler's class whose steps are told to the current run; its name and signatures stay."""
    signature = inspect.signature(kind.step)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.step(self, *args, **kwargs)
        run = _current.get()
        if run is not None and {"model_output", "sample"} <= signature.parameters.keys():
            run.noise_removed(self, signature.bind(self, *args, **kwargs).arguments, result)
        return result

    return type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__, "__doc__": kind.__doc__})


def find_denoisers(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The components of `pipeline` that run in every denoise step: its transformers and UNets."""
    return {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module)
        and (name.startswith(DENOISER_NAMES) or type(component).__module__.startswith(DENOISER_PACKAGES))
    }


def find_text_encoders(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The components of `pipeline` that read the prompt."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if name.startswith("text_encoder") and isinstance(part, torch.nn.Module)}


def pixels_per_value(pipeline: DiffusionPipeline) -> float:
    """Pixels of the result for each number of the latents, over all frames; 1 where the VAE tells nothing."""
    vae = getattr(pipeline, "vae", None)
    config = getattr(vae, "config", None) or {}
    channels = config.get("latent_channels") or config.get("z_dim") or config.get("in_channels") or 1
    edge = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", None) or 1
    frames = getattr(pipeline, "vae_scale_factor_temporal", None) or 1
    return float(edge) ** 2 * float(frames) / float(channels)
