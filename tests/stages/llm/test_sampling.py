"""Picking tokens by seed and position."""

import torch

from omni.spec import SamplingSpec
from stages.llm.sampling import Picker, gumbel_noise

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
IDS = torch.tensor([[0]])


def picks(sampling: SamplingSpec, count: int) -> torch.Tensor:
    """How often each token is picked, over `count` seeds."""
    picker = Picker(sampling)
    tokens = [int(picker.scores(IDS, LOGITS, seed, 0).argmax()) for seed in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=4) / count


def test_noise_depends_on_seed_and_position_alone() -> None:
    assert torch.equal(gumbel_noise(LOGITS, 7, 3), gumbel_noise(LOGITS, 7, 3))
    assert not torch.equal(gumbel_noise(LOGITS, 7, 3), gumbel_noise(LOGITS, 7, 4))
    assert not torch.equal(gumbel_noise(LOGITS, 7, 3), gumbel_noise(LOGITS, 8, 3))


def test_tokens_are_drawn_from_the_softmax() -> None:
    for temperature in (1.0, 2.0):
        wanted = (LOGITS[0] / temperature).softmax(0)
        assert torch.allclose(picks(SamplingSpec(temperature=temperature), 4000), wanted, atol=0.03)


def test_top_k_and_top_p_leave_tokens_out() -> None:
    assert picks(SamplingSpec(temperature=1.0, top_k=2), 300)[2:].sum() == 0
    assert picks(SamplingSpec(temperature=1.0, top_p=0.6), 300)[1:].sum() == 0


def test_temperature_0_is_greedy_and_plain() -> None:
    picker = Picker(SamplingSpec(temperature=0.0, top_k=2, top_p=0.5))
    assert picker.is_plain
    assert torch.equal(picker.scores(IDS, LOGITS, 1, 1), LOGITS)


def test_repetition_penalty_counts_for_greedy_too() -> None:
    picker = Picker(SamplingSpec(repetition_penalty=4.0))
    assert not picker.is_plain
    assert int(picker.scores(IDS, LOGITS.clone(), 0, 0).argmax()) == 1
