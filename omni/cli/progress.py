"""What a person sees while `omni run` works: bars in a terminal, now and then a line elsewhere, or nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TextIO

from omni.messages import Event, LoadProgress, StageFinished, StageProgress, StageStarted
from omni.sizes import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_SECONDS = 2.0
"""A plain line about the same thing comes at most this often."""


class View:
    """Shows nothing; the base of the other views. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.labels: dict[str, str] = {}
        """Request id -> what to put before its stages when there are several requests, as `2/4 `."""

    def loading(self, progress: LoadProgress) -> None:
        """A stage has come further with loading."""

    def event(self, event: Event) -> None:
        """A request has come further."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def name_of(self, event: StageStarted | StageProgress | StageFinished) -> str:
        """How the stage of a request is called on the screen."""
        return f"{self.labels.get(event.request_id, '')}{event.stage}"


class LineView(View):
    """One line for each beginning and end, and one every LINE_SECONDS in between; for logs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._stream = stream
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}

    def loading(self, progress: LoadProgress) -> None:
        key, total = f"{progress.stage}: loading", format_bytes(progress.total_bytes)
        if progress.state == "ready":
            self._write(key, f"{progress.stage}: ready ({total})")
        else:
            done = format_bytes(progress.done_bytes)
            text = f"{key} {progress.component}: {done} of {total}"
            self._write_sometimes(key, text) if key in self._last else self._write(key, text)

    def event(self, event: Event) -> None:
        match event:
            case StageStarted():
                self._write(self.name_of(event), f"{self.name_of(event)}: started")
            case StageProgress():
                text = f"{self.name_of(event)}: {event.unit} {event.step}/{event.num_steps}"
                self._write_sometimes(self.name_of(event), text)
            case StageFinished():
                self._write(self.name_of(event), f"{self.name_of(event)}: finished in {format_seconds(event.seconds)}")

    def _write(self, key: str, text: str) -> None:
        with self._lock:
            self._last[key] = self._clock()
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def _write_sometimes(self, key: str, text: str) -> None:
        if self._clock() - self._last.setdefault(key, self._clock()) >= LINE_SECONDS:
            self._write(key, text)


class BarView(View):
    """A bar for each stage that loads and each that works on a request."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        self._bars: Progress = Progress(*columns, console=Console(file=stream), transient=True)
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bars.stop()

    def loading(self, progress: LoadProgress) -> None:
        total, done = format_bytes(progress.total_bytes), format_bytes(progress.done_bytes)
        ready = progress.state == "ready"
        self._show(
            f"load {progress.stage}",
            note=total if ready else f"{done} of {total} {progress.component}",
            total=max(progress.total_bytes, 1),
            completed=max(progress.total_bytes, 1) if ready else progress.done_bytes,
        )

    def event(self, event: Event) -> None:
        match event:
            case StageStarted():
                self._show(self.name_of(event), note="", total=None)
            case StageProgress():
                note = f"{event.unit} {event.step}/{event.num_steps}"
                self._show(self.name_of(event), note=note, total=event.num_steps, completed=event.step)
            case StageFinished():
                self._show(self.name_of(event), note=format_seconds(event.seconds), total=1, completed=1)

    def _show(self, name: str, **state: Any) -> None:
        with self._lock:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, note="")
            self._bars.update(self._tasks[name], **state)


def open_view(quiet: bool, stream: TextIO) -> View:
    """The view that fits `stream`, or one that shows nothing."""
    if quiet:
        return View()
    return BarView(stream) if stream.isatty() else LineView(stream)


def format_seconds(seconds: float) -> str:
    """Three digits or so: `0.4 ms`, `12.3 ms`, `1.5 s`, `2 min 5 s`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 119.5:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
