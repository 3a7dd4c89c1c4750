"""One batch: both ways at first, in halves when memory runs out, one by one when something fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stages.diffusion.batching.batch import BatchRunner, agree
from stages.diffusion.batching.join import Form, Joiner


class Denoiser(torch.nn.Module):
    """Doubles, and does what the test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.before: Callable[[torch.Tensor], Any] = lambda _: None
        self.scale: Callable[[int], float] = lambda _: 2.0

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        self.sizes.append(len(hidden_states))
        self.before(hidden_states)
        return (hidden_states * self.scale(len(hidden_states)),)


class Member:
    """One call."""

    def __init__(self, denoiser: Denoiser, value: float) -> None:
        self.forward = denoiser.forward
        self.sample = torch.full((1, 2), value)
        form = Joiner(denoiser, denoiser.forward).form((self.sample,), {})
        assert form is not None
        self.form: Form | None = form
        self.answer: Any = None
        self.error: BaseException | None = None

    def call(self) -> Any:
        return self.forward(self.sample)


def run(runner: BatchRunner, denoiser: Denoiser, *values: float) -> list[Member]:
    denoiser.sizes.clear()
    members = [Member(denoiser, value) for value in values]
    runner.run("denoiser", members)
    return members


def answers(members: list[Member]) -> list[float]:
    return [member.answer[0][0, 0].item() for member in members]


@pytest.fixture
def trusted() -> tuple[BatchRunner, Denoiser]:
    runner, denoiser = BatchRunner(), Denoiser()
    run(runner, denoiser, 1, 2)
    return runner, denoiser


def test_the_first_batch_runs_both_ways() -> None:
    runner, denoiser = BatchRunner(), Denoiser()
    assert answers(run(runner, denoiser, 1, 2)) == [2, 4]
    assert denoiser.sizes == [2, 1, 1]
    assert answers(run(runner, denoiser, 3, 4, 5)) == [6, 8, 10]
    assert denoiser.sizes == [3]
    assert (runner.num_calls, runner.num_forwards, runner.largest) == (5, 4, 3)


def test_a_denoiser_whose_samples_are_not_independent_is_not_joined() -> None:
    runner, denoiser = BatchRunner(), Denoiser()
    denoiser.scale = lambda size: 2.0 * size
    members = run(runner, denoiser, 1, 2)
    assert answers(members) == [2, 4]
    assert runner.limit("denoiser", members[0].form) == 1


def test_a_denoiser_that_refuses_joined_calls_is_not_joined() -> None:
    runner, denoiser = BatchRunner(), Denoiser()

    def refuse(samples: torch.Tensor) -> None:
        if len(samples) > 1:
            raise ValueError("one at a time")

    denoiser.before = refuse
    members = run(runner, denoiser, 1, 2)
    assert answers(members) == [2, 4]
    assert runner.limit("denoiser", members[0].form) == 1


def test_out_of_memory_halves_the_batch(trusted: tuple[BatchRunner, Denoiser]) -> None:
    runner, denoiser = trusted

    def fill(samples: torch.Tensor) -> None:
        if len(samples) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    denoiser.before = fill
    members = run(runner, denoiser, 1, 2, 3, 4, 5)
    assert answers(members) == [2, 4, 6, 8, 10]
    assert denoiser.sizes == [5, 2, 3, 1, 2]
    assert runner.limit("denoiser", members[0].form) == 1


def test_only_the_request_that_does_not_fit_by_itself_fails(trusted: tuple[BatchRunner, Denoiser]) -> None:
    runner, denoiser = trusted

    def fill(samples: torch.Tensor) -> None:
        if (samples == 3).any():
            raise MemoryError

    denoiser.before = fill
    members = run(runner, denoiser, 1, 2, 3, 4)
    assert [type(member.error) for member in members] == [type(None), type(None), MemoryError, type(None)]
    assert answers([members[0], members[1], members[3]]) == [2, 4, 8]


def test_an_error_is_that_of_one_request(trusted: tuple[BatchRunner, Denoiser]) -> None:
    runner, denoiser = trusted

    def refuse(samples: torch.Tensor) -> None:
        if (samples == 2).any():
            raise KeyError("two")

    denoiser.before = refuse
    members = run(runner, denoiser, 1, 2, 3)
    assert [repr(member.error) for member in members] == ["None", "KeyError('two')", "None"]
    assert answers([members[0], members[2]]) == [2, 6]
    denoiser.before = lambda _: None
    run(runner, denoiser, 1, 3)
    assert denoiser.sizes == [2]  # still joined


def test_numbers_that_are_not_finite_are_looked_at_alone(trusted: tuple[BatchRunner, Denoiser]) -> None:
    runner, denoiser = trusted
    denoiser.scale = lambda size: 2.0 if size == 1 else float("nan")
    assert answers(run(runner, denoiser, 1, 2)) == [2, 4]


def test_agree() -> None:
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert agree((a,), (a * 1.0001,))
    assert not agree((a,), (a.roll(1),))
    assert agree(a.bfloat16(), (a * 1.01).bfloat16())
    assert not agree((a,), (a, a))
    assert not agree(a, a[:2])
