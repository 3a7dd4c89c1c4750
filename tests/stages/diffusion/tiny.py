"""Tiny random pipelines of many families, saved as folders, and the stage calls that fit them.

Text encoders are left out, so that embeddings come in as tensors. Gates that start at zero get random weights, because
a denoiser that answers zero would hide every fault.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from tests.stages.diffusion.tiny_images import (
    flux,
    flux2_klein,
    flux_inputs,
    qwen,
    qwen_inputs,
    sd3,
    sd3_inputs,
    z_image,
    z_image_inputs,
)
from tests.stages.diffusion.tiny_media import (
    LTX2_CALL,
    hunyuan_video,
    hunyuan_video_inputs,
    ltx2,
    ltx2_inputs,
    stable_audio,
    wan,
    wan_image_to_video,
)
from tests.stages.diffusion.tiny_more import (
    chroma,
    cogvideox,
    hidream,
    hidream_inputs,
    lumina2,
    masked_embeds,
    pixart,
    sana,
    stable_diffusion,
    stable_diffusion_xl,
    stable_diffusion_xl_inputs,
)
from tests.stages.diffusion.tiny_parts import picture, two_embeds


class Family(msgspec.Struct, frozen=True):
    """One tiny pipeline."""

    saved: str
    """Class name of the pipeline that `build` makes."""
    build: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    """variant -> inputs that the stage gets; other variants have other values of the same shapes."""
    call: dict[str, Any]
    """The spec's `call`, without num_inference_steps."""
    port: str
    pipeline: str | None = None
    """The spec's `pipeline`, where it is not the class that was saved."""


FAMILIES = {
    "qwen": Family(
        "QwenImagePipeline", qwen, qwen_inputs, {"true_cfg_scale": 4.0, "height": 32, "width": 32}, "images"
    ),
    "flux": Family("FluxPipeline", flux, flux_inputs, {"guidance_scale": 3.5, "height": 32, "width": 32}, "images"),
    "flux_img2img": Family(
        "FluxPipeline",
        flux,
        lambda seed: {**flux_inputs(seed), "image": picture(seed, 32)},
        {"strength": 0.6, "height": 32, "width": 32},
        "images",
        "FluxImg2ImgPipeline",
    ),
    "flux2_klein": Family(
        "Flux2KleinPipeline", flux2_klein, two_embeds(16), {"guidance_scale": 4.0, "height": 32, "width": 32}, "images"
    ),
    "sd3": Family(
        "StableDiffusion3Pipeline", sd3, sd3_inputs, {"guidance_scale": 5.0, "height": 32, "width": 32}, "images"
    ),
    "wan": Family("WanPipeline", wan, two_embeds(32), {"height": 16, "width": 16, "num_frames": 9}, "video"),
    "wan_i2v": Family(
        "WanImageToVideoPipeline",
        wan_image_to_video,
        lambda seed: {**two_embeds(32)(seed), "image": picture(seed, 16)},
        {"height": 16, "width": 16, "num_frames": 9},
        "video",
    ),
    "z_image": Family(
        "ZImagePipeline", z_image, z_image_inputs, {"guidance_scale": 5.0, "height": 32, "width": 32}, "images"
    ),
    "stable_audio": Family("StableAudioPipeline", stable_audio, two_embeds(8), {"guidance_scale": 6.0}, "audio"),
    "ltx2": Family("LTX2Pipeline", ltx2, ltx2_inputs, LTX2_CALL, "video"),
    "hunyuan_video": Family(
        "HunyuanVideo15Pipeline",
        hunyuan_video,
        hunyuan_video_inputs,
        {"height": 16, "width": 16, "num_frames": 5},
        "video",
    ),
}


def positive(inputs: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    """Inputs without a negative branch, for pipelines that take its embeddings only beside a text encoder."""
    return lambda seed: {name: value for name, value in inputs(seed).items() if "negative" not in name}


SQUARE = {"height": 32, "width": 32}
MORE_FAMILIES = {
    "chroma": Family(
        "ChromaPipeline", chroma, masked_embeds(32, torch.bool), {"guidance_scale": 4.0, **SQUARE}, "images"
    ),
    "cogvideox": Family(
        "CogVideoXPipeline",
        cogvideox,
        two_embeds(32),
        {"guidance_scale": 4.0, "height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 8},
        "video",
    ),
    "hidream": Family("HiDreamImagePipeline", hidream, hidream_inputs, {"guidance_scale": 4.0, **SQUARE}, "images"),
    "lumina2": Family("Lumina2Pipeline", lumina2, masked_embeds(16), {"guidance_scale": 4.0, **SQUARE}, "images"),
    "pixart": Family(
        "PixArtSigmaPipeline",
        pixart,
        positive(masked_embeds(16)),
        {"guidance_scale": 1.0, "use_resolution_binning": False, **SQUARE},
        "images",
    ),
    "sana": Family(
        "SanaPipeline",
        sana,
        positive(masked_embeds(16)),
        {"guidance_scale": 1.0, "use_resolution_binning": False, **SQUARE},
        "images",
    ),
    "stable_diffusion": Family(
        "StableDiffusionPipeline", stable_diffusion, two_embeds(16), {"guidance_scale": 4.0, **SQUARE}, "images"
    ),
    "stable_diffusion_xl": Family(
        "StableDiffusionXLPipeline",
        stable_diffusion_xl,
        stable_diffusion_xl_inputs,
        {"guidance_scale": 4.0, **SQUARE},
        "images",
    ),
}
"""For what is tried on as many denoisers as possible."""


def save(name: str, root: Path) -> Path:
    """Save the pipeline of family `name` under `root`, once."""
    build = {**FAMILIES, **MORE_FAMILIES}[name].build
    folder = root / build.__name__
    if not folder.exists():
        build().save_pretrained(folder)
    return folder
