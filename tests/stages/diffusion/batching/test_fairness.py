"""Turns by cost: dear groups do not crowd out cheap ones, nor the other way round."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from stages.diffusion.batching.fairness import FORGOTTEN_AFTER, RoundRobin


def test_equal_groups_alternate() -> None:
    turns = RoundRobin()
    assert [turns.choose({"a": 2, "b": 2}) for _ in range(6)] in (list("ababab"), list("bababa"))


def test_a_cheap_group_waits_for_one_turn_of_a_dear_one_at_most() -> None:
    turns = RoundRobin()
    chosen = [turns.choose({"video": 32, "picture": 1}) for _ in range(200)]
    assert "video,video" not in ",".join(chosen)
    share = Counter(chosen)
    assert 25 <= share["picture"] / share["video"] <= 33


@given(costs=st.dictionaries(st.integers(0, 5), st.integers(1, 100), min_size=1))
def test_every_group_gets_its_share(costs: dict[int, int]) -> None:
    turns, spent = RoundRobin(), Counter[int]()
    dearest = max(costs.values())
    for _ in range(300):
        chosen = turns.choose(costs)
        assert isinstance(chosen, int)
        spent[chosen] += costs[chosen]
        spending = [spent[group] for group in costs]
        assert max(spending) - min(spending) <= 2 * dearest


def test_groups_that_are_gone_are_forgotten() -> None:
    turns = RoundRobin()
    turns.choose({"gone": 1})
    for _ in range(FORGOTTEN_AFTER + 1):
        assert turns.choose({"here": 1}) == "here"
    assert list(turns._credit) == ["here"]
