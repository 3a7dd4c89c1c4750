"""Blocks found by the names of tensors, and sizes after a conversion."""

from __future__ import annotations

import pytest

from omni.component_facts import BlockList, ComponentFacts, sort_tensors


def facts(*tensors: tuple[str, str, int]) -> ComponentFacts:
    return sort_tensors(tensors, {"hidden_size": 8})


def test_blocks_are_those_of_the_top_most_list_in_order() -> None:
    names = ["attn.to_q.weight", "ff.net.0.weight"]
    found = facts(
        ("embed.weight", "F32", 4),
        *((f"blocks.{index}.{name}", "BF16", index + 1) for index in (10, 9, 0) for name in names),
        ("norm.weight", "BF16", 2),
    )
    assert found.lists == (BlockList("blocks", ({"BF16": 2}, {"BF16": 20}, {"BF16": 22})),)
    assert found.outside == {"F32": 4, "BF16": 2}
    assert found.dtypes == {"F32": 4, "BF16": 46}
    assert (found.total_bytes, found.config) == (50, {"hidden_size": 8})


def test_blocks_that_differ_a_little_are_one_list() -> None:
    """T5's first block alone holds the table of relative positions."""
    tensors = [(f"encoder.block.{index}.layer.0.{name}", "F32", 4) for index in range(3) for name in ("q", "k")]
    found = facts(*tensors, ("encoder.block.0.layer.0.bias", "F32", 1))
    assert found.lists == (BlockList("encoder.block", ({"F32": 9}, {"F32": 8}, {"F32": 8})),)


@pytest.mark.parametrize(
    "names",
    [
        ["proj.0.weight", "proj.1.weight"],  # a list of layers with one tensor each
        ["layers.0.a", "layers.0.b"],  # a list of one
        ["mlp.0.weight", "mlp.0.bias", "mlp.2.scale", "mlp.2.shift"],  # different things
        ["weight", "0", "a.0", "1.2"],
    ],
)
def test_what_is_no_list_of_blocks(names: list[str]) -> None:
    found = facts(*((name, "F32", 4) for name in names))
    assert (found.lists, found.outside) == ((), {"F32": 4 * len(names)})


def test_sizes_once_loaded() -> None:
    found = facts(
        ("w", "F32", 4), *((f"b.{index}.{name}", "F32", 8) for index in range(2) for name in "xy"), ("n", "I64", 8)
    )
    assert found.loaded_bytes("bfloat16", "cuda") == 2 + 16 + 8
    assert found.block_bytes("auto", "cuda") == (8, 8)
    assert found.block_bytes("auto", "cpu") == (16, 16)
    assert found.loaded_bytes(None, "cuda") == found.total_bytes
