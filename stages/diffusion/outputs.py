"""From a pipeline's output to a payload: PIL images, uint8 Video with fps, float32 Audio with its rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from omni.media import Audio, Video
from omni.messages import Payload
from omni.registry import Port
from stages.diffusion.signature import OUTPUT_PORTS, Signature

FPS_PARAMETERS = ("frame_rate", "fps")
RATE_KEYS = ("output_sampling_rate", "sampling_rate", "sample_rate")


def output_type(outputs: Mapping[str, Port]) -> str:
    """What to ask the pipeline for: PIL for pictures, else tensors, which are made uint8 where they lie."""
    return "pil" if next(iter(outputs)) == "images" else "pt"


def build_payload(result: Any, signature: Signature, fps: float, rate: int | None) -> Payload:
    """The payload of a pipeline's `result`, by port. Fields that are no media are passed on as they are.

    `fps` goes with a video, `rate` with audio. Raises ValueError when there is none of its ports, or no rate.
    """
    payload: Payload = {}
    for field, value in result.items():
        port = OUTPUT_PORTS[field][0] if field in OUTPUT_PORTS else field
        if value is None or port not in signature.outputs:
            continue
        match port:
            case "images":
                payload[port] = list(_images(value))
            case "video":
                payload[port] = _one_or_list([Video(_frames(clip), fps) for clip in _clips(value)])
            case "audio":
                if rate is None:
                    raise ValueError(f"{signature.pipeline} gives sound, but no component names its sampling rate")
                payload[port] = _one_or_list([Audio(samples, rate) for samples in _samples(value)])
            case _:
                payload[port] = value
    if not payload:
        raise ValueError(f"{signature.pipeline} gave none of its outputs ({', '.join(signature.outputs)})")
    return payload


def frames_per_second(arguments: Mapping[str, Any], signature: Signature, otherwise: float) -> float:
    """The call's own frame rate, given or by default, else `otherwise`."""
    for name in FPS_PARAMETERS:
        parameter = signature.parameters.get(name)
        value = arguments.get(name, parameter.default if parameter else None)
        if isinstance(value, (int, float)):
            return float(value)
    return otherwise


def audio_rate(pipeline: Any) -> int | None:
    """Samples per second of the pipeline's sound, as its vocoder or VAE says; None when it makes no sound."""
    configs = [part.config for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for key in RATE_KEYS:
        for config in configs:
            if isinstance(rate := getattr(config, key, None), int):
                return rate
    return None


def _images(value: Any) -> Iterator[Image.Image]:
    """All pictures in `value`, in order: nested lists (layers) are flattened, arrays converted."""
    if isinstance(value, Image.Image):
        yield value
    elif isinstance(value, (list, tuple)) or value.ndim > 3:
        for item in value:
            yield from _images(item)
    else:
        pixels = _uint8(value)
        yield Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _clips(value: Any) -> list[Any]:
    """The clips of a batch; a bare list of pictures is one clip."""
    return [value] if isinstance(value[0], Image.Image) else list(value)


def _frames(clip: Any) -> np.ndarray:
    """One clip as uint8 (num_frames, height, width, 3).

    Frame by frame, so that a long clip never exists twice as floats on the device.
    """
    return np.stack([np.asarray(f.convert("RGB")) if isinstance(f, Image.Image) else _uint8(f) for f in clip])


def _uint8(picture: Any) -> np.ndarray:
    """One picture in [0, 1], a tensor with channels first or an array with channels last, as uint8, channels last."""
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().movedim(0, -1)
    pixels = torch.as_tensor(picture).float().mul(255).round().clamp(0, 255).to(torch.uint8)
    array: np.ndarray = pixels.contiguous().cpu().numpy()
    return array


def _samples(value: Any) -> Iterator[np.ndarray]:
    """Each clip of a batch as float32 (channels, num_samples)."""
    for clip in value:
        samples = torch.as_tensor(clip).detach().float().cpu().numpy()
        yield np.clip(np.atleast_2d(samples), -1.0, 1.0)


def _one_or_list(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items
