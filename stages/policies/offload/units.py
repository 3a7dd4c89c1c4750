"""What is moved at once: a block of a module, or a whole component, as few spans of host memory.

The host tensors are the masters: they are never written and never copied back. A unit's parameters are `Parameter`
objects whose data is switched between the master, a view of device memory, and a stand-in, so that whoever holds the
parameter (the module, a tied module, an adapter layer around it) finds what is current.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
import torch
from torch import nn

from stages.memory.engine import CopyEngine, Ready
from stages.memory.host import HostMemory, region_of

ALIGN_BYTES = 256
"""Device tensors begin at multiples of this, as torch's own do: kernels are chosen by alignment, and so are results."""
GAP_BYTES = 4096
"""Spans this close together are copied as one, with what lies between."""
SPANS_PER_TENSOR = 8
"""A unit with more spans than one for this many tensors is packed, when it has more than MIN_SPANS."""
MIN_SPANS = 2


class Span(msgspec.Struct, frozen=True):
    """One stretch of host memory, and where it lies in the unit's device memory."""

    master: torch.Tensor
    """uint8"""
    offset: int


class Place(msgspec.Struct, frozen=True):
    """Where one parameter lies in the unit's device memory."""

    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The parameter's tensor in the unit's device memory (uint8)."""
        part = memory[self.offset : self.offset + self.num_bytes]
        return part.view(self.dtype).as_strided(self.shape, self.stride)


class Unit:
    """Parameters that are copied and bound together. Their data must be dense CPU tensors when the unit is made."""

    def __init__(self, name: str, parameters: Sequence[torch.Tensor]) -> None:
        self.name = name
        self.parameters = sorted(parameters, key=lambda parameter: parameter.data_ptr())
        self.masters = [parameter.data for parameter in self.parameters]
        self.spans, self._places, self.num_bytes = _lay_out(self.masters)
        self._views: dict[int, list[torch.Tensor]] = {}
        self._bound = 0
        """Address of the device memory that the parameters show; 0 for none."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of its parameters, without what lies between them."""
        return sum(place.num_bytes for place in self._places)

    def copy_in(
        self, engine: CopyEngine, memory: torch.Tensor, after: Sequence[object] = (), *, staged: bool = False
    ) -> list[Ready]:
        """Start the copies of all spans to `memory` (uint8, `num_bytes` or more)."""
        return [
            engine.copy_in(memory[span.offset : span.offset + span.master.numel()], span.master, after, staged=staged)
            for span in self.spans
        ]

    def bind(self, memory: torch.Tensor) -> None:
        """Show the device memory in the parameters. Costs nothing when they show it already."""
        address = memory.data_ptr()
        if address == self._bound:
            return
        if address not in self._views:
            with torch.inference_mode(False):  # parameters cannot take tensors that belong to that mode
                self._views[address] = [place.view(memory) for place in self._places]
        for parameter, view in zip(self.parameters, self._views[address], strict=True):
            parameter.data = view
        self._bound = address

    def unbind(self, engine: CopyEngine) -> None:
        """Show stand-ins of the right device, dtype and shape, which take no memory, and forget the device memory."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data = engine.stale(master.dtype).expand(master.shape)
        self._views.clear()
        self._bound = 0

    def restore(self) -> None:
        """Show the masters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data = master
        self._views.clear()
        self._bound = 0


def _lay_out(masters: Sequence[torch.Tensor]) -> tuple[list[Span], list[Place], int]:
    """Spans and places of tensors that are sorted by address, and the device bytes they take.

    A span goes on while the next tensor is in the same storage, close by, and aligned with the span's beginning.
    """
    spans: list[Span] = []
    places: list[Place] = []
    storage, begin, end, offset = 0, 0, 0, 0
    whole = torch.empty(0, dtype=torch.uint8)

    def finish() -> int:
        if end > begin:
            spans.append(Span(whole[begin - storage : end - storage], offset))
        return offset + -(-(end - begin) // ALIGN_BYTES) * ALIGN_BYTES

    for master in masters:
        address, num_bytes = master.data_ptr(), master.numel() * master.element_size()
        same = master.untyped_storage().data_ptr() == storage
        if not same or address - end > GAP_BYTES or (address - begin) % ALIGN_BYTES:
            offset = finish()
            storage, begin, end = master.untyped_storage().data_ptr(), address, address
            whole = torch.empty(0, dtype=torch.uint8).set_(master.untyped_storage())
        end = max(end, address + num_bytes)
        places.append(Place(offset + address - begin, num_bytes, master.dtype, master.shape, master.stride()))
    return spans, places, finish()


# Finding -----------------------------------------------------------------------------------------------------------


class Parts(msgspec.Struct, frozen=True):
    """A component, taken apart."""

    module: nn.Module
    blocks: list[tuple[str, nn.Module]]
    """Name and module of each repeated block, in order of definition."""
    block_parameters: list[list[nn.Parameter]]
    """What of each block moves: plain parameters that nothing else uses."""
    rest: list[nn.Parameter]
    """Plain parameters outside of blocks, or shared between blocks."""
    shared: list[nn.Parameter]
    """Plain parameters that another component uses too."""
    fixed: list[tuple[nn.Module, str]]
    """Owner and name of tensors that cannot be moved as bytes: tensor subclasses, empty ones."""
    buffers: list[torch.Tensor]

    @property
    def block_bytes(self) -> int:
        """Bytes of all parameters that move with blocks."""
        return sum(p.numel() * p.element_size() for parameters in self.block_parameters for p in parameters)


def find_blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Elements of the top-most ModuleLists that have two or more elements with parameters, in order of definition."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            holding = [(i, element) for i, element in child.named_children() if _has_parameters(element)]
            if len(holding) >= 2:
                yield from ((f"{prefix}{name}.{i}", element) for i, element in holding)
                continue
        yield from find_blocks(child, f"{prefix}{name}.")


def take_apart(module: nn.Module, shared: set[int]) -> Parts:
    """Sort the tensors of `module`. `shared`: ids of parameters that other components use too."""
    blocks: list[tuple[str, nn.Module]] = []
    seen_blocks: set[int] = set()
    owners: dict[int, int] = {}
    for name, block in find_blocks(module):
        if id(block) not in seen_blocks:
            seen_blocks.add(id(block))
            for parameter in block.parameters():
                owners[id(parameter)] = -1 if id(parameter) in owners else len(blocks)
            blocks.append((name, block))
    for outside in outside_blocks(module, seen_blocks):
        owners.update((id(parameter), -1) for parameter in outside.parameters(recurse=False))
    block_parameters: list[list[nn.Parameter]] = [[] for _ in blocks]
    parts = Parts(module, [], [], [], [], [], [])
    seen: set[int] = set()
    for owner in module.modules():
        for key, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if not _is_plain(tensor):
                parts.fixed.append((owner, key))
            elif not isinstance(tensor, nn.Parameter):
                parts.buffers.append(tensor)
            elif id(tensor) in shared:
                parts.shared.append(tensor)
            elif (number := owners[id(tensor)]) < 0:
                parts.rest.append(tensor)
            else:
                block_parameters[number].append(tensor)
    for block, parameters in zip(blocks, block_parameters, strict=True):
        if parameters:
            parts.blocks.append(block)
            parts.block_parameters.append(parameters)
    return parts


def shared_parameters(modules: Sequence[nn.Module]) -> set[int]:
    """Ids of parameters that more than one of the modules use."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in modules:
        own = {id(parameter) for parameter in module.parameters()}
        shared |= own & seen
        seen |= own
    return shared


def outside_blocks(module: nn.Module, blocks: set[int]) -> Iterator[nn.Module]:
    """`module` and all modules below it down to `blocks` (ids), which and whose insides are left out."""
    if id(module) not in blocks:
        yield module
        for child in module.children():
            yield from outside_blocks(child, blocks)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes in host memory are all there is to it. Subclasses hold scales or packed data of their own."""
    plain = type(tensor) in (nn.Parameter, torch.Tensor, nn.Buffer) and type(tensor.data) is torch.Tensor
    return plain and tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.numel() > 0


# Packing -----------------------------------------------------------------------------------------------------------


def is_scattered(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether these parameters lie in so many places that copying them one by one would be slow."""
    ordered = sorted((parameter.data for parameter in parameters), key=lambda data: data.data_ptr())
    if any(not _is_dense(data) for data in ordered):
        return True
    return len(_lay_out(ordered)[0]) > max(MIN_SPANS, len(ordered) // SPANS_PER_TENSOR)


def pack(groups: Iterable[Sequence[torch.Tensor]]) -> HostMemory:
    """Move parameters into one new region of host memory, group by group, and show them there.

    Memory that nothing else uses is freed on the way. Raises UsageError when the host has no room.
    """
    listed = [list(group) for group in groups]
    sizes = [[-(-p.numel() * p.element_size() // ALIGN_BYTES) * ALIGN_BYTES for p in group] for group in listed]
    region = HostMemory(sum(map(sum, sizes)))
    offset = 0
    for group, group_sizes in zip(listed, sizes, strict=True):
        for parameter, size in zip(group, group_sizes, strict=True):
            num_bytes = parameter.numel() * parameter.element_size()
            stride = parameter.stride() if _is_dense(parameter.data) else _contiguous_stride(parameter.shape)
            place = region.bytes[offset : offset + num_bytes].view(parameter.dtype).as_strided(parameter.shape, stride)
            place.copy_(parameter.data)
            parameter.data = place
            offset += size
    return region


def regions_of(parameters: Iterable[torch.Tensor]) -> list[HostMemory] | None:
    """The host regions that hold all of these parameters; None when some lie elsewhere."""
    found: dict[int, HostMemory] = {}
    for parameter in parameters:
        region = region_of(parameter.data)
        if region is None:
            return None
        found[id(region)] = region
    return list(found.values())


def _is_dense(data: torch.Tensor) -> bool:
    """Whether the elements fill their extent without holes or overlap."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True))
    return extent == data.numel() and all(
        stride > 0 for size, stride in zip(data.shape, data.stride(), strict=True) if size > 1
    )


def _contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    stride: tuple[int, ...] = torch.empty(shape, device="meta").stride()
    return stride
