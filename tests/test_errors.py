"""Every class of omni/errors.py keeps its type and attributes across processes, and prints what the user needs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from omni import errors
from omni.errors import GraphError, Mistake, OmniError, RequestAborted, RequestFailed, StageError, UsageError

MISTAKES = (
    Mistake(
        path="stages.draw.ofload", message="unknown key, did you mean 'offload'?", file="g.yaml", line=14, column=5
    ),
    Mistake(path="", message="not a mapping"),
)


def all_classes(base: type[OmniError] = OmniError) -> Iterator[type[OmniError]]:
    """The whole tree of errors.py; other modules may add their own below it."""
    if base.__module__ == errors.__name__:
        yield base
    for subclass in base.__subclasses__():
        yield from all_classes(subclass)


def sample(kind: type[OmniError]) -> OmniError:
    """An error of this class with every argument set."""
    if issubclass(kind, GraphError):
        return kind(MISTAKES)
    if issubclass(kind, StageError):
        return kind("draw", "no memory left", "use a smaller picture", "Traceback ...")
    if issubclass(kind, RequestFailed):
        return kind("r1", StageError("draw", "no memory left"))
    if issubclass(kind, RequestAborted):
        return kind("r1", "client went away")
    return kind("say what to change")


def test_the_tree_is_the_one_in_the_docstring() -> None:
    assert errors.__doc__ is not None
    assert {kind.__name__ for kind in all_classes()} == {
        word for word in errors.__doc__.split() if word.endswith(("Error", "Failed", "Aborted")) and word.isalpha()
    }


@pytest.mark.parametrize("kind", list(all_classes()), ids=lambda kind: kind.__name__)
def test_pickle_keeps_type_attributes_and_text(kind: type[OmniError]) -> None:
    error = sample(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy).keys() == vars(error).keys()
    for name, value in vars(error).items():
        assert repr(getattr(copy, name)) == repr(value)


def test_graph_error_prints_one_line_for_each_mistake() -> None:
    assert str(GraphError(MISTAKES)).splitlines() == [
        "g.yaml:14:5: stages.draw.ofload: unknown key, did you mean 'offload'?",
        "not a mapping",
    ]


def test_stage_error_names_stage_cause_and_remedy_but_no_traceback() -> None:
    assert str(sample(StageError)) == "stage 'draw': no memory left (use a smaller picture)"
    assert str(StageError("draw", "no memory left")) == "stage 'draw': no memory left"


def test_a_failed_request_carries_its_stage_error() -> None:
    copy = pickle.loads(pickle.dumps(sample(RequestFailed)))
    assert (type(copy.error), copy.error.stage) == (StageError, "draw")
    assert str(copy) == "request r1 failed: stage 'draw': no memory left"


def test_users_mistakes_are_usage_errors() -> None:
    usage = {kind.__name__ for kind in all_classes() if issubclass(kind, UsageError)}
    assert usage == {"UsageError", "GraphError", "InputError", "PlanError"}
