"""How a pipeline's components work in a request, and what they take beside their weights. Light: no torch here.

The estimates are peaks of torch's allocations in one forward, in eager mode, as counted on stock classes with their
stock configs (docs/planner.md has the numbers):

- denoiser: batch x tokens x hidden size x 16 values, a token being one patch of the latents; with batching, for as many
  requests as are joined;
- VAE decode: frames x height x width x channels of its last stage x 7.5 values, or as families.decoding says;
- text encoder: 512 tokens x hidden size x 16 values.
"""

from __future__ import annotations

import math
from typing import Any

from omni.checkpoint import CheckpointFacts
from omni.component_facts import FLOAT_SIZES, auto_dtype
from omni.memory import ComponentUse
from omni.spec import BatchingSpec, DiffusionSpec
from stages.diffusion.families.decoding import DECODE_VALUES

DENOISERS = ("transformer", "unet", "prior")
DECODERS = ("vae", "vqvae", "movq", "audio_vae", "vocoder", "decoder")
NUM_STEPS = 30
"""Denoise steps of a call that names none."""
SIDE = 1024
"""Height and width of a call that names none, where no config.json says more."""
NUM_FRAMES = 81
"""Frames of a video of a call that names none."""
SOUND_SECONDS = 47.0
"""Length of a sound of a call that names none."""
SPATIAL_SCALE, TEMPORAL_SCALE = 8.0, 4.0
"""Pixels a latent along an edge, and frames a latent frame, where config.json says nothing."""
TEXT_TOKENS = 512
PREFIXES = ("decoder_", "")
VALUES = 16
"""Hidden states' worth of values that a transformer block holds at its peak; 13 to 21 were counted."""
VAE_VALUES = 7.5
"""Full-size feature maps that a VAE's decoder holds at its peak."""


def uses(spec: DiffusionSpec, facts: CheckpointFacts) -> dict[str, ComponentUse]:
    """Component -> how often it runs in a request of the spec's `call`, and what it takes."""
    configs = {name: facts.part(name).config for name in facts.components}
    shape = _Shape(spec.call, configs)
    size = FLOAT_SIZES.get(auto_dtype("cuda") if spec.dtype == "auto" else spec.dtype, 2)
    denoisers = [name for name in configs if name.startswith(DENOISERS)]
    calls = 2 if _number(spec.call.get("true_cfg_scale"), 1) > 1 else 1
    steps = _number(spec.call.get("num_inference_steps"), NUM_STEPS)
    found = {}
    for name, config in configs.items():
        if name in denoisers:
            num_runs = max(1, math.ceil(steps * calls / len(denoisers)))
            taken = math.ceil(
                shape.joined(spec.batching)
                * shape.batch
                * shape.num_tokens(config)
                * hidden_size(config)
                * VALUES
                * size
            )
            found[name] = ComponentUse(num_runs=num_runs, calls_per_step=calls, activation_bytes=taken)
        elif name in DECODERS:
            found[name] = ComponentUse(activation_bytes=math.ceil(shape.decode_values(config) * size), may_stream=False)
        else:
            found[name] = ComponentUse(activation_bytes=TEXT_TOKENS * hidden_size(config) * VALUES * size)
    return found


def hidden_size(config: dict[str, Any]) -> int:
    """Width of the model's hidden states, under the names that diffusers and transformers give it; 0 when unknown."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            for name in ("hidden_size", "dim", "d_model", "inner_dim"):
                if size := _number(holder.get(name), 0):
                    return int(size)
    heads = _number(config.get("num_attention_heads"), 0)
    width = int(heads * _number(config.get("attention_head_dim"), 0))
    return width or int(_list(config.get("block_out_channels"))[0])


class _Shape:
    """What a call makes: pixels, frames, latents."""

    def __init__(self, call: dict[str, Any], configs: dict[str, dict[str, Any]]) -> None:
        self.call = call
        self.vae = configs.get("vae", {})
        denoiser = next((config for name, config in configs.items() if name.startswith(DENOISERS)), {})
        self.is_sound = "sampling_rate" in self.vae
        self.is_video = "num_frames" in call or "3D" in str(denoiser.get("_class_name"))
        self.scale, self.frame_scale = _scales(self.vae)
        side = _number(denoiser.get("sample_size"), 0) * self.scale or SIDE
        self.height, self.width = (_number(call.get(name), side) for name in ("height", "width"))
        self.frames = _number(call.get("num_frames"), NUM_FRAMES) if self.is_video else 1.0
        is_guided = _number(call.get("guidance_scale"), 2) > 1 and "guidance_embeds" not in denoiser
        self.batch = _number(call.get("num_images_per_prompt"), 1) * (2 if is_guided else 1)

    def joined(self, batching: BatchingSpec) -> int:
        """Requests of this call that are joined at most."""
        pixels = self.height * self.width * self.frames * self.batch
        return max(1, min(batching.max_requests, int(batching.max_pixels / (pixels or 1))))

    def num_tokens(self, config: dict[str, Any]) -> float:
        """Patches of the latents that the denoiser with this config sees, and the text beside them."""
        if self.is_sound:
            return _number(config.get("sample_size"), 0) + TEXT_TOKENS
        channels = _number(self.vae.get("latent_channels") or self.vae.get("z_dim"), 0) or 1
        packed = math.isqrt(int(_number(config.get("in_channels"), channels) / channels))  # 2 x 2 latents in a token
        patch = _list(config.get("patch_size") or config.get("all_patch_size"))[-1]
        edge = self.scale * max(patch, packed, 1)
        frames = math.ceil((self.frames - 1) / self.frame_scale) + 1
        return frames * (self.height / edge) * (self.width / edge) + TEXT_TOKENS

    def decode_values(self, config: dict[str, Any]) -> float:
        """Values that the decoder with this config holds at its peak."""
        if self.is_sound:
            seconds = _number(self.call.get("audio_end_in_s"), SOUND_SECONDS)
            samples = seconds * _number(config.get("sampling_rate"), 0)
            return samples * _number(config.get("decoder_channels"), 0) * VAE_VALUES
        widths = (config.get(f"{prefix}{name}") for name in ("block_out_channels", "base_dim") for prefix in PREFIXES)
        channels = next((_list(width)[0] for width in widths if width), 0.0)
        values, is_framewise = DECODE_VALUES.get(str(config.get("_class_name")), (VAE_VALUES, False))
        pixels = self.height * self.width / (_number(config.get("patch_size"), 1) or 1) ** 2
        return pixels * (1 if is_framewise else self.frames) * channels * values


def _scales(vae: dict[str, Any]) -> tuple[float, float]:
    """Pixels a latent along an edge, and frames a latent frame."""
    if "temperal_downsample" in vae:
        halved = vae["temperal_downsample"]
        space, time = 2.0 ** len(_list(halved)), 2.0 ** sum(_flags(halved))
    elif "spatio_temporal_scaling" in vae:
        flags = _flags(vae["spatio_temporal_scaling"])
        kinds = [
            str(kind) for kind, flag in zip(vae.get("downsample_type") or ["conv"] * 9, flags, strict=False) if flag
        ]
        space, time = 2.0 ** sum(kind != "temporal" for kind in kinds), 2.0 ** sum(kind != "spatial" for kind in kinds)
    else:
        stages = vae.get("block_out_channels")
        space, time = (2.0 ** (len(_list(stages)) - 1) if stages else SPATIAL_SCALE), TEMPORAL_SCALE
    space *= _number(vae.get("patch_size"), 1) or 1
    space = _number(vae.get("spatial_compression_ratio") or vae.get("scale_factor_spatial"), space)
    return space, _number(vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal"), time)


def _flags(value: object) -> list[bool]:
    return [bool(item) for item in value] if isinstance(value, (list, tuple)) else []


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def _list(value: object) -> list[float]:
    """A number or a list of numbers, as a list that is not empty; zeros for anything else."""
    found = [_number(item, 0.0) for item in value] if isinstance(value, (list, tuple)) else [_number(value, 0.0)]
    return found or [0.0]
