"""Finding blocks, laying out their bytes, packing what is scattered."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.memory.engine import HostEngine
from stages.memory.host import HostMemory
from stages.policies.offload.units import (
    ALIGN_BYTES,
    Unit,
    find_blocks,
    is_scattered,
    pack,
    regions_of,
    shared_parameters,
    take_apart,
)


class Block(nn.Module):
    def __init__(self, inner: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.parts = nn.ModuleList([nn.Linear(2, 2) for _ in range(inner)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([Block(2) for _ in range(3)])
        self.single = nn.ModuleList([Block()])
        self.empty = nn.ModuleList([nn.Identity(), nn.Identity(), nn.ReLU()])
        self.mid = nn.Module()
        self.mid.layers = nn.ModuleList([nn.Identity(), nn.Linear(2, 2), nn.Linear(2, 2)])
        self.register_buffer("table", torch.arange(4.0))


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in find_blocks(module)]


def region_for(num_bytes: int) -> HostMemory:
    region = HostMemory(num_bytes)
    region.bytes.copy_(torch.arange(num_bytes) % 251)
    return region


def floats(region: HostMemory, offset: int, num: int) -> nn.Parameter:
    return nn.Parameter(region.bytes[offset : offset + 4 * num].view(torch.float32), requires_grad=False)


def test_blocks_are_the_top_most_lists_of_several_elements_with_parameters() -> None:
    assert names(Model()) == ["blocks.0", "blocks.1", "blocks.2", "mid.layers.1", "mid.layers.2"]


def test_a_module_without_blocks_has_none() -> None:
    assert names(nn.Linear(2, 2)) == []


def test_parts_hold_every_tensor_once() -> None:
    model = Model()
    parts = take_apart(model, set())
    assert [len(parameters) for parameters in parts.block_parameters] == [6, 6, 6, 2, 2]
    assert {id(p) for p in parts.rest} == {id(p) for m in (model.embed, model.single) for p in m.parameters()}
    assert [id(buffer) for buffer in parts.buffers] == [id(model.table)]
    assert parts.fixed == []
    assert parts.shared == []


def test_tied_parameters_do_not_move_with_a_block() -> None:
    model = Model()
    model.blocks[0].linear.weight = model.blocks[1].linear.weight
    model.blocks[2].linear.weight = model.embed.weight
    parts = take_apart(model, set())
    assert [len(parameters) for parameters in parts.block_parameters] == [5, 5, 5, 2, 2]
    assert {id(model.blocks[0].linear.weight), id(model.embed.weight)} <= {id(p) for p in parts.rest}


def test_a_block_that_is_listed_twice_is_one() -> None:
    model = Model()
    model.blocks[1] = model.blocks[0]
    assert [name for name, _ in take_apart(model, set()).blocks[:2]] == ["blocks.0", "blocks.2"]


def test_parameters_of_two_components_belong_to_none() -> None:
    first, second = Model(), Model()
    second.embed.weight = first.blocks[0].linear.weight
    shared = shared_parameters([first, second])
    assert shared == {id(second.embed.weight)}
    assert [id(p) for p in take_apart(first, shared).shared] == [id(second.embed.weight)]


def test_tensors_that_are_more_than_their_bytes_do_not_move() -> None:
    class Scaled(nn.Parameter):
        pass

    model = Model()
    model.blocks[0].linear.weight = Scaled(torch.ones(3, 3), requires_grad=False)
    model.blocks[1].linear.weight = nn.Parameter(torch.empty(0, 3))
    fixed = take_apart(model, set()).fixed
    assert [(owner, key) for owner, key in fixed] == [
        (model.blocks[0].linear, "weight"),
        (model.blocks[1].linear, "weight"),
    ]


def test_neighbours_are_one_span() -> None:
    region = region_for(4096)
    unit = Unit("block", [floats(region, 1024, 64), floats(region, 0, 10), floats(region, 256, 100)])
    assert [(span.offset, span.master.numel()) for span in unit.spans] == [(0, 1280)]
    assert unit.num_bytes == 1280
    region.close()


@pytest.mark.parametrize(
    ("offsets", "num_spans"),
    [((0, 256), 1), ((0, 260), 2), ((0, 8192), 2), ((64, 64 + 512), 1), ((0, 256, 16384, 16640), 2)],
    ids=["side by side", "out of line", "far apart", "any beginning", "two groups"],
)
def test_spans_are_aligned_and_close_together(offsets: tuple[int, ...], num_spans: int) -> None:
    region, engine = region_for(32768), HostEngine()
    parameters = [floats(region, offset, 8) for offset in offsets]
    expected = [parameter.data.clone() for parameter in parameters]
    unit = Unit("block", parameters)
    assert len(unit.spans) == num_spans
    assert all(span.offset % ALIGN_BYTES == 0 for span in unit.spans)
    memory = engine.allocate(unit.num_bytes)
    for ready in unit.copy_in(engine, memory):
        engine.wait(ready)
    unit.bind(memory)
    for parameter, value in zip(parameters, expected, strict=True):
        assert parameter.data.view(torch.uint8).equal(value.view(torch.uint8))
        assert memory.data_ptr() <= parameter.data_ptr() < memory.data_ptr() + memory.numel()
    unit.restore()
    assert [parameter.data_ptr() - region.bytes.data_ptr() for parameter in parameters] == list(offsets)
    region.close()


def test_separate_memory_is_never_one_span() -> None:
    parameters = [nn.Parameter(torch.ones(64), requires_grad=False) for _ in range(8)]
    assert len(Unit("block", parameters).spans) == 8
    assert is_scattered(parameters)


def test_stand_ins_have_the_shape_and_take_no_memory() -> None:
    parameter = nn.Parameter(torch.ones(5, 7, dtype=torch.bfloat16), requires_grad=False)
    unit, engine = Unit("block", [parameter]), HostEngine()
    unit.unbind(engine)
    assert parameter.shape == (5, 7)
    assert parameter.dtype == torch.bfloat16
    assert parameter.isnan().all()
    assert parameter.untyped_storage().nbytes() == 2
    unit.restore()
    assert parameter.eq(1).all()


def test_packing_keeps_values_strides_and_identity() -> None:
    block = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Conv2d(4, 2, 3).to(memory_format=torch.channels_last)})
    block["c"] = nn.Linear(3, 3)
    block["c"].weight = nn.Parameter(torch.arange(36.0).view(6, 6)[::2, ::2])
    parameters = list(block.parameters())
    expected = [parameter.data.clone() for parameter in parameters]
    region = pack([parameters[:2], parameters[2:]])
    assert regions_of(parameters) == [region]
    assert not is_scattered(parameters)
    assert len(Unit("all", parameters).spans) == 1
    assert block["b"].weight.is_contiguous(memory_format=torch.channels_last)
    for parameter, value in zip(block.parameters(), expected, strict=True):
        assert torch.equal(parameter.data, value)
        assert parameter.data_ptr() % ALIGN_BYTES == 0
    region.close()
    assert regions_of(parameters) is None
