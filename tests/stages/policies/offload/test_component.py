"""Components that take turns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.stages.policies.offload.small import Denoiser, X, put


def test_a_component_inside_a_call_of_another_needs_room_beside_it() -> None:
    outer, inner = Denoiser().eval(), Denoiser().eval()
    outer.embed.register_forward_hook(lambda module, arguments, output: inner(output))
    offload = put({"outer": outer, "inner": inner}, "component")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"'inner' is called from within outer .*offload.policy: layerwise"):
            outer(X)
        offload.set_resident(1 << 20)
        outer(X)
    offload.reset()


def test_the_next_component_is_fetched_while_one_computes() -> None:
    components: dict[str, nn.Module] = {name: Denoiser().eval() for name in "abc"}
    size = 4096
    offload = put(components, "component", budget_bytes=2 * size, order=("b", "c", "a"))
    turns = offload._turns
    assert turns is not None
    inside: list[list[str]] = []
    for module in components.values():
        module.embed.register_forward_hook(
            lambda *_: inside.append(sorted(seat.name for seat in turns.seats if seat.begin is not None))
        )
    with torch.no_grad():
        for name in "bcabca":
            components[name](X)
        assert inside == [["b", "c"], ["a", "c"], ["a", "b"]] * 2
        inside.clear()
        for name in "bacbac":  # another order, learnt in its first round
            components[name](X)
        assert inside[3:] == [["a", "b"], ["a", "c"], ["b", "c"]]
    offload.reset()


def test_a_fetch_that_fails_leaves_nobody_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    components: dict[str, nn.Module] = {name: Denoiser().eval() for name in "abc"}
    with torch.no_grad():
        wanted = components["a"](X)
    offload = put(components, "component", budget_bytes=2 * 4096, order=("a", "b", "c"))
    turns = offload._turns
    assert turns is not None

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is gone")

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(turns.seats[1].unit, "copy_in", fail)
        with pytest.raises(RuntimeError, match="the disk is gone"):
            components["a"](X)
    assert [seat.thread for seat in turns.seats] == [None] * 3
    with torch.no_grad():
        for name in "abc":
            assert torch.equal(components[name](X), wanted) == (name == "a")
    offload.reset()
