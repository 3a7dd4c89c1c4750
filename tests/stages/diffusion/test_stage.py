"""The diffusion stage on tiny pipelines of many families: outputs, progress, abort, seeds, requests side by side."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from omni.errors import RequestAborted, StageError, StageSetupError
from omni.media import Audio, Video
from omni.messages import LoadProgress, Output, Payload, Progress, StageItem, Started
from omni.stage import StageCall, Work
from stages.diffusion.stage import DiffusionStage
from tests.stages.diffusion import tiny
from tests.stages.diffusion.conftest import build_stage

# Libraries below us, on classes they keep for old checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

FAMILIES = sorted(tiny.FAMILIES)
TYPES = {"images": list, "video": Video, "audio": Audio}


def compute(stage: DiffusionStage, inputs: dict[str, Any], seed: int = 0) -> list[StageItem]:
    items: list[StageItem] = []
    payload = stage.compute(StageCall("request", inputs, seed), Work("request", items.append))
    return [*items, Output(payload=payload)]


def payload_of(items: list[StageItem]) -> Payload:
    assert isinstance(items[-1], Output)
    return items[-1].payload


def pixels(value: Any) -> np.ndarray:
    """The numbers in a payload's value."""
    match value:
        case Video():
            return value.frames
        case Audio():
            return value.samples
        case _:
            return np.stack([np.asarray(image) for image in value])


def draw(stage: DiffusionStage, inputs: dict[str, Any], seed: int = 0) -> np.ndarray:
    payload = payload_of(compute(stage, inputs, seed))
    return pixels(next(iter(payload.values())))


async def collect(stage: DiffusionStage, request_id: str, inputs: dict[str, Any], seed: int) -> list[StageItem]:
    return [item async for item in stage.run(StageCall(request_id, inputs, seed))]


@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_progress(family: str, loaded: Callable[[str], DiffusionStage]) -> None:
    stage, recipe = loaded(family), tiny.FAMILIES[family]
    items = compute(stage, recipe.inputs(1), seed=3)
    steps = [item for item in items if isinstance(item, Progress)]
    payload = payload_of(items)
    assert items[:-1] == steps
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert {step.num_steps for step in steps} == {len(steps)} == ({3} if recipe.pipeline else {4})
    assert {step.unit for step in steps} == {"denoise step"}
    assert next(iter(payload)) == recipe.port
    assert isinstance(payload[recipe.port], TYPES[recipe.port])
    assert pixels(payload[recipe.port]).std() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_the_bare_pipeline(
    family: str, loaded: Callable[[str], DiffusionStage], checkpoint: Callable[[str], Path]
) -> None:
    recipe = tiny.FAMILIES[family]
    bare = getattr(diffusers, recipe.pipeline or recipe.saved).from_pretrained(
        checkpoint(family), **absent(checkpoint(family))
    )
    bare.set_progress_bar_config(disable=True)
    result = bare(
        **recipe.inputs(1),
        **recipe.call,
        num_inference_steps=4,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="pil" if recipe.port == "images" else "np",
    )
    drawn = draw(loaded(family), recipe.inputs(1), seed=5)
    field = {"images": "images", "video": "frames", "audio": "audios"}[recipe.port]
    expected = pixels(result[field]) if recipe.port == "images" else np.asarray(result[field][0])
    if recipe.port == "video":
        expected = (expected * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(drawn, expected)


def absent(folder: Path) -> dict[str, None]:
    from stages.diffusion.checkpoint import absent_components, read_index

    return dict.fromkeys(absent_components(read_index(folder)))


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_decides(family: str, loaded: Callable[[str], DiffusionStage]) -> None:
    stage, recipe = loaded(family), tiny.FAMILIES[family]
    first = draw(stage, recipe.inputs(1), seed=11)
    other_seed = draw(stage, recipe.inputs(1), seed=12)
    other_inputs = draw(stage, recipe.inputs(2), seed=11)
    again = draw(stage, recipe.inputs(1), seed=11)
    np.testing.assert_array_equal(first, again)
    assert (first != other_seed).any()
    assert (first != other_inputs).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_abort_stops_within_a_step(family: str, loaded: Callable[[str], DiffusionStage]) -> None:
    stage, recipe = loaded(family), tiny.FAMILIES[family]
    before = draw(stage, recipe.inputs(1), seed=1)
    items: list[StageItem] = []
    work, calls = Work("gone", items.append), []

    def stop_at_second_call(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            work.stop.set()

    handles = [seam.denoiser.register_forward_pre_hook(stop_at_second_call) for seam in stage.built.seams]
    with pytest.raises(RequestAborted):
        stage.compute(StageCall("gone", recipe.inputs(1), 1), work)
    for handle in handles:
        handle.remove()
    assert len(calls) == 2
    assert all(isinstance(item, Progress) for item in items)
    np.testing.assert_array_equal(draw(stage, recipe.inputs(1), seed=1), before)


@pytest.mark.parametrize("family", FAMILIES)
async def test_requests_at_once_equal_requests_in_turn(family: str, loaded: Callable[[str], DiffusionStage]) -> None:
    stage, recipe = loaded(family), tiny.FAMILIES[family]
    requests = [({**recipe.inputs(n), "num_inference_steps": 2 + n}, n) for n in range(3)]
    in_turn = [pixels(payload_of(compute(stage, inputs, seed))[recipe.port]) for inputs, seed in requests]
    runs = [collect(stage, f"request-{seed}", inputs, seed) for inputs, seed in requests]
    for expected, items in zip(in_turn, await asyncio.gather(*runs), strict=True):
        np.testing.assert_array_equal(pixels(payload_of(items)[recipe.port]), expected)
        assert isinstance(items[0], Started)
        assert items[-2] == Progress(step=len(items) - 2, num_steps=len(items) - 2, unit="denoise step")


@pytest.mark.parametrize("family", ["flux", "sd3"])
async def test_interleaved_denoise_steps_do_not_mix(family: str, checkpoint: Callable[[str], Path]) -> None:
    """Two worker threads take turns at every denoiser call, with other step counts and parameters."""
    stage, recipe = build_stage(family, checkpoint(family), workers=2), tiny.FAMILIES[family]
    requests = [({**recipe.inputs(n), "num_inference_steps": 3 + n, "guidance_scale": 2.0 + n}, n) for n in range(2)]
    in_turn = [draw(stage, inputs, seed) for inputs, seed in requests]
    meeting = threading.Barrier(2)
    threads = set()

    def meet(*_: Any) -> None:
        threads.add(threading.get_ident())
        try:
            meeting.wait(timeout=10)
        except threading.BrokenBarrierError:  # the shorter request is done, and the other goes on alone
            return

    handle = stage.built.seams[0].denoiser.register_forward_pre_hook(meet)
    tasks = [asyncio.ensure_future(collect(stage, f"request-{seed}", inputs, seed)) for inputs, seed in requests]
    for task in tasks:
        task.add_done_callback(lambda _: meeting.abort())
    results = await asyncio.gather(*tasks)
    handle.remove()
    stage.unload()
    assert len(threads) == 2
    for expected, items in zip(in_turn, results, strict=True):
        np.testing.assert_array_equal(pixels(payload_of(items)["images"]), expected)


async def test_abort_from_the_event_loop(loaded: Callable[[str], DiffusionStage]) -> None:
    stage, loop = loaded("qwen"), asyncio.get_running_loop()

    def abort(*_: Any) -> None:
        asyncio.run_coroutine_threadsafe(stage.abort("request"), loop).result(timeout=30)

    handle = stage.built.seams[0].denoiser.register_forward_pre_hook(abort)
    with pytest.raises(RequestAborted) as caught:
        await collect(stage, "request", tiny.FAMILIES["qwen"].inputs(0), 0)
    handle.remove()
    assert caught.value.request_id == "request"


def test_request_overrides_the_graphs_call(loaded: Callable[[str], DiffusionStage]) -> None:
    inputs = tiny.FAMILIES["flux"].inputs(0)
    items = compute(loaded("flux"), {**inputs, "height": 16, "width": 64, "num_inference_steps": 2, "sigmas": None})
    assert payload_of(items)["images"][0].size == (64, 16)
    assert len(items) == 3


def test_several_pictures(loaded: Callable[[str], DiffusionStage]) -> None:
    images = payload_of(compute(loaded("qwen"), {**tiny.FAMILIES["qwen"].inputs(0), "num_images_per_prompt": 2}))[
        "images"
    ]
    assert [image.mode for image in images] == ["RGB", "RGB"]
    assert (pixels(images[:1]) != pixels(images[1:])).any()


def test_picture_in_any_colour_mode(loaded: Callable[[str], DiffusionStage]) -> None:
    inputs = tiny.FAMILIES["flux_img2img"].inputs(0)
    grey = inputs["image"].convert("L")
    drawn = draw(loaded("flux_img2img"), {**inputs, "image": grey})
    np.testing.assert_array_equal(drawn, draw(loaded("flux_img2img"), {**inputs, "image": [grey.convert("RGB")]}))


def test_video_and_sound(loaded: Callable[[str], DiffusionStage]) -> None:
    payload = payload_of(compute(loaded("ltx2"), tiny.FAMILIES["ltx2"].inputs(0)))
    video, audio = payload["video"], payload["audio"]
    assert (video.frames.dtype, video.frames.shape, video.fps) == (np.uint8, (5, 32, 32, 3), 24.0)
    assert (audio.samples.dtype, audio.samples.shape[0], audio.rate) == (np.float32, 2, 24000)
    given = compute(loaded("ltx2"), {**tiny.FAMILIES["ltx2"].inputs(0), "frame_rate": 12})
    assert payload_of(given)["video"].fps == 12.0


def test_fps_of_the_spec(checkpoint: Callable[[str], Path]) -> None:
    stage = build_stage("wan", checkpoint("wan"), fps=8.0)
    video = payload_of(compute(stage, tiny.FAMILIES["wan"].inputs(0)))["video"]
    assert (video.fps, video.frames.shape) == (8.0, (9, 16, 16, 3))
    stage.unload()


def test_both_denoisers_of_wan_run(loaded: Callable[[str], DiffusionStage]) -> None:
    stage, ran = loaded("wan"), []
    handles = [
        seam.denoiser.register_forward_pre_hook(lambda module, _: ran.append(module)) for seam in stage.built.seams
    ]
    compute(stage, tiny.FAMILIES["wan"].inputs(0))
    for handle in handles:
        handle.remove()
    assert len(set(ran)) == 2


def test_load_reports_components(checkpoint: Callable[[str], Path]) -> None:
    reports: list[LoadProgress] = []
    stage = build_stage("wan", checkpoint("wan"), reports)
    assert {report.component for report in reports[:-1]} == {"vae", "transformer", "transformer_2"}
    done = [report.done_bytes for report in reports]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == reports[-1].total_bytes > 0
    assert [report.state for report in reports] == ["loading"] * (len(reports) - 1) + ["ready"]
    stage.unload()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidanse_scale": 2}, "FluxPipeline takes no 'guidanse_scale', did you mean 'guidance_scale'?"),
        ({"height": "big"}, "'height' must be int, not 'big'"),
        ({"height": True}, "'height' must be int, not True"),
        ({"prompt": 7}, "'prompt' must be text, not 7"),
        ({"prompt_embeds": "a cat"}, "'prompt_embeds' must be a tensor, or a list of tensors, not str"),
        ({"ip_adapter_image": 3}, "'ip_adapter_image' must be a PIL image, a list of them, or a tensor, not int"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str, loaded: Callable[[str], DiffusionStage]) -> None:
    with pytest.raises(StageError) as caught:
        compute(loaded("flux"), {**tiny.FAMILIES["flux"].inputs(0), **changes})
    assert caught.value.stage == "draw"
    assert message in caught.value.cause
    assert caught.value.remedy


def test_pipelines_own_complaint(loaded: Callable[[str], DiffusionStage]) -> None:
    with pytest.raises(StageError, match=r"FluxPipeline: Provide either `prompt` or `prompt_embeds`") as caught:
        compute(loaded("flux"), {})
    assert "check_inputs" in caught.value.details


def test_prompt_without_text_encoder(loaded: Callable[[str], DiffusionStage]) -> None:
    with pytest.raises(StageError, match=r"the checkpoint has no .*text_encoder") as caught:
        compute(loaded("sd3"), {"prompt": "a cat"})
    assert "prompt_embeds" in caught.value.remedy


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory(error: Exception, loaded: Callable[[str], DiffusionStage]) -> None:
    stage, inputs = loaded("flux"), tiny.FAMILIES["flux"].inputs(0)

    def fail(*_: Any) -> None:
        raise error

    handle = stage.built.seams[0].denoiser.register_forward_pre_hook(fail)
    with pytest.raises(StageError, match="cpu is out of memory") as caught:
        compute(stage, inputs)
    handle.remove()
    assert "height" in caught.value.remedy
    assert len(compute(stage, inputs)) == 5


def test_no_gpu(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from omni.spec import DiffusionSpec
    from omni.stage import StageContext

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stage = DiffusionStage(StageContext("draw", DiffusionSpec(model=str(checkpoint("flux"))), ".", device="cuda"))
    with pytest.raises(StageSetupError, match="torch sees no GPU") as caught:
        stage.load(lambda _: None)
    assert caught.value.remedy == "set device: cpu"


def test_unload_gives_the_forward_back(checkpoint: Callable[[str], Path]) -> None:
    stage = build_stage("flux", checkpoint("flux"))
    denoiser = stage.built.seams[0].denoiser
    assert "forward" in vars(denoiser)
    stage.unload()
    assert "forward" not in vars(denoiser)


def test_images_are_new_objects(loaded: Callable[[str], DiffusionStage]) -> None:
    image = payload_of(compute(loaded("z_image"), tiny.FAMILIES["z_image"].inputs(0)))["images"][0]
    assert isinstance(image, Image.Image)
    assert image.size == (32, 32)
