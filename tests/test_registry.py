"""Kinds of stage: found by name, from here and from entry points, and what is said about broken ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from omni import registry
from omni.errors import UsageError
from omni.registry import BUILT_IN, ENTRY_POINT_GROUP, Ports, StageKind, find_kind, find_kind_of, kind_names
from omni.spec import StageSpec


class HumSpec(StageSpec, frozen=True, kw_only=True, tag="hum"):
    pass


class UntaggedSpec(StageSpec, frozen=True, kw_only=True):
    pass


def no_ports(spec: StageSpec, base_dir: str) -> Ports:
    return Ports(inputs={}, outputs={})


HUM = StageKind(name="hum", spec_type=HumSpec, stage="nowhere:Stage", ports=no_ports)
UNTAGGED = StageKind(name="untagged", spec_type=UntaggedSpec, stage="nowhere:Stage", ports=no_ports)
POINTS = {
    "hum": "HUM",
    "whistle": "HUM",
    "untagged": "UNTAGGED",
    "spec": "HumSpec",
    "gone": "GONE",
    "llm": "HUM",
}
"""Name of an entry point -> what it names in this module."""


@pytest.fixture(autouse=True)
def _points(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These entry points and no other."""
    points = [EntryPoint(name, f"{__name__}:{value}", ENTRY_POINT_GROUP) for name, value in POINTS.items()]
    points.append(EntryPoint("absent", "no_such_package:KIND", ENTRY_POINT_GROUP))

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [point for point in points if point.group == group and name in (None, point.name)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    find_kind.cache_clear()
    yield
    find_kind.cache_clear()


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_kinds_are_found_by_the_tag_of_their_spec(name: str) -> None:
    kind = find_kind(name)
    assert kind.name == kind.spec_type.__struct_config__.tag == name


def test_kinds_of_other_packages_are_found_by_name_and_by_spec() -> None:
    assert find_kind("hum") is HUM
    assert find_kind_of(HumSpec()) is HUM


def test_built_in_kinds_cannot_be_replaced() -> None:
    assert find_kind("llm").spec_type is not HumSpec


def test_names_are_listed_with_the_built_in_ones_first() -> None:
    names = kind_names()
    assert names[:3] == ("llm", "diffusion", "function")
    assert list(names[3:]) == sorted([*POINTS, "absent"])


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="humm"):
        find_kind("humm")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "whistle",
            f"stage kind 'whistle': its spec {__name__}.HumSpec has the tag 'hum'; "
            "give the spec tag=\"whistle\", or call the entry point 'hum'",
        ),
        (
            "untagged",
            f"stage kind 'untagged': its spec {__name__}.UntaggedSpec has the tag 'UntaggedSpec'; "
            "give the spec tag=\"untagged\", or call the entry point 'UntaggedSpec'",
        ),
        ("spec", f"stage kind 'spec': the entry point must name an omni.registry.StageKind, got {HumSpec!r}"),
        ("gone", f"stage kind 'gone': entry point {__name__}:GONE cannot be loaded: "),
        ("absent", "stage kind 'absent': entry point no_such_package:KIND cannot be loaded: No module named"),
    ],
)
def test_a_broken_entry_point_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        find_kind(name)
