"""Signatures read from diffusers' source text: the support list, and agreement with introspection."""

from __future__ import annotations

import inspect
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.diffusion.signature import (
    ANY_OUTPUTS,
    OWNED,
    Parameter,
    find_signature,
    inspect_signature,
    owned_reason,
    pipeline_names,
    signature_of,
    value_fault,
)
from tests.stages.diffusion import tiny

IMAGE = [
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
    "FluxKontextPipeline",
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "GlmImagePipeline",
    "HiDreamImagePipeline",
    "LongCatImagePipeline",
    "LongCatImageEditPipeline",
    "OmniGenPipeline",
    "OvisImagePipeline",
    "QwenImagePipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "ZImagePipeline",
    "ErnieImagePipeline",
    "Cosmos2TextToImagePipeline",
]
VIDEO = [
    "WanPipeline",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
    "WanVideoToVideoPipeline",
    "LTX2Pipeline",
    "LTX2ImageToVideoPipeline",
    "HeliosPipeline",
    "HunyuanVideo15Pipeline",
    "HunyuanVideo15ImageToVideoPipeline",
    "CosmosTextToWorldPipeline",
    "CosmosVideoToWorldPipeline",
    "Cosmos2VideoToWorldPipeline",
    "Cosmos3OmniPipeline",
]
AUDIO = ["StableAudioPipeline", "AceStepPipeline"]
MAIN = {**dict.fromkeys(IMAGE, "images"), **dict.fromkeys(VIDEO, "video"), **dict.fromkeys(AUDIO, "audio")}


@pytest.mark.parametrize("pipeline", MAIN)
def test_support_list(pipeline: str) -> None:
    signature = find_signature(pipeline)
    assert signature is not None
    assert signature.parameters["prompt"].port.type == "text"
    assert next(iter(signature.outputs)) == MAIN[pipeline]
    assert "generator" in signature.accepts
    assert not signature.parameters.keys() & {"self", "kwargs", *OWNED}
    assert not [name for name in signature.parameters if "callback" in name]


@pytest.mark.parametrize("pipeline", ["LTX2Pipeline", "LTX2ImageToVideoPipeline", "Cosmos3OmniPipeline"])
def test_video_with_sound(pipeline: str) -> None:
    signature = find_signature(pipeline)
    assert signature is not None
    assert list(signature.outputs) == ["video", "audio"]


def test_any_pipeline_of_diffusers_can_be_read() -> None:
    assert len(pipeline_names()) > 200
    for name in pipeline_names()[::8]:
        signature = find_signature(name)
        assert signature is not None, name
        assert signature.parameters, name
        assert signature.outputs, name


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_same_as_introspection(family: str) -> None:
    import diffusers

    recipe = tiny.FAMILIES[family]
    pipeline_class: Any = getattr(diffusers, recipe.pipeline or recipe.saved)
    read, seen = find_signature(pipeline_class.__name__), inspect_signature(pipeline_class)
    assert read is not None
    assert read.parameters == seen.parameters
    assert read.accepts == seen.accepts
    assert signature_of(pipeline_class) == read
    own = inspect.signature(pipeline_class.__call__).parameters
    assert {n for n, p in read.parameters.items() if p.port.required} == {
        n for n, p in own.items() if p.default is inspect.Parameter.empty and n in read.parameters
    }


def test_types_of_parameters() -> None:
    flux = find_signature("FluxInpaintPipeline")
    wan = find_signature("WanVACEPipeline")
    music = find_signature("AceStepPipeline")
    assert flux is not None
    assert wan is not None
    assert music is not None
    types = {name: (p.port.type, p.port.many) for name, p in flux.parameters.items()}
    assert types["prompt"] == types["negative_prompt_2"] == ("text", True)
    assert types["image"] == types["mask_image"] == ("image", True)
    assert types["latents"] == types["prompt_embeds"] == types["ip_adapter_image_embeds"] == ("tensor", True)
    assert types["height"] == types["sigmas"] == types["num_images_per_prompt"] == ("json", False)
    assert flux.parameters["height"].scalars == ("int",)
    assert flux.parameters["strength"].default == 0.6
    assert wan.parameters["video"].port.type == wan.parameters["mask"].port.type.replace("image", "video") == "video"
    assert wan.parameters["reference_images"].port.type == "image"
    assert music.parameters["src_audio"].port.type == "audio"
    assert music.parameters["lyrics"].port.type == "text"


class Custom:
    """A pipeline that diffusers does not know."""

    def __call__(
        self,
        sketch: str,
        image: Any = None,
        strength: float = 0.5,
        generator: Any = None,
        callback_on_step_end: Any = None,
        **kwargs: Any,
    ) -> Any:
        return None


def test_custom_class() -> None:
    signature = signature_of(Custom)
    assert list(signature.parameters) == ["sketch", "image", "strength"]
    assert signature.parameters["sketch"].port.required
    assert signature.outputs == ANY_OUTPUTS
    assert signature.accepts == ("generator",)


def test_unknown_class() -> None:
    assert find_signature("FluxxPipeline") is None
    assert find_signature("AutoPipelineForText2Image") is None


@pytest.mark.parametrize("name", ["generator", "return_dict", "output_type", "callback", "callback_on_step_end"])
def test_owned(name: str) -> None:
    assert owned_reason(name)
    assert not owned_reason("height")


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("height", 512, ""),
        ("height", None, ""),
        ("height", 512.0, "must be int, not 512.0"),
        ("height", True, "must be int, not True"),
        ("guidance_scale", 3, ""),
        ("guidance_scale", "3", "must be float, not '3'"),
        ("prompt", ["a", "b"], ""),
        ("prompt", ["a", 1], "must be text, not ['a', 1]"),
        ("sigmas", [1.0, 0.5], ""),
    ],
)
def test_value_fault(name: str, value: Any, fault: str) -> None:
    signature = find_signature("FluxPipeline")
    assert signature is not None
    assert value_fault(signature.parameters[name], value) == fault


flux_parameters = st.sampled_from(sorted((find_signature("FluxPipeline") or inspect_signature(Custom)).parameters))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(string.printable), inner),
    max_leaves=5,
)


@given(name=flux_parameters, value=json_values)
def test_any_json_value_is_judged(name: str, value: Any) -> None:
    signature = find_signature("FluxPipeline")
    assert signature is not None
    parameter: Parameter = signature.parameters[name]
    fault = value_fault(parameter, value)
    if parameter.scalars == ("int",) and value is not None:
        assert (fault == "") == (type(value) is int)
