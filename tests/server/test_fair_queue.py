"""Who runs next: properties over random orders of arrival, and the rules one by one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from omni.server.fair_queue import Entry, FairQueue

GRAPHS = {"video": 1, "image": 3}
KEYS = ("a", "b", "c")
CAP = 2


def entry(name: str, *, graph: str = "image", key: str = "", priority: int = 0, suspect: bool = False) -> Entry:
    """Ages follow the numbers in names: `x7` is older than `x12`."""
    age = float("".join(filter(str.isdigit, name)) or 0)
    return Entry(id=name, graph=graph, key=key, priority=priority, age=(age, name), suspect=suspect)


def take_all(queue: FairQueue) -> list[str]:
    taken = []
    while (found := queue.take()) is not None:
        taken.append(found.id)
    return taken


def drain(queue: FairQueue) -> list[str]:
    """One at a time, each released before the next."""
    order = []
    while (found := queue.take()) is not None:
        order.append(found.id)
        queue.release(found.id)
    return order


def test_first_come_first_served() -> None:
    queue = FairQueue({"image": 1})
    for name in ("j3", "j1", "j2"):  # a job that went back into the queue keeps its age
        queue.add(entry(name))
    assert drain(queue) == ["j1", "j2", "j3"]


def test_priority_goes_first() -> None:
    queue = FairQueue({"image": 1})
    for name, priority in (("j1", 0), ("j2", 5), ("j3", -5), ("j4", 5)):
        queue.add(entry(name, priority=priority))
    assert drain(queue) == ["j2", "j4", "j1", "j3"]


def test_keys_take_turns() -> None:
    queue = FairQueue({"image": 1})
    for number in range(6):
        queue.add(entry(f"a{number}", key="a"))
    for number in range(6, 8):
        queue.add(entry(f"b{number}", key="b"))
    assert drain(queue) == ["a0", "b6", "a1", "b7", "a2", "a3", "a4", "a5"]


def test_the_key_of_which_the_fewest_run_goes_first() -> None:
    queue = FairQueue({"image": 3})
    queue.add(entry("a1", key="a"))
    queue.add(entry("a2", key="a"))
    assert take_all(queue) == ["a1", "a2"]
    queue.add(entry("a3", key="a"))
    assert take_all(queue) == ["a3"]
    queue.add(entry("a4", key="a"))
    queue.add(entry("b5", key="b"))
    queue.release("a1")
    assert take_all(queue) == ["b5"]


def test_a_key_has_a_cap_over_all_graphs() -> None:
    queue = FairQueue({"image": 9, "video": 9}, max_running_per_key=2)
    for name, graph in (("j1", "image"), ("j2", "video"), ("j3", "image")):
        queue.add(entry(name, graph=graph, key="a"))
    assert sorted(take_all(queue)) == ["j1", "j2"]
    queue.release("j2")
    assert take_all(queue) == ["j3"]


def test_a_long_video_does_not_hold_up_images() -> None:
    queue = FairQueue({"video": 1, "image": 1})
    for number in range(5):
        queue.add(entry(f"v{number}", graph="video", priority=9))
    queue.add(entry("i9"))
    assert sorted(take_all(queue)) == ["i9", "v0"]


def test_suspects_run_one_at_a_time() -> None:
    queue = FairQueue({"image": 4})
    for name in ("s1", "s2"):
        queue.add(entry(name, suspect=True))
    queue.add(entry("j3"))
    assert take_all(queue) == ["s1", "j3"]
    queue.release("s1")
    assert take_all(queue) == ["s2"]


def test_what_is_taken_out_does_not_run() -> None:
    queue = FairQueue({"image": 1})
    queue.add(entry("j1"))
    queue.add(entry("j2"))
    assert queue.discard("j1")
    assert not queue.discard("j1")
    assert drain(queue) == ["j2"]


def test_an_entry_waits_once() -> None:
    queue = FairQueue({"image": 1})
    queue.add(entry("j1"))
    with pytest.raises(ValueError, match="j1 is in the queue already"):
        queue.add(entry("j1"))


class Queue(RuleBasedStateMachine):
    """Random arrivals, turns, ends and aborts, beside a plain list that says what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(GRAPHS, CAP)
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.number = 0

    def may_run(self, each: Entry) -> bool:
        beside = [other for other in self.running if other.graph == each.graph]
        of_key = [other for other in self.running if other.key == each.key]
        suspected = each.suspect and any(other.suspect for other in self.running)
        return len(beside) < GRAPHS[each.graph] and len(of_key) < CAP and not suspected

    @rule(
        graph=st.sampled_from(list(GRAPHS)),
        key=st.sampled_from(KEYS),
        priority=st.integers(-1, 1),
        suspect=st.booleans(),
    )
    def arrive(self, graph: str, key: str, priority: int, suspect: bool) -> None:
        self.number += 1
        new = entry(f"j{self.number}", graph=graph, key=key, priority=priority, suspect=suspect)
        self.waiting.append(new)
        self.queue.add(new)

    @rule()
    def take(self) -> None:
        taken = self.queue.take()
        able = [each for each in self.waiting if self.may_run(each)]
        assert (taken is None) == (not able)  # nothing that may run is kept waiting
        if taken is None:
            return
        assert taken in able
        rivals = [each for each in able if each.graph == taken.graph]
        assert taken.priority == max(each.priority for each in rivals)
        assert taken.age == min(e.age for e in rivals if (e.key, e.priority) == (taken.key, taken.priority))
        here = Counter(each.key for each in self.running if each.graph == taken.graph)
        assert here[taken.key] == min(here[each.key] for each in rivals if each.priority == taken.priority)
        self.waiting.remove(taken)
        self.running.append(taken)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.running))
        self.running.remove(gone)
        self.queue.release(gone.id)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(gone)
        assert self.queue.discard(gone.id)

    @invariant()
    def counts_agree(self) -> None:
        assert self.queue.waiting_ids() == {each.id for each in self.waiting}
        for graph in GRAPHS:
            assert self.queue.waiting(graph) == sum(each.graph == graph for each in self.waiting)
            assert self.queue.running(graph) == sum(each.graph == graph for each in self.running)
            for key in KEYS:
                of_key = [each for each in self.waiting if (each.graph, each.key) == (graph, key)]
                assert self.queue.waiting_of(graph, key) == len(of_key)

    def teardown(self) -> None:
        for each in [*self.running]:
            self.queue.release(each.id)
        for each in self.waiting:
            self.queue.discard(each.id)
        leftovers = {name: value for name, value in vars(self.queue).items() if name.startswith("_") and value}
        assert leftovers.keys() <= {"_slots", "_cap", "_lanes", "_turn"}
        assert not any(self.queue._lanes.values())


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=40))
def test_no_key_waits_longer_than_a_round(arrivals: list[str]) -> None:
    """While a key waits, every other key gets at most one turn between two of its own."""
    queue = FairQueue({"image": 1})
    for number, key in enumerate(arrivals):
        queue.add(entry(f"j{number}", key=key))
    left = Counter(arrivals)
    since: dict[str, list[str]] = {key: [] for key in left}
    while (taken := queue.take()) is not None:
        queue.release(taken.id)
        assert not since[taken.key] or max(Counter(since[taken.key]).values()) == 1
        since[taken.key] = []
        left[taken.key] -= 1
        for key in since:
            if key != taken.key and left[key]:
                since[key].append(taken.key)
    assert not +left
