"""Step batching on tiny pipelines of many families: results as alone, aborts, the table of docs/support.md.

`OMNI_WRITE_SUPPORT=1 pytest tests/stages/diffusion/batching/test_families.py` writes the table anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni.errors import RequestAborted, StageError
from omni.messages import Output, Preview, Progress
from omni.stage import StageCall, Work
from stages.diffusion.stage import DiffusionStage
from tests.stages.diffusion import tiny
from tests.stages.diffusion.batching.conftest import run_at_once
from tests.stages.diffusion.batching.support import BEGIN, END, TOLERANCE, render, row
from tests.stages.diffusion.test_stage import payload_of, pixels

# Libraries below us, on classes they keep for old checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

RECIPES = {**tiny.FAMILIES, **tiny.MORE_FAMILIES}
STEPS = (3, 3, 5)
ROWS: dict[str, str] = {}


def requests_of(family: str) -> list[dict[str, Any]]:
    """Other seeds, prompts, numbers of steps, and strengths of guidance where the family has one."""
    recipe = RECIPES[family]
    requests = [{**recipe.inputs(n), "num_inference_steps": steps} for n, steps in enumerate(STEPS)]
    for name in ("guidance_scale", "true_cfg_scale"):
        if recipe.call.get(name, 1.0) > 1.0:
            for number, request in enumerate(requests):
                request[name] = 3.0 + number
    return requests


def drawn(family: str, items: Any) -> np.ndarray:
    if isinstance(items, BaseException):
        raise items
    return pixels(payload_of(items)[RECIPES[family].port])


def alone(stage: DiffusionStage, family: str, inputs: dict[str, Any], seed: int) -> np.ndarray:
    payload = stage.compute(StageCall("alone", inputs, seed), Work("alone", lambda _: None))
    return drawn(family, [Output(payload=payload)])


def levels(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, in 1/255 of full scale."""
    scale = 1.0 if a.dtype == np.uint8 else 255.0 / max(1.0, float(np.abs(a).max()))
    return float(np.abs(a.astype(float) - b.astype(float)).max()) * scale


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_batched_equals_alone(
    family: str, batched: Callable[..., DiffusionStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, requests = batched(family), requests_of(family)
    assert stage.built is not None
    forms, joiner_class = [], type(stage.built.seams[0]._joiner)
    make = joiner_class.form

    def form(self: Any, args: Any, kwargs: Any) -> Any:
        forms.append(make(self, args, kwargs))
        return forms[-1]

    monkeypatch.setattr(joiner_class, "form", form)
    serial = [alone(stage, family, inputs, seed) for seed, inputs in enumerate(requests)]
    num_alone = len(forms)
    results = run_at_once(stage, requests)
    batches = stage.built.meeting.batches  # type: ignore[union-attr]
    for expected, items in zip(serial, results, strict=True):
        got = drawn(family, items)
        assert got.shape == expected.shape
        assert levels(expected, got) <= TOLERANCE
        assert isinstance(items, list)
        steps = [item.step for item in items if isinstance(item, Progress)]
        assert steps == list(range(1, len(steps) + 1))
    assert batches.largest >= 2
    assert set(batches._agrees.values()) == {True}
    total_steps = sum(isinstance(item, Progress) for items in results for item in items)  # type: ignore[union-attr]
    denoiser = type(stage.built.seams[0].denoiser).__name__
    ROWS[family] = row(family, denoiser, forms[0], round(num_alone / total_steps))


def test_the_table_is_current(root: Path) -> None:
    if set(ROWS) != set(RECIPES):
        assert not os.environ.get("OMNI_WRITE_SUPPORT"), "run the whole module"
        return  # a selection of the tests
    path = root / "docs/support.md"
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    wanted = render(list(ROWS.values())) + "\n"
    if os.environ.get("OMNI_WRITE_SUPPORT"):
        path.write_text(before + BEGIN + wanted + END + after)
        return
    assert table == wanted


@pytest.mark.parametrize("family", ["qwen", "wan", "z_image", "stable_diffusion_xl"])
def test_other_shapes_and_lengths_at_once(family: str, batched: Callable[..., DiffusionStage]) -> None:
    stage, requests = batched(family), requests_of(family)
    requests[1] |= {"height": 48, "width": 16}
    requests.append({**requests[0]})
    serial = [alone(stage, family, inputs, seed) for seed, inputs in enumerate(requests)]
    for expected, items in zip(serial, run_at_once(stage, requests), strict=True):
        assert levels(expected, drawn(family, items)) <= TOLERANCE


class Saboteur:
    """Acts at the denoise step `at` of one request, in its thread, as its progress is reported."""

    def __init__(self, stage: DiffusionStage, request_id: str, at: int, act: Callable[[Work], None]) -> None:
        compute = stage.compute

        def sabotaged(call: StageCall, work: Work) -> Any:
            if call.request_id == request_id:
                emit = work.emit

                def watching(item: Any) -> None:
                    emit(item)
                    if isinstance(item, Progress) and item.step == at:
                        act(work)

                work.emit = watching
            return compute(call, work)

        stage.compute = sabotaged  # type: ignore[method-assign]


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_an_abort_in_the_middle_leaves_the_others_alone(family: str, batched: Callable[..., DiffusionStage]) -> None:
    stage, requests = batched(family), requests_of(family)
    assert stage.built is not None
    serial = [alone(stage, family, inputs, seed) for seed, inputs in enumerate(requests)]
    Saboteur(stage, "request-1", 2, lambda work: work.stop.set())
    results = run_at_once(stage, requests)
    assert isinstance(results[1], RequestAborted)
    for number in (0, 2):
        assert levels(serial[number], drawn(family, results[number])) <= TOLERANCE


def test_a_request_that_is_not_finite_fails_alone(batched: Callable[..., DiffusionStage]) -> None:
    stage, requests = batched("flux"), requests_of("flux")
    serial = [alone(stage, "flux", inputs, seed) for seed, inputs in enumerate(requests)]
    requests[1]["prompt_embeds"] = requests[1]["prompt_embeds"] * float("nan")
    results = run_at_once(stage, requests)
    assert isinstance(results[1], StageError)
    assert "not finite" in results[1].cause
    assert "float32" in results[1].remedy
    for number in (0, 2):
        assert levels(serial[number], drawn("flux", results[number])) <= TOLERANCE


def test_an_error_in_the_denoiser_is_that_of_its_request(batched: Callable[..., DiffusionStage]) -> None:
    stage, requests = batched("qwen"), requests_of("qwen")
    assert stage.built is not None
    serial = [alone(stage, "qwen", inputs, seed) for seed, inputs in enumerate(requests)]
    poison = requests[2]["prompt_embeds"][0, 0]

    def refuse(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs["encoder_hidden_states"][:, 0] == poison).all(dim=-1).any():
            raise ValueError("a poisoned prompt")

    handle = stage.built.seams[0].denoiser.register_forward_pre_hook(refuse, with_kwargs=True)
    inner = stage.built.seams[0]._forward
    stage.built.seams[0]._forward = lambda *a, **k: (refuse(None, a, k), inner(*a, **k))[1]
    handle.remove()
    results = run_at_once(stage, requests)
    assert isinstance(results[2], StageError)
    assert "poisoned" in results[2].cause
    for number in (0, 1):
        assert levels(serial[number], drawn("qwen", results[number])) <= TOLERANCE


def test_late_requests_join(batched: Callable[..., DiffusionStage]) -> None:
    """The second request begins when the first has done two steps, and runs on when that has ended."""
    stage, requests = batched("sd3"), requests_of("sd3")
    assert stage.built is not None
    requests[0]["num_inference_steps"] = 6
    serial = [alone(stage, "sd3", inputs, seed) for seed, inputs in enumerate(requests[:2])]
    begun, never = threading.Event(), threading.Event()
    meeting = stage.built.meeting
    assert meeting is not None

    def wait_for_company(_: Work) -> None:
        begun.set()
        for _ in range(10_000):
            if meeting._waiting or never.wait(0.001):
                return

    Saboteur(stage, "request-0", 2, wait_for_company)
    compute, gate = stage.compute, begun

    def late(call: StageCall, work: Work) -> Any:
        if call.request_id == "request-1":
            assert gate.wait(30)
        return compute(call, work)

    stage.compute = late  # type: ignore[method-assign]
    for expected, items in zip(serial, run_at_once(stage, requests[:2], together=False), strict=True):
        assert levels(expected, drawn("sd3", items)) <= TOLERANCE
    assert meeting.batches.largest == 2


def test_previews_come_from_requests_at_once(batched: Callable[..., DiffusionStage]) -> None:
    stage, requests = batched("flux"), requests_of("flux")
    serial = [alone(stage, "flux", inputs, seed) for seed, inputs in enumerate(requests)]
    results = run_at_once(stage, requests, preview_every=1)
    for expected, items in zip(serial, results, strict=True):
        assert levels(expected, drawn("flux", items)) <= TOLERANCE
    assert any(isinstance(item, Preview) for items in results if isinstance(items, list) for item in items)
