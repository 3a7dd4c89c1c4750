"""From a pipeline's output to a payload: shapes and dtypes of every form that pipelines give."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from omni.media import Audio, Video
from omni.registry import Port
from stages.diffusion.outputs import build_payload, frames_per_second, output_type
from stages.diffusion.signature import ANY_OUTPUTS, Signature, find_signature

OPEN = Signature("CustomPipeline", {}, ANY_OUTPUTS, ())


def payload(fps: float = 16.0, rate: int | None = 8000, signature: Signature = OPEN, **fields: Any) -> dict[str, Any]:
    return build_payload(fields, signature, fps, rate)


def test_layers_are_flattened_and_keep_alpha() -> None:
    layer, page = Image.new("RGBA", (4, 2)), Image.new("RGB", (4, 2))
    images = payload(images=[[layer, layer], [page]])["images"]
    assert [image.mode for image in images] == ["RGBA", "RGBA", "RGB"]


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (np.full((2, 5, 7, 3), 0.5, np.float32), "RGB"),
        (np.full((2, 5, 7, 1), 0.5, np.float32), "L"),
        (torch.full((2, 4, 5, 7), 0.5), "RGBA"),
        (torch.full((2, 3, 5, 7), 0.5, dtype=torch.bfloat16), "RGB"),
    ],
)
def test_images_from_arrays(value: Any, mode: str) -> None:
    images = payload(images=value)["images"]
    assert [(image.mode, image.size) for image in images] == [(mode, (7, 5))] * 2
    assert np.asarray(images[0]).flat[0] == 128


@pytest.mark.parametrize(
    "frames",
    [
        torch.full((1, 4, 3, 6, 8), 0.25),
        torch.full((1, 4, 3, 6, 8), 0.25, dtype=torch.bfloat16),
        np.full((1, 4, 6, 8, 3), 0.25, np.float32),
        [[Image.new("RGB", (8, 6), (64, 64, 64))] * 4],
        [Image.new("RGB", (8, 6), (64, 64, 64))] * 4,
    ],
)
def test_video_forms(frames: Any) -> None:
    video = payload(fps=24.0, frames=frames)["video"]
    assert isinstance(video, Video)
    assert (video.frames.shape, video.frames.dtype, video.fps) == ((4, 6, 8, 3), np.uint8, 24.0)
    assert (video.frames == 64).all()


def test_several_clips() -> None:
    clips = payload(frames=torch.zeros(2, 4, 3, 6, 8), audio=torch.zeros(2, 2, 9))
    assert [clip.frames.shape for clip in clips["video"]] == [(4, 6, 8, 3)] * 2
    assert [clip.samples.shape for clip in clips["audio"]] == [(2, 9)] * 2


@pytest.mark.parametrize(
    ("audios", "shape"),
    [(torch.zeros(1, 2, 9), (2, 9)), (np.zeros((1, 9)), (1, 9)), ([torch.zeros(2, 9, dtype=torch.bfloat16)], (2, 9))],
)
def test_audio_forms(audios: Any, shape: tuple[int, int]) -> None:
    audio = payload(audios=audios)["audio"]
    assert isinstance(audio, Audio)
    assert (audio.samples.shape, audio.samples.dtype, audio.rate) == (shape, np.float32, 8000)


def test_audio_is_clipped() -> None:
    assert payload(audios=torch.tensor([[[-3.0, 0.5, 3.0]]]))["audio"].samples.tolist() == [[-1.0, 0.5, 1.0]]


def test_sound_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="sampling rate"):
        payload(rate=None, audios=torch.zeros(1, 2, 9))


def test_only_declared_ports() -> None:
    declared = msgspec.structs.replace(OPEN, outputs={"images": Port("list[image]")})
    fields = {"images": [Image.new("RGB", (2, 2))], "nsfw_content_detected": [False], "audio": None}
    assert list(payload(signature=declared, **fields)) == ["images"]


def test_embeddings_pass_through() -> None:
    prior = find_signature("FluxPriorReduxPipeline")
    assert prior is not None
    embeds = torch.zeros(1, 2)
    assert payload(signature=prior, prompt_embeds=embeds, pooled_prompt_embeds=embeds)["prompt_embeds"] is embeds


def test_no_output() -> None:
    with pytest.raises(ValueError, match="CustomPipeline gave none of its outputs"):
        payload(images=None)


@given(value=st.floats(0, 1, width=32), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_rounding_is_diffusers_own(value: float, size: tuple[int, int]) -> None:
    image = torch.full((1, 3, *size), value)
    expected = (image[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    np.testing.assert_array_equal(np.asarray(payload(images=image)["images"][0]), expected)


@pytest.mark.parametrize(
    ("pipeline", "arguments", "fps"),
    [
        ("LTX2Pipeline", {}, 24.0),
        ("LTX2Pipeline", {"frame_rate": 30}, 30.0),
        ("StableVideoDiffusionPipeline", {}, 7.0),
        ("WanPipeline", {}, 16.0),
    ],
)
def test_frames_per_second(pipeline: str, arguments: dict[str, Any], fps: float) -> None:
    signature = find_signature(pipeline)
    assert signature is not None
    assert frames_per_second(arguments, signature, 16.0) == fps


@pytest.mark.parametrize(
    ("pipeline", "kind"), [("FluxPipeline", "pil"), ("WanPipeline", "pt"), ("AceStepPipeline", "pt")]
)
def test_output_type(pipeline: str, kind: str) -> None:
    signature = find_signature(pipeline)
    assert signature is not None
    assert output_type(signature.outputs) == kind
