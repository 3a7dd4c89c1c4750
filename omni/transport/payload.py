"""Looking into payloads: the values they hold, their size, and a guard against writes into shared inputs.

Imports neither torch nor numpy: tensors and arrays are recognised by type name, so that light paths stay light.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from omni.errors import SharedInputError


def is_tensor(value: object) -> bool:
    """True for a torch tensor."""
    return _is_instance(value, "torch", "Tensor")


def is_array(value: object) -> bool:
    """True for a numpy array."""
    return _is_instance(value, "numpy", "ndarray")


def is_image(value: object) -> bool:
    """True for a PIL image."""
    return _is_instance(value, "PIL.Image", "Image")


def _is_instance(value: object, module: str, name: str) -> bool:
    """False where the module was never imported, or is just being imported by another thread: no value of it is yet."""
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(value, found)


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a container holds; nothing for a leaf."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, msgspec.Struct):
        yield from ((f".{name}", getattr(value, name)) for name in value.__struct_fields__)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested containers with `change` applied to each leaf; unchanged parts are shared."""
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_leaves(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
        return msgspec.structs.replace(value, **{name: map_leaves(getattr(value, name), change) for name in names})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: map_leaves(getattr(value, name), change) for name in fields})
    return change(value)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything nested in `value`."""
    if isinstance(value, (dict, list, tuple, msgspec.Struct)) or dataclasses.is_dataclass(value):
        for name, item in children(value):
            yield from leaves(item, path + name)
    else:
        yield path, value


def num_bytes(value: Any) -> int:
    """Size of the data in a payload, in bytes; containers themselves count nothing."""
    total = 0
    for _, leaf in leaves(value):
        if is_tensor(leaf):
            total += leaf.numel() * leaf.element_size()
        elif is_array(leaf):
            total += leaf.nbytes
        elif is_image(leaf):
            total += leaf.width * leaf.height * len(leaf.getbands())
        elif isinstance(leaf, str):
            total += len(leaf.encode())
        elif isinstance(leaf, (bytes, bytearray)):
            total += len(leaf)
        elif leaf is not None:
            total += 8
    return total


def share(value: Any) -> Any:
    """`value` as one of several readers gets it: containers and images of its own, arrays that refuse to be written.

    Tensors stay the same, since torch has no read-only ones; SharedInputGuard watches them.
    """

    def view(leaf: Any) -> Any:
        if is_image(leaf):
            return leaf.copy()
        if is_array(leaf) and leaf.flags.writeable:
            leaf = leaf.view()
            leaf.flags.writeable = False
        return leaf

    return map_leaves(value, view)


class SharedInputGuard:
    """Notices when a stage writes into tensors that other readers share.

    Ray maps shared objects writable and torch ignores read-only memory, so a write would silently change what every
    other reader sees. torch counts in-place changes in `Tensor._version`; writes through `.data` escape it, and so do
    tensors made in inference mode, which have no counter.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        self._versions = [
            (f"{port}{path}", leaf, leaf._version)
            for port, value in inputs.items()
            for path, leaf in leaves(value)
            if is_tensor(leaf) and not leaf.is_inference()
        ]

    def check(self, stage: str) -> None:
        """Raise SharedInputError naming the first input that was written to."""
        for path, leaf, version in self._versions:
            if leaf._version != version:
                raise SharedInputError(
                    stage,
                    f"wrote into its input '{path}', which other readers share",
                    "copy it first (tensor.clone()), or set `mutates_inputs: true` on a function stage",
                )
