"""From a stage's inputs to the arguments of the pipeline's call: names, types, devices."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image

from omni.media import Audio, Video
from stages.diffusion.check import unknown_parameter
from stages.diffusion.signature import Parameter, Signature, value_fault

_WANTED = {
    "image": "a PIL image, a list of them, or a tensor",
    "video": "an omni.media.Video, or a list of PIL images",
    "audio": "an omni.media.Audio, or a tensor (channels, samples)",
    "tensor": "a tensor, or a list of tensors",
}


class ArgumentFault(ValueError):
    """A value does not fit a parameter of the pipeline's call; the message names both."""


def build_arguments(
    signature: Signature, constants: dict[str, Any], inputs: dict[str, Any], device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments for the call: `constants` of the graph, then the request's `inputs`; None counts as left out.

    Tensors go to `device`, embeddings to `dtype` too. Raises ArgumentFault.
    """
    given = {name: value for name, value in {**copy.deepcopy(constants), **inputs}.items() if value is not None}
    arguments = {}
    for name, value in given.items():
        if name not in signature.parameters:
            raise ArgumentFault(unknown_parameter(name, signature))
        parameter = signature.parameters[name]
        argument = _convert(parameter, value)
        arguments[name] = _place(argument, device, dtype if "embeds" in name else None)
    return arguments


def _convert(parameter: Parameter, value: Any) -> Any:
    kind = parameter.port.type
    if kind not in _WANTED:
        if fault := value_fault(parameter, value):
            raise ArgumentFault(f"'{parameter.name}' {fault}")
        return value
    if isinstance(value, (list, tuple)) and kind != "video":
        return [_convert_one(parameter.name, kind, item) for item in value]
    return _convert_one(parameter.name, kind, value)


def _convert_one(name: str, kind: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = _tensor(value)
    if isinstance(value, torch.Tensor):
        return value
    if kind == "image" and isinstance(value, Image.Image):
        return value if value.mode in ("RGB", "RGBA") or "mask" in name else value.convert("RGB")
    if kind == "video" and isinstance(value, Video):
        return [Image.fromarray(frame) for frame in value.frames]
    if kind == "video" and isinstance(value, list) and all(isinstance(item, Image.Image) for item in value):
        return value
    if kind == "audio" and isinstance(value, Audio):
        return _tensor(value.samples)
    if kind == "tensor" and isinstance(value, (int, float)):
        return value
    if kind in ("image", "tensor") and isinstance(value, (list, tuple)):
        return [_convert_one(name, kind, item) for item in value]
    raise ArgumentFault(f"'{name}' must be {_WANTED[kind]}, not {type(value).__name__}")


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor; a copy when it is read-only, which a tensor cannot be."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _place(value: Any, device: str, dtype: torch.dtype | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, list):
        return [_place(item, device, dtype) for item in value]
    return value
