"""CUDA's driver called directly: what is asked of it, and what its answers mean. A GPU runs it in the load tests."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.memory import driver
from stages.memory.driver import NOT_READY, CopyQueue, copy_queue


class Library:
    """Plays libcuda: remembers calls, answers with `code`."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append((name, *args))
            return self.code

        return call


STREAM: Any = SimpleNamespace(cuda_stream=7)
EVENT: Any = SimpleNamespace(cuda_event=9)


def test_calls_name_addresses_stream_and_event() -> None:
    library: Any = Library()
    queue = CopyQueue(library, STREAM)
    queue.copy(100, 200, 30)
    queue.record(EVENT)
    assert queue.has_passed(EVENT)
    assert library.calls == [("cuMemcpyHtoDAsync_v2", 100, 200, 30, 7), ("cuEventRecord", 9, 7), ("cuEventQuery", 9)]


def test_an_event_that_has_not_passed_is_no_error() -> None:
    library: Any = Library(NOT_READY)
    assert not CopyQueue(library, STREAM).has_passed(EVENT)


@pytest.mark.parametrize("call", [lambda q: q.copy(1, 2, 3), lambda q: q.record(EVENT), lambda q: q.has_passed(EVENT)])
def test_errors_are_raised(call: Any) -> None:
    library: Any = Library(700)
    with pytest.raises(RuntimeError, match="the CUDA driver failed with error 700"):
        call(CopyQueue(library, STREAM))


def test_without_cuda_there_is_no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.PyDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "PyDLL", missing)
    for version in (None, "13.0"):
        monkeypatch.setattr(torch.version, "cuda", version)
        driver._library.cache_clear()
        assert copy_queue(STREAM) is None
    driver._library.cache_clear()
