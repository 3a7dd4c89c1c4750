"""The rules that join arguments of a denoiser, and split its answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from stages.diffusion.batching.join import Form, Joiner, join, split


class Denoiser(torch.nn.Module):
    """Only its signature counts."""

    def forward(
        self,
        hidden_states: Any,
        timestep: Any = None,
        ids: Any = None,
        img_shapes: Any = None,
        extras: Any = None,
        scale: float = 1.0,
        kv_cache: Any = None,
        **more: Any,
    ) -> None:
        """Nothing."""


class ZImageTransformer2DModel(torch.nn.Module):
    """The name has a rule of its own."""

    def forward(self, x: Any, t: Any, cap_feats: Any) -> None:
        """Nothing."""


DENOISER = Denoiser()
JOINER = Joiner(DENOISER, DENOISER.forward)


def form(size: int = 1, **arguments: Any) -> Form | None:
    return JOINER.form((torch.zeros(size, 4, 8),), arguments)


def joined(name: str, first: Any, second: Any, sizes: tuple[int, int] = (1, 1)) -> Any:
    """The joined argument, or None where the two calls do not go together."""
    forms = [form(size, **{name: value}) for size, value in zip(sizes, (first, second), strict=True)]
    assert forms[0] is not None
    assert forms[1] is not None
    return join(forms)[name] if forms[0].key == forms[1].key else None  # type: ignore[arg-type]


def test_samples_are_concatenated() -> None:
    a, b = torch.ones(2, 3), torch.zeros(1, 3)
    both = joined("extras", a, b, (2, 1))
    assert torch.equal(both, torch.cat([a, b]))


@pytest.mark.parametrize("first", [torch.tensor(5.0), torch.tensor([5.0]), torch.tensor([5.0, 5.0])])
@pytest.mark.parametrize("second", [torch.tensor(7.0), torch.tensor([7.0])])
def test_timesteps_become_one_for_each_sample(first: torch.Tensor, second: torch.Tensor) -> None:
    assert joined("timestep", first, second, (2, 1)).tolist() == [5.0, 5.0, 7.0]


def test_what_has_no_samples_must_be_equal_and_is_passed_once() -> None:
    ids = torch.arange(12).view(4, 3)
    assert torch.equal(joined("ids", ids, ids.clone()), ids)
    assert joined("ids", ids, ids + 1) is None
    assert joined("ids", ids, ids.float()) is None


def test_changed_tensors_are_read_again() -> None:
    ids = torch.arange(12).view(4, 3)
    before = form(ids=ids)
    ids += 1
    after = form(ids=ids)
    assert before is not None
    assert after is not None
    assert before.key != after.key


def test_other_shapes_and_dtypes_do_not_go_together() -> None:
    assert joined("extras", torch.ones(1, 3), torch.ones(1, 4)) is None
    assert joined("extras", torch.ones(1, 3), torch.ones(1, 3, dtype=torch.float64)) is None
    assert joined("extras", torch.ones(1, 3), None) is None
    assert joined("scale", 1.0, 2.0) is None


def test_lists_with_an_item_for_each_sample() -> None:
    assert joined("img_shapes", [[(1, 2, 2)]], [[(1, 2, 2)]]) == [[(1, 2, 2)], [(1, 2, 2)]]
    assert joined("img_shapes", [[(1, 2, 2)]], [[(1, 4, 1)]]) is None
    assert joined("txt_seq_lens", [5], [9]) == [5, 9]


def test_containers_are_looked_into() -> None:
    a = {"embeds": torch.ones(1, 2), "rope": (torch.arange(6), torch.arange(6)), "scale": 0.5, "layers": [1]}
    b = {**a, "embeds": torch.zeros(1, 2)}
    both = joined("extras", a, b)
    assert both["embeds"].tolist() == [[1, 1], [0, 0]]
    assert torch.equal(both["rope"][0], torch.arange(6))
    assert (both["scale"], both["layers"]) == (0.5, [1])
    assert joined("extras", a, {**b, "scale": 0.6}) is None


@pytest.mark.parametrize("arguments", [{"kv_cache": [torch.ones(1)]}, {"extras": object()}, {"extras": {1: object()}}])
def test_what_no_rule_covers_runs_alone(arguments: dict[str, Any]) -> None:
    assert form(**arguments) is None


def test_wrong_arguments_run_alone() -> None:
    assert JOINER.form((), {}) is None
    assert JOINER.form((1, 2, 3, 4, 5, 6, 7, 8, 9), {}) is None
    assert JOINER.form((torch.tensor(1.0),), {}) is None


def test_ragged_captions_of_the_same_padding() -> None:
    module = ZImageTransformer2DModel()
    joiner = Joiner(module, module.forward)

    def call(length: int, side: int = 4) -> Form:
        made = joiner.form(([torch.zeros(2, 1, side, side)], torch.ones(1), [torch.zeros(length, 6)]), {})
        assert made is not None
        return made

    assert call(5).key == call(30).key != call(33).key
    assert call(5).key != call(5, side=8).key
    assert [len(caption) for caption in join([call(5), call(30)])["cap_feats"]] == [5, 30]


def test_answers_are_split() -> None:
    rows = torch.arange(3)
    first, second = split((rows, [rows[:1], rows[1:2], rows[2:]], "all"), (1, 2))
    assert first[0].tolist() == [0]
    assert second[0].tolist() == [1, 2]
    assert [len(first[1]), len(second[1])] == [1, 2]
    assert second[2] == "all"
    parts = split(Transformer2DModelOutput(sample=rows), (2, 1))
    assert [part.sample.tolist() for part in parts] == [[0, 1], [2]]


def test_structure_has_no_sizes() -> None:
    a, b, c = form(ids=torch.zeros(4, 3)), form(2, ids=torch.zeros(6, 3)), form(ids=torch.zeros(1, 3))
    assert a is not None
    assert b is not None
    assert c is not None
    assert a.structure == b.structure != c.structure
