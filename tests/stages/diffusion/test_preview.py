"""Previews: what they show, that they change nothing and hold nothing up, and what becomes of faults and aborts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from omni.errors import RequestAborted
from omni.messages import Payload, Preview, Progress, StageItem
from omni.spec import DiffusionSpec
from omni.stage import StageCall, StageContext, Work
from stages.diffusion import preview
from stages.diffusion.preview import Previewer, clean_estimate
from stages.diffusion.projection import fit_projection, pattern
from stages.diffusion.stage import DiffusionStage
from tests.stages.diffusion import tiny
from tests.stages.diffusion.test_stage import pixels

# Libraries below us, on classes they keep for old checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

DRAWING = sorted(name for name, family in tiny.FAMILIES.items() if family.port != "audio")
WAIT_SECONDS = 30


class AtOnce:
    """Stands in the place of the worker's pool: previews are made before the next step."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)

    def shutdown(self, **_: Any) -> None:
        pass


@pytest.fixture
def previewing(loaded: Callable[[str], DiffusionStage]) -> Iterator[Callable[..., DiffusionStage]]:
    """Family -> its stage with a previewer of its own, which works at once or in its thread."""
    changed: list[tuple[DiffusionStage, Previewer | None]] = []

    def change(family: str, *, at_once: bool = True) -> DiffusionStage:
        stage = loaded(family)
        changed.append((stage, stage.previewer))
        stage.previewer = new_previewer(stage)
        if at_once:
            stage.previewer.close()
            stage.previewer._pool = AtOnce()  # type: ignore[assignment]
        return stage

    yield change
    for stage, before in changed:
        assert stage.previewer is not None
        stage.previewer.close()
        stage.previewer = before


def new_previewer(stage: DiffusionStage) -> Previewer:
    assert stage.built is not None
    draws = "audio" not in stage.built.signature.outputs or len(stage.built.signature.outputs) > 1
    return Previewer("draw", stage.built.pipeline, "cpu", is_offloaded=False, draws=draws)


def compute(stage: DiffusionStage, inputs: dict[str, Any], every: int) -> tuple[list[StageItem], Payload]:
    items: list[StageItem] = []
    payload = stage.compute(StageCall("request", inputs, 3, every), Work("request", items.append))
    return items, payload


def previews_of(items: list[StageItem]) -> list[Preview]:
    return [item for item in items if isinstance(item, Preview)]


def difference(image: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two pictures, the larger one made as small as the other; 0 to 255."""
    small = other.convert("RGB").resize(image.size, Image.Resampling.BOX)
    return float(np.abs(np.asarray(image, np.float32) - np.asarray(small, np.float32)).mean())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == preview.__name__]


@pytest.mark.parametrize("projected", [False, True], ids=["decoded", "projected"])
@pytest.mark.parametrize("family", DRAWING)
def test_previews_come_and_change_nothing(
    family: str, projected: bool, previewing: Callable[..., DiffusionStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "MAX_DECODED_PARAMETERS", 0 if projected else 10**9)
    stage, recipe = previewing(family), tiny.FAMILIES[family]
    plain, expected = compute(stage, recipe.inputs(1), 0)
    items, payload = compute(stage, recipe.inputs(1), 2)
    np.testing.assert_array_equal(pixels(payload[recipe.port]), pixels(expected[recipe.port]))
    assert [item for item in items if isinstance(item, Progress)] == plain
    steps = [(item.step, item.num_steps) for item in previews_of(items)]
    assert steps == [(step, len(plain)) for step in range(2, len(plain) + 1, 2)]
    assert all(item.image.mode == "RGB" for item in previews_of(items))


@pytest.mark.parametrize("family", DRAWING)
def test_latents_are_unpacked_and_scaled_as_the_pipeline_does_it(
    family: str, previewing: Callable[..., DiffusionStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last step previews show what the pipeline then gives to its VAE."""
    monkeypatch.setattr(preview, "MAX_DECODED_PARAMETERS", 0)
    stage, recipe = previewing(family), tiny.FAMILIES[family]
    assert stage.built is not None
    vae = stage.built.pipeline.vae
    seen: list[torch.Tensor] = []
    decoded: list[torch.Tensor] = []
    rule, decode = preview.vae_latents, vae.decode
    monkeypatch.setattr(preview, "vae_latents", lambda *a: (seen.append(rule(*a)), seen[-1])[1])
    vae.decode = lambda z, *a, **k: (decoded.append(z), decode(z, *a, **k))[1]
    try:
        compute(stage, recipe.inputs(1), 1)
    finally:
        del vae.decode
    given = decoded[0][0] if decoded[0].ndim == 5 else decoded[0][0][:, None]
    torch.testing.assert_close(seen[-1], given.transpose(0, 1).float(), rtol=1e-4, atol=1e-4)
    assert (seen[0] - seen[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["flux", "sd3", "z_image"])
def test_after_the_last_step_a_small_vae_shows_the_picture_itself(
    family: str, previewing: Callable[..., DiffusionStage]
) -> None:
    items, payload = compute(previewing(family), tiny.FAMILIES[family].inputs(1), 1)
    first, last = (previews_of(items)[place].image for place in (0, -1))
    drawn = payload["images"][0]
    assert last.size == drawn.size
    assert difference(last, drawn) < 0.6
    assert difference(first, drawn) > 0.7


def test_the_middle_of_a_clip_is_shown(previewing: Callable[..., DiffusionStage]) -> None:
    items, payload = compute(previewing("hunyuan_video"), tiny.FAMILIES["hunyuan_video"].inputs(1), 4)
    (shown,) = previews_of(items)
    assert shown.image.size == payload["video"].frames.shape[2:0:-1]


def test_the_denoising_thread_is_not_held_up(
    previewing: Callable[..., DiffusionStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that does not come to an end: all steps are made, previews are dropped, and none is told afterwards."""
    stage = previewing("flux", at_once=False)
    previewer, begun, released, threads = stage.previewer, threading.Event(), threading.Event(), []
    assert previewer is not None
    picture = previewer.picture

    def slow(snapshot: Any) -> Image.Image:
        threads.append(threading.get_ident())
        begun.set()
        assert released.wait(WAIT_SECONDS)
        return picture(snapshot)

    monkeypatch.setattr(previewer, "picture", slow)
    items, _ = compute(stage, tiny.FAMILIES["flux"].inputs(1), 1)
    assert [item.step for item in items if isinstance(item, Progress)] == [1, 2, 3, 4]
    assert begun.wait(WAIT_SECONDS)
    assert previewer.num_dropped == 3
    released.set()
    previewer.close()
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
    assert not previews_of(items)


def test_an_abort_ends_previews(previewing: Callable[..., DiffusionStage]) -> None:
    stage, items = previewing("sd3"), []
    work = Work("gone", lambda item: (items.append(item), isinstance(item, Preview) and work.stop.set()))
    with pytest.raises(RequestAborted):
        stage.compute(StageCall("gone", tiny.FAMILIES["sd3"].inputs(1), 1, 2), work)
    assert [type(item) for item in items] == [Progress, Progress, Preview]
    again, _ = compute(stage, tiny.FAMILIES["sd3"].inputs(1), 2)
    assert len(previews_of(again)) == 2


def test_a_preview_that_fails_costs_one_warning(
    previewing: Callable[..., DiffusionStage], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage, recipe = previewing("sd3"), tiny.FAMILIES["sd3"]
    _, expected = compute(stage, recipe.inputs(1), 0)

    def fail(*_: Any) -> None:
        raise ValueError("no such layout")

    monkeypatch.setattr(preview, "vae_latents", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            items, payload = compute(stage, recipe.inputs(1), 1)
            assert not previews_of(items)
            np.testing.assert_array_equal(pixels(payload["images"]), pixels(expected["images"]))
    assert warnings_of(caplog) == ["draw: no previews (ValueError: no such layout)"]


def test_sound_has_no_previews(previewing: Callable[..., DiffusionStage], caplog: pytest.LogCaptureFixture) -> None:
    stage = previewing("stable_audio")
    with caplog.at_level(logging.WARNING):
        assert not previews_of(compute(stage, tiny.FAMILIES["stable_audio"].inputs(1), 1)[0])
    assert warnings_of(caplog) == ["draw: no previews (it draws nothing)"]


def test_an_offloaded_vae_is_called_in_the_stages_thread_only(loaded: Callable[[str], DiffusionStage]) -> None:
    built = loaded("sd3").built
    assert built is not None
    previewer = Previewer("draw", built.pipeline, "cpu", is_offloaded=True)
    vae, threads = built.pipeline.vae, []
    for name in ("encode", "decode"):
        function = getattr(vae, name)
        setattr(vae, name, lambda *a, _f=function, **k: (threads.append(threading.get_ident()), _f(*a, **k))[1])
    try:
        assert previewer.prepare()
        shown: list[Image.Image] = []
        previewer.submit(preview.Snapshot(torch.randn(1, 4, 16, 16), {}), shown.append)
        previewer.close()
    finally:
        del vae.encode, vae.decode
    assert threads == [threading.get_ident()]
    assert [image.size for image in shown] == [(16, 16)]


def flow(level: Any, clean: Any, noise: Any) -> Any:
    return torch.lerp(clean, noise, level)


@pytest.mark.parametrize(
    ("scheduler", "noisy"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), flow),
        (diffusers.FlowMatchHeunDiscreteScheduler(), flow),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), flow),
        (diffusers.EulerDiscreteScheduler(), lambda level, clean, noise: clean + level * noise),
        (
            diffusers.DPMSolverMultistepScheduler(),
            lambda level, clean, noise: (clean + level * noise) / (level**2 + 1).sqrt(),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_clean_latents_are_known_before_the_end(scheduler: Any, noisy: Callable[..., Any]) -> None:
    """A denoiser that knows the result: the estimate is that result, whatever noise is left."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    scheduler.set_timesteps(8)
    sample = noisy(scheduler.sigmas[0], clean, noise)
    answer = noise - clean if noisy is flow else noise
    result = scheduler.step(answer, scheduler.timesteps[0], sample, return_dict=False)
    torch.testing.assert_close(clean_estimate(scheduler, answer, sample, result), clean, rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def painter(root: Path) -> Iterator[DiffusionStage]:
    """The demo painter, as in configs/draw.yaml."""
    call = {"num_inference_steps": 12, "guidance_scale": 2.0, "height": 128, "width": 128}
    spec = DiffusionSpec(model="models/shapes/painter", call=call)
    stage = DiffusionStage(StageContext("draw", spec, str(root / "configs")))
    stage.load(lambda _: None)
    yield stage
    stage.unload()


@pytest.mark.parametrize(("way", "most"), [("decoded", 8.0), ("projected", 40.0)])
def test_previews_of_the_demo_painter_resemble_its_picture(
    way: str, most: float, painter: DiffusionStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "MAX_DECODED_PARAMETERS", 10**9 if way == "decoded" else 0)
    painter.previewer = new_previewer(painter)
    painter.previewer._pool = AtOnce()  # type: ignore[assignment]
    items, payload = compute(painter, {"prompt": "a large red circle on a white background"}, 4)
    shown, drawn = [item.image for item in previews_of(items)], payload["images"][0]
    blank = Image.new("RGB", drawn.size, (128, 128, 128))
    differences = [difference(image, drawn) for image in shown]
    assert len(shown) == 3
    assert differences[-1] < most < difference(shown[0], blank)
    assert differences[1] < 2 * most


def test_the_projection_of_the_demo_painters_vae(painter: DiffusionStage) -> None:
    """Fitted to the pattern, it shows other pictures too."""
    assert painter.built is not None
    vae = painter.built.pipeline.vae
    projection = fit_projection(vae, (4, 8), "cpu", is_offloaded=False)
    picture = pattern(96).flip(2)
    with torch.no_grad():
        latents = vae.encode(picture[None] * 2 - 1).latent_dist.mode()[0]
    small = torch.nn.functional.interpolate(picture[None], latents.shape[-2:], mode="area")[0]
    error = (projection.apply(latents) - small).abs().mean()
    assert error < 0.4 * (small - small.mean((1, 2), keepdim=True)).abs().mean()
