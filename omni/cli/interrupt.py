"""Ctrl-C and SIGTERM: the first stops in order, the second at once; a stop that hangs is cut short."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Self, TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
STOP_SECONDS = 8.0
"""How long an orderly stop may take: a thread that loads a model cannot be stopped otherwise."""


class Interrupts:
    """Turns the signals into a cancelled task while one is guarded, into KeyboardInterrupt before and after.

    `stop_with(stop, seconds)` has the first signal call `stop` instead of cancelling the task.
    """

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None
        self._seconds = STOP_SECONDS
        self._previous: dict[int, Any] = {}
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._count = 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other thread can
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop_with(self, stop: Callable[[], None], seconds: float) -> None:
        """From now on the first signal calls `stop`, in any thread; after `seconds` the process is ended."""
        self._stop, self._seconds = stop, seconds

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; the first signal cancels it."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            return await work
        finally:
            self._task = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            os._exit(INTERRUPTED)
        if self._task is None or self._loop is None:
            raise KeyboardInterrupt
        print("stopping; press Ctrl-C again to quit at once", file=sys.stderr)
        timer = threading.Timer(self._seconds, os._exit, (INTERRUPTED,))
        timer.daemon = True
        timer.start()
        if self._stop is not None:
            self._stop()
        else:
            self._loop.call_soon_threadsafe(self._task.cancel)
