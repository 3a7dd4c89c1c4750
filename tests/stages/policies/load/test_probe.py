"""What `reader: auto` finds out, and what it makes of it."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from stages.policies.load import components, probe
from stages.policies.load.blueprint import Blueprint, ComponentRequest, Target
from stages.policies.load.catalog import Entry


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    return str(path)


def test_what_was_just_written_is_cached(file: str) -> None:
    assert probe.cached_share([file, file]) == 1.0
    assert probe.cached_share([]) == 1.0


@pytest.mark.parametrize(("answers", "share"), [(("cold",), 0.0), (("cold", "warm"), 0.5), (("refused",), 0.0)])
def test_the_share_of_cached_pages(
    answers: tuple[str, ...], share: float, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def preadv(descriptor: int, views: list[bytearray], offset: int, flags: int) -> int:
        asked.append(offset)
        answer = answers[len(asked) % len(answers)]
        if answer == "warm":
            return 1
        raise OSError(errno.EAGAIN if answer == "cold" else errno.EOPNOTSUPP, answer)

    monkeypatch.setattr(os, "preadv", preadv)
    assert probe.cached_share([file], 8) == share
    assert asked == [number * (1 << 17) for number in range(8)]


def test_the_rate_past_the_cache(file: str) -> None:
    rate = probe.direct_rate(file)
    assert isinstance(rate, str) or rate > 0


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_file_systems_that_refuse(call: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, call, refuse)
    assert probe.direct_rate(file) == "the file system refuses O_DIRECT (Invalid argument)"


def blueprint(file: str, *, target: str = "host", dtype: str = "F32") -> Blueprint:
    import torch

    request = ComponentRequest(
        name="part",
        model_class=torch.nn.Module,
        folder=Path(file).parent,
        library="diffusers",
        dtype=torch.float32,
        target=target,  # type: ignore[arg-type]
    )
    entry = Entry("w", file, 8, 16, dtype, (4,))
    return Blueprint(request, torch.nn.Module(), (Target("w", (4,), torch.float32, entry),))


@pytest.mark.parametrize(
    ("reader", "share", "rate", "method"),
    [
        ("auto", 0.9, 5e9, "buffered"),
        ("auto", 0.1, 5e9, "direct"),
        ("auto", 0.1, 2e8, "buffered"),
        ("auto", 0.1, "refused", "buffered"),
        ("direct", 0.9, 2e8, "direct"),
        ("direct", 0.9, "refused", "buffered"),
        ("buffered", 0.1, 5e9, "buffered"),
        ("mmap", 0.1, 5e9, "buffered"),
    ],
)
def test_the_choice(
    reader: str,
    share: float,
    rate: float | str,
    method: str,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(components, "cached_share", lambda files: share)
    monkeypatch.setattr(components, "direct_rate", lambda file: rate)
    with caplog.at_level(logging.WARNING):
        assert components.open_files([blueprint(file)], reader).method == method
    assert ("refused" in caplog.text) == (reader == "direct" and rate == "refused")


def test_what_is_mapped_needs_no_probe(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "cached_share", lambda files: pytest.fail("probed"))
    assert components.open_files([blueprint(file, target="device")], "auto").method == "buffered"
    monkeypatch.setattr(components, "cached_share", lambda files: 1.0)
    assert components.open_files([blueprint(file, target="device", dtype="F16")], "auto").method == "buffered"
