"""Payloads through Ray's object store: written once by the producer, read in place by every consumer.

`install` teaches Ray's pickler to hand tensors and images over as raw buffers, `to_host` makes a payload ready to be
sent, `own` copies one out of the store. The notes on what crosses how are in docs/ray.md.
"""

from __future__ import annotations

import functools
import pickle
import sys
import warnings
from typing import TYPE_CHECKING, Any

import msgspec

from omni.transport.payload import is_array, is_image, is_tensor, leaves, map_leaves, num_bytes

if TYPE_CHECKING:
    import torch
    from PIL import Image

SMALL_BYTES = 64 * 1024
"""Payloads up to this size travel inside messages. Ray itself would put up to 100 KB there."""
_INSTALLED: set[str] = set()


def install() -> None:
    """Register the reducers of the libraries that this process has imported so far.

    Cheap; call it before each send, since a process without torch shall not pay for importing it.
    """
    if "torch" not in _INSTALLED and "torch" in sys.modules:
        torch = _torch()
        for kind in (torch.Tensor, torch.nn.Parameter):
            _register(kind, _reduce_tensor)
        _INSTALLED.add("torch")
    if "PIL" not in _INSTALLED and "PIL.Image" in sys.modules:
        _register(sys.modules["PIL.Image"].Image, _reduce_image)
        _INSTALLED.add("PIL")


def _register(kind: type, reduce: Any) -> None:
    from ray import cloudpickle

    cloudpickle.CloudPickler.dispatch[kind] = reduce


@functools.cache
def _torch() -> Any:
    """torch, after its one warning that memory of the object store is read-only to numpy (it warns once a process)."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(bytes(1), dtype=torch.uint8)
    return torch


# Tensors --------------------------------------------------------------------------------------------------------


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    """How a host tensor is pickled: its bytes out of band, in the order that they have in memory."""
    torch = _torch()
    if tensor.layout is not torch.strided:
        raise TypeError(f"a {str(tensor.layout)[6:]} tensor cannot cross processes; make it dense with .to_dense()")
    if tensor.is_quantized:
        raise TypeError("a quantized tensor cannot cross processes; send .int_repr() and its scale, or .dequantize()")
    if tensor.device.type != "cpu":
        raise TypeError(f"a tensor on {tensor.device} cannot cross processes; move it to the host first")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    if tensor.numel() == 0:
        return _empty_tensor, (str(tensor.dtype)[6:], tuple(tensor.shape))
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)
    return _build_tensor, (
        pickle.PickleBuffer(flat.numpy()),
        str(tensor.dtype)[6:],
        tuple(tensor.shape),
        tuple(tensor.stride()),
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    """True when the elements fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _build_tensor(buffer: Any, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> Any:
    torch = _torch()
    data = torch.frombuffer(memoryview(buffer).cast("B"), dtype=torch.uint8)
    return data.view(getattr(torch, dtype)).as_strided(shape, stride)


def _empty_tensor(dtype: str, shape: tuple[int, ...]) -> Any:
    torch = _torch()
    return torch.empty(shape, dtype=getattr(torch, dtype))


# Images ---------------------------------------------------------------------------------------------------------


def _reduce_image(image: Image.Image) -> Any:
    """How a PIL image is pickled: its pixels out of band; one with a palette goes PIL's own way."""
    if image.palette is not None:
        return object.__reduce_ex__(image, pickle.HIGHEST_PROTOCOL)
    return _build_image, (image.mode, image.size, pickle.PickleBuffer(image.tobytes()), image.info)


def _build_image(mode: str, size: tuple[int, int], buffer: Any, info: dict[Any, Any]) -> Image.Image:
    from PIL import Image

    image = Image.frombytes(mode, size, memoryview(buffer)) if 0 not in size else Image.new(mode, size)
    image.info = dict(info)
    return image


# Small payloads -------------------------------------------------------------------------------------------------


class Packed(msgspec.Struct, frozen=True):
    """A small payload, pickled: it travels inside messages, which is quicker than an object of its own."""

    data: bytes

    def unpack(self) -> Any:
        """The payload, in memory of this process."""
        return pickle.loads(self.data)


def pack(payload: Any) -> Packed | None:
    """The payload as a Packed, or None when it is too large for that or on a device. Raises what pickling raises."""
    if num_bytes(payload) > SMALL_BYTES or _device_tensors(payload):
        return None
    from ray import cloudpickle

    install()
    return Packed(cloudpickle.dumps(payload))


# Whole payloads -------------------------------------------------------------------------------------------------


def to_host(payload: Any) -> Any:
    """The payload, ready to be sent: tensors on the host, images free of the file they came from.

    CUDA tensors are copied into pinned memory on a side stream, all of them under one wait. What is ready already is
    left as it is. Blocks until the copies are done: call it in a thread.
    """
    tensors = _device_tensors(payload)
    moved = dict(zip(map(id, tensors), _copy_to_host(tensors), strict=True)) if tensors else {}

    def ready(leaf: Any) -> Any:
        if id(leaf) in moved:
            return moved[id(leaf)]
        if is_image(leaf) and type(leaf) is not sys.modules["PIL.Image"].Image:
            return leaf.copy()
        return leaf

    return map_leaves(payload, ready)


def _device_tensors(payload: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in leaves(payload) if is_tensor(leaf) and leaf.device.type == "cuda"]


def _copy_to_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in pinned host memory; each device copies on a stream of its own, after its default stream."""
    torch = _torch()
    sources = {id(tensor): tensor.detach() for tensor in tensors}
    sources = {key: source if _is_dense(source) else source.contiguous() for key, source in sources.items()}
    streams = {source.device: torch.cuda.Stream(source.device) for source in sources.values()}
    for device, stream in streams.items():
        stream.wait_stream(torch.cuda.default_stream(device))
    copies: dict[int, Any] = {}
    for key, source in sources.items():
        copy = torch.empty_like(source, device="cpu", pin_memory=True)
        with torch.cuda.stream(streams[source.device]):
            copies[key] = copy.copy_(source, non_blocking=True)
    for stream in streams.values():
        stream.synchronize()
    return [copies[id(tensor)] for tensor in tensors]


def own(payload: Any) -> Any:
    """The payload with tensors and arrays in memory of this process, which may write to them and keep them."""
    return map_leaves(payload, _own_leaf)


def _own_leaf(leaf: Any) -> Any:
    if is_tensor(leaf):
        return leaf.clone()
    return leaf.copy() if is_array(leaf) else leaf
