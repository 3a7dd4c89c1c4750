"""The flow's promises over random DAGs, completion orders, failures and aborts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.errors import StageError
from omni.flow import AbortStage, Finish, Flow, FreePayload, RunStage
from omni.graph import FromStage, Graph
from omni.registry import Port, Ports
from omni.spec import GraphSpec


def build_graph(upstream: dict[str, list[str]], outputs: list[str]) -> Graph:
    """A graph of stages with one text port each; `upstream` is in topological order."""
    return Graph(
        spec=GraphSpec(stages={}),
        base_dir=".",
        ports=dict.fromkeys(upstream, Ports(inputs={}, outputs={"text": Port("text")})),
        order=tuple(upstream),
        bindings={
            stage: {f"in_{source}": FromStage(source, "text") for source in sources}
            for stage, sources in upstream.items()
        },
        outputs={stage: FromStage(stage, "text") for stage in outputs},
        inputs={},
    )


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    num_stages = draw(st.integers(1, 8))
    names = [f"s{index}" for index in range(num_stages)]
    upstream = {
        name: draw(st.lists(st.sampled_from(names[:index]), unique=True)) if index else []
        for index, name in enumerate(names)
    }
    outputs = draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    return build_graph(upstream, outputs)


class World:
    """Carries out a flow's actions like a runner would, and holds it to its promises."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.flow = Flow(graph)
        self.running: list[str] = []
        self.started: list[str] = []
        self.done: set[str] = set()
        self.payloads: set[str] = set()
        self.freed: list[str] = []
        self.aborted: list[str] = []
        self.finishes: list[Finish] = []

    def apply(self, actions: list[object]) -> None:
        for action in actions:
            match action:
                case RunStage(stage=stage):
                    assert not self.finishes, "a stage started after the end"
                    assert stage not in self.started, "a stage ran twice"
                    assert set(self.graph.upstream(stage)) <= self.payloads, "a stage ran before its inputs were there"
                    self.running.append(stage)
                    self.started.append(stage)
                case AbortStage(stage=stage):
                    assert stage in self.running
                    assert stage not in self.aborted, "aborted twice"
                    self.aborted.append(stage)
                case FreePayload(stage=stage):
                    assert stage in self.payloads, "freed twice, or never made"
                    readers = set(self.graph.readers(stage))
                    assert not readers & set(self.running), "freed under a reader"
                    if not self.finishes:
                        assert readers <= self.done, "freed before its last reader was done"
                    self.payloads.discard(stage)
                    self.freed.append(stage)
                case Finish():
                    assert not self.finishes, "two final events"
                    assert not self.running, "final event while something runs"
                    if action.outcome == "done":
                        assert set(self.graph.output_stages()) <= self.payloads, "an output was freed too early"
                    self.finishes.append(action)

    def end(self, stage: str, how: str) -> None:
        self.running.remove(stage)
        if how == "done":
            self.done.add(stage)
            self.payloads.add(stage)
            self.apply(self.flow.stage_done(stage))
        elif how == "failed":
            self.apply(self.flow.stage_failed(stage, StageError(stage, "planted")))
        else:
            self.apply(self.flow.stage_aborted(stage))


@given(graphs(), st.data())
@settings(max_examples=300)
def test_every_request_ends_once_and_frees_everything(graph: Graph, data: st.DataObject) -> None:
    world = World(graph)
    failing = data.draw(st.sets(st.sampled_from(graph.order), max_size=2))
    abort_after = data.draw(st.one_of(st.none(), st.integers(0, len(graph.order))))
    world.apply(world.flow.start())
    ended = 0
    wants_abort = False
    while world.running or not world.finishes:
        if abort_after == ended and not wants_abort:
            wants_abort = True
            world.apply(world.flow.abort())
            if not world.running:
                break
        assert world.running, "nothing runs, and no final event came"
        stage = data.draw(st.sampled_from(world.running))
        outcome = "failed" if stage in failing else "done"
        if stage in world.aborted:
            outcome = data.draw(st.sampled_from(["aborted", outcome]))
        world.end(stage, outcome)
        ended += 1
    assert len(world.finishes) == 1
    assert world.flow.finished
    assert not world.payloads, "payloads were left behind"
    assert len(world.freed) == len(set(world.freed)) == len(world.done)
    finish = world.finishes[0]
    if failing & set(world.started) - world.done - set(world.aborted):
        assert finish.outcome in ("failed", "aborted")
    if finish.outcome == "done":
        assert world.done == set(graph.order)
    assert world.flow.abort() == [], "an abort after the end must do nothing"
    assert world.flow.start() == []


def test_a_payload_is_freed_as_soon_as_its_last_reader_is_done() -> None:
    world = World(build_graph({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}, ["d"]))
    world.apply(world.flow.start())
    world.end("a", "done")
    assert world.running == ["b", "c"]
    world.end("b", "done")
    assert world.freed == []
    world.end("c", "done")
    assert world.freed == ["a"]
    world.end("d", "done")
    assert world.freed == ["a", "b", "c", "d"]
    assert world.finishes[0].outcome == "done"


def test_an_unread_payload_is_freed_at_once() -> None:
    world = World(build_graph({"a": [], "b": []}, ["b"]))
    world.apply(world.flow.start())
    world.end("a", "done")
    assert world.freed == ["a"]


def test_a_failure_aborts_the_others_and_ends_when_they_stopped() -> None:
    world = World(build_graph({"a": [], "b": [], "c": ["a", "b"]}, ["c"]))
    world.apply(world.flow.start())
    world.end("a", "failed")
    assert world.aborted == ["b"]
    assert world.finishes == []
    world.end("b", "done")
    finish = world.finishes[0]
    assert finish.outcome == "failed"
    assert finish.error is not None
    assert finish.error.stage == "a"
    assert world.started == ["a", "b"]


def test_the_first_cause_wins() -> None:
    world = World(build_graph({"a": [], "b": []}, ["a", "b"]))
    world.apply(world.flow.start())
    world.apply(world.flow.abort("the caller left"))
    world.end("a", "failed")
    world.end("b", "aborted")
    assert world.finishes[0].outcome == "aborted"
    assert world.finishes[0].reason == "the caller left"


def test_a_stage_that_does_not_run_cannot_end() -> None:
    flow = Flow(build_graph({"a": [], "b": ["a"]}, ["b"]))
    flow.start()
    with pytest.raises(AssertionError, match="'b' reported an end"):
        flow.stage_done("b")
