"""A CUDA driver that is played, for regions that are pinned."""

from __future__ import annotations

import mmap

import pytest
import torch

from stages.memory import host


class Driver:
    """Plays torch.cuda.cudart(): remembers what is registered, refuses after `room` calls."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.room = 1000

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if len(self.registered) == self.room:
            return 2
        self.registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver, and pieces of one page."""
    driver = Driver()

    def check(error: int) -> None:
        if error:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(host, "REGISTER_BYTES", mmap.PAGESIZE)
    return driver
