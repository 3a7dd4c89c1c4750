"""From a stage's inputs to call arguments: which values fit which parameter, and where tensors go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omni.media import Audio, Video
from stages.diffusion.inputs import ArgumentFault, build_arguments
from stages.diffusion.signature import Signature, find_signature


def signature_of(pipeline: str) -> Signature:
    found = find_signature(pipeline)
    assert found is not None
    return found


def arguments(pipeline: str, inputs: dict[str, Any], constants: dict[str, Any] | None = None) -> dict[str, Any]:
    return build_arguments(signature_of(pipeline), constants or {}, inputs, "cpu", torch.bfloat16)


def test_request_wins_and_none_is_left_out() -> None:
    given = arguments("FluxPipeline", {"height": 64, "width": None, "negative_prompt": None}, {"height": 8, "width": 8})
    assert given == {"height": 64}


def test_constants_are_the_calls_own() -> None:
    constants = {"joint_attention_kwargs": {"scale": [1]}, "prompt": ["a"]}
    given = arguments("FluxPipeline", {}, constants)
    given["joint_attention_kwargs"]["scale"].append(2)
    given["prompt"].append("b")
    assert constants == {"joint_attention_kwargs": {"scale": [1]}, "prompt": ["a"]}


def test_embeddings_take_the_models_dtype() -> None:
    inputs = {
        "prompt_embeds": torch.zeros(1, 2),
        "pooled_prompt_embeds": np.zeros((1, 2), np.float32),
        "latents": torch.zeros(1, 2),
    }
    given = arguments("FluxPipeline", inputs)
    assert {name: value.dtype for name, value in given.items()} == {
        "prompt_embeds": torch.bfloat16,
        "pooled_prompt_embeds": torch.bfloat16,
        "latents": torch.float32,
    }


def test_masks_stay_whole_numbers() -> None:
    given = arguments("QwenImagePipeline", {"prompt_embeds_mask": torch.ones(1, 2, dtype=torch.long)})
    assert given["prompt_embeds_mask"].dtype == torch.long


def test_lists_of_embeddings() -> None:
    given = arguments("ZImagePipeline", {"prompt_embeds": [torch.zeros(2, 2), torch.zeros(3, 2)]})
    assert [tuple(embeds.shape) for embeds in given["prompt_embeds"]] == [(2, 2), (3, 2)]


@pytest.mark.parametrize(("mode", "converted"), [("L", "RGB"), ("P", "RGB"), ("RGB", "RGB"), ("RGBA", "RGBA")])
def test_picture_modes(mode: str, converted: str) -> None:
    picture = Image.new(mode, (2, 2))
    given = arguments("FluxInpaintPipeline", {"image": [picture, picture], "mask_image": Image.new("L", (2, 2))})
    assert [image.mode for image in given["image"]] == [converted] * 2
    assert given["mask_image"].mode == "L"


def test_video_becomes_pictures() -> None:
    frames = np.arange(3 * 2 * 4 * 3, dtype=np.uint8).reshape(3, 2, 4, 3)
    given = arguments("WanVideoToVideoPipeline", {"video": Video(frames, 16.0)})
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in given["video"]]), frames)
    assert arguments("WanVideoToVideoPipeline", {"video": given["video"]}) == given


def test_audio_becomes_a_tensor() -> None:
    given = arguments("AceStepPipeline", {"src_audio": Audio(np.zeros((2, 9), np.float32), 8000)})
    assert given["src_audio"].shape == (2, 9)


def test_read_only_arrays_are_copied() -> None:
    array = np.zeros((2, 9), np.float32)
    array.flags.writeable = False  # as arrays from the object store are
    sound = arguments("AceStepPipeline", {"src_audio": Audio(array, 8000)})["src_audio"]
    latents = arguments("FluxPipeline", {"latents": array})["latents"]
    sound += 1
    latents += 1
    assert not array.any()


@pytest.mark.parametrize(
    ("pipeline", "inputs", "message"),
    [
        ("FluxPipeline", {"hieght": 8}, "FluxPipeline takes no 'hieght', did you mean 'height'?"),
        ("FluxPipeline", {"guidance_scale": "high"}, "'guidance_scale' must be float, not 'high'"),
        (
            "FluxImg2ImgPipeline",
            {"image": "cat.png"},
            "'image' must be a PIL image, a list of them, or a tensor, not str",
        ),
        ("FluxImg2ImgPipeline", {"image": ["cat.png"]}, "'image' must be a PIL image"),
        (
            "WanVideoToVideoPipeline",
            {"video": "cat.mp4"},
            "'video' must be an omni.media.Video, or a list of PIL images",
        ),
        ("AceStepPipeline", {"src_audio": [0.5]}, "'src_audio' must be an omni.media.Audio"),
    ],
)
def test_faults(pipeline: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentFault) as caught:
        arguments(pipeline, inputs)
    assert str(caught.value).startswith(message)
