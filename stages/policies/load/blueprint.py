"""A module without weights, what its tensors shall be, and where in the checkpoint their bytes lie."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from omni.errors import UsageError
from omni.graph import nearest
from stages.policies.load.catalog import Entry

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""torch's dtypes by the names of safetensors headers."""
MAX_NAMED = 3
"""How many tensors an error names."""
REMEDY = "take the config.json that belongs to the weights, or set load: {enabled: false} to load as the library does"


class Unsupported(Exception):
    """This policy leaves the component to its library, for the reason that the message gives."""


class ComponentRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One component to load."""

    name: str
    model_class: type
    folder: Path
    library: Literal["diffusers", "transformers"]
    dtype: torch.dtype
    variant: str | None = None
    target: Literal["device", "host"] = "device"
    """`host` is the master copy that offload works from."""
    device: str = "cpu"
    shares: bool = False
    """With target `host`: other processes on this host load the same, and all use one copy."""
    options: dict[str, Any] = {}
    """For the library's from_pretrained, when the component is left to it."""


class Target(msgspec.Struct, frozen=True):
    """One tensor of the finished module."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Entry | None
    """The tensor of the checkpoint with the same elements; None when `merges` make it."""


class Merge(msgspec.Struct, frozen=True):
    """Tensors of the checkpoint that a library puts together, or takes apart, into others."""

    sources: tuple[Entry, ...]
    convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    """From name of a source -> tensor to name of a target -> tensor."""


class Blueprint(msgspec.Struct, frozen=True):
    """A component before its weights are there."""

    request: ComponentRequest
    module: torch.nn.Module
    """On the meta device, but for buffers that no checkpoint holds."""
    targets: tuple[Target, ...]
    """In the order of the module."""
    merges: tuple[Merge, ...] = ()
    finish: Callable[[], None] = lambda: None
    """What the library does with a module once its weights are there."""

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        whole = sum(target.source.num_bytes for target in self.targets if target.source)
        return whole + sum(entry.num_bytes for merge in self.merges for entry in merge.sources)

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put tensors (by target name) in the place of the module's own."""
        owners = dict(self.module.named_modules(remove_duplicate=False))
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = owners[owner]
            if leaf in module._parameters:
                tensor = torch.nn.Parameter(tensor, requires_grad=False)
                module._parameters[leaf] = tensor
            else:
                module._buffers[leaf] = tensor
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers would draw it anew


def check_keys(
    folder: Path, class_name: str, missing: Collection[str], unexpected: Collection[str], shapes: Iterable[str]
) -> None:
    """Raise one UsageError that names all that does not fit: missing, unexpected and wrongly shaped tensors."""
    faults = []
    if missing:
        names = [f"'{name}'{nearest(name, sorted(unexpected))}" for name in sorted(missing)[:MAX_NAMED]]
        faults.append(f"lacks {_listed(names, len(missing))}")
    if unexpected:
        names = [f"'{name}'" for name in sorted(unexpected)[:MAX_NAMED]]
        faults.append(f"holds {_listed(names, len(unexpected))}, which {class_name} does not have")
    faults += list(shapes)[:MAX_NAMED]
    if faults:
        raise UsageError(f"{folder}: does not fit {class_name}: it {'; it '.join(faults)}: {REMEDY}")


def shape_faults(targets: Iterable[Target], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Which targets have other shapes in the checkpoint than in the module's own state."""
    faults = []
    for target in targets:
        shape = target.source.shape if target.source else target.shape
        wanted = tuple(expected[target.name].shape)
        if shape != wanted:
            place = f" in {Path(target.source.file).name}" if target.source else ""
            faults.append(f"has shape {list(shape)} for '{target.name}'{place}, where {list(wanted)} belongs")
    return faults


def matches(patterns: Iterable[str] | None, name: str) -> bool:
    """Whether one of the regular expressions is found in `name`."""
    return any(re.search(pattern, name) for pattern in patterns or ())


def _listed(names: list[str], total: int) -> str:
    more = total - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
