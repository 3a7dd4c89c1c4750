"""The seam and the run: forks, step counting, abort, and which modules count as denoisers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni.errors import RequestAborted
from omni.messages import Progress
from omni.stage import Work
from stages.diffusion.denoiser import DenoiseRun, Seam, find_denoisers
from stages.diffusion.stage import DiffusionStage
from tests.stages.diffusion import tiny

# Libraries below us, on classes they keep for old checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def new_run(stop: threading.Event | None = None) -> tuple[DenoiseRun, list[Progress]]:
    reports: list[Progress] = []
    work = Work("request", reports.append)  # type: ignore[arg-type]
    work.stop = stop or work.stop
    return DenoiseRun(work), reports


class Denoiser(torch.nn.Module):
    """Adds one."""

    def forward(self, hidden_states: torch.Tensor, timestep: int = 0) -> torch.Tensor:
        return hidden_states + 1


class InnerPipeline(diffusers.DiffusionPipeline):
    """A pipeline with a noise scheduler."""

    def __init__(self, scheduler: Any, transformer: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer)


class CombinedPipeline(InnerPipeline):
    """A pipeline that calls another one."""

    def __init__(self, scheduler: Any, transformer: Any) -> None:
        super().__init__(scheduler, transformer)
        self.inner = InnerPipeline(scheduler, transformer)


def pipeline() -> CombinedPipeline:
    return CombinedPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), Denoiser())


def test_fork_shares_modules_only() -> None:
    whole = pipeline()
    own = new_run()[0].fork(whole)
    for one, other in ((own, whole), (own.inner, whole.inner)):
        assert one is not other
        assert one.transformer is other.transformer
        assert one.scheduler is not other.scheduler
    own.scheduler.set_timesteps(5)
    own.inner.scheduler.set_timesteps(6)
    own._guidance_scale = 3.0
    assert len(whole.scheduler.timesteps) == 1000
    assert len(whole.inner.scheduler.timesteps) == 1000
    assert not hasattr(whole, "_guidance_scale")
    assert "progress_bar" not in vars(whole)
    assert own.inner.progress_bar == own.progress_bar


def test_fork_copies_the_guider(loaded: Callable[[str], DiffusionStage]) -> None:
    whole = loaded("hunyuan_video").built.pipeline
    own = new_run()[0].fork(whole)
    assert own.guider is not whole.guider
    assert own.components.keys() == whole.components.keys()


@given(rounds=st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=4))
def test_steps_rise_and_each_loop_ends_complete(rounds: list[tuple[int, bool]]) -> None:
    run, reports = new_run()
    for length, as_iterable in rounds:
        if as_iterable:
            assert list(run.step_bar(range(length))) == list(range(length))
        else:
            with run.step_bar(total=length) as bar:
                for _ in range(length):
                    bar.update()
        assert reports[-1].step == reports[-1].num_steps
    assert [report.step for report in reports] == list(range(1, sum(length for length, _ in rounds) + 1))
    assert all(report.step <= report.num_steps for report in reports)


def test_more_steps_than_announced() -> None:
    run, reports = new_run()
    bar = run.step_bar(total=1)
    bar.update()
    bar.update(2)
    bar.close()
    assert [(report.step, report.num_steps) for report in reports] == [(1, 1), (2, 2), (3, 3)]


def test_second_order_noise_scheduler(loaded: Callable[[str], DiffusionStage]) -> None:
    """Heun calls the denoiser twice a step; the client counts the steps that were asked for."""
    run, reports = new_run()
    own = run.fork(loaded("sd3").built.pipeline)
    own.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    calls: list[int] = []
    handle = own.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    family = tiny.FAMILIES["sd3"]
    own(**family.inputs(0), **family.call, num_inference_steps=3, output_type="latent")
    handle.remove()
    assert len(calls) == 5
    assert [(report.step, report.num_steps) for report in reports] == [(1, 3), (2, 3), (3, 3)]


def test_stop_raises_at_the_end_of_a_step() -> None:
    stop = threading.Event()
    run, reports = new_run(stop)
    bar = run.step_bar(total=3)
    bar.update()
    stop.set()
    with pytest.raises(RequestAborted):
        bar.update()
    assert len(reports) == 2


def test_seam_stops_only_its_own_request() -> None:
    denoiser, stop = Denoiser(), threading.Event()
    seam, stopped, going = Seam(denoiser), new_run(stop)[0], new_run()[0]
    stop.set()
    with stopped.active(), pytest.raises(RequestAborted):
        denoiser(torch.zeros(1))
    with going.active():
        assert denoiser(torch.zeros(1)).item() == 1
    assert denoiser(torch.zeros(1)).item() == 1  # outside any run
    seam.remove()
    with stopped.active():
        assert denoiser(torch.zeros(1)).item() == 1


def test_runs_of_other_threads_are_not_seen() -> None:
    denoiser, stop = Denoiser(), threading.Event()
    Seam(denoiser)
    stop.set()
    answers: list[float] = []
    with new_run(stop)[0].active():
        thread = threading.Thread(target=lambda: answers.append(denoiser(torch.zeros(1)).item()))
        thread.start()
        thread.join(timeout=30)
    assert answers == [1.0]


def test_signature_of_the_forward_is_kept() -> None:
    denoiser = Denoiser()
    before = inspect.signature(denoiser.forward)
    Seam(denoiser)
    assert inspect.signature(denoiser.forward) == before


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_denoisers_are_found(family: str, loaded: Callable[[str], DiffusionStage]) -> None:
    wanted = {"transformer", "transformer_2"} if family == "wan" else {"transformer"}
    assert set(find_denoisers(loaded(family).built.pipeline)) == wanted
