"""Bars and lines of progress."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from omni.cli.progress import BarView, LineView, View, format_seconds, open_view
from omni.messages import Event, LoadProgress, StageFinished, StageProgress, StageStarted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def loading(done: int, state: str = "loading") -> LoadProgress:
    return LoadProgress(stage="draw", component="vae", done_bytes=done, total_bytes=2048, state=state)  # type: ignore[arg-type]


def one_run(num_steps: int) -> Iterator[Event]:
    yield StageStarted(request_id="r", stage="draw")
    for step in range(1, num_steps + 1):
        yield StageProgress(request_id="r", stage="draw", step=step, num_steps=num_steps, unit="denoise step")
    yield StageFinished(request_id="r", stage="draw", seconds=1.25, bytes=3)


def test_lines_come_now_and_then() -> None:
    stream, now = io.StringIO(), iter(range(100))
    view = LineView(stream, clock=lambda: next(now) / 4)
    for event in one_run(30):
        view.event(event)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "draw: started"
    assert lines[-1] == "draw: finished in 1.2 s"
    assert 2 <= len(lines[1:-1]) <= 10
    assert all(line.startswith("draw: denoise step ") and line.endswith("/30") for line in lines[1:-1])


def test_quick_steps_give_no_lines() -> None:
    stream = io.StringIO()
    view = LineView(stream, clock=lambda: 0.0)
    for event in one_run(30):
        view.event(event)
    assert stream.getvalue().splitlines() == ["draw: started", "draw: finished in 1.2 s"]


def test_loading_has_a_first_and_a_last_line() -> None:
    stream = io.StringIO()
    view = LineView(stream, clock=lambda: 0.0)
    for progress in (loading(0), loading(1024), loading(2048, "ready")):
        view.loading(progress)
    assert stream.getvalue().splitlines() == ["draw: loading vae: 0 B of 2.0 KiB", "draw: ready (2.0 KiB)"]


def test_requests_are_told_apart() -> None:
    stream = io.StringIO()
    view = LineView(stream)
    view.labels = {"r": "2/4 "}
    view.event(StageStarted(request_id="r", stage="draw"))
    assert stream.getvalue() == "2/4 draw: started\n"


def test_bars_show_what_lines_say() -> None:
    stream = Terminal()
    with BarView(stream) as view:
        view.labels = {"r": "2/4 "}
        for progress in (loading(0), loading(1024), loading(2048, "ready")):
            view.loading(progress)
        for event in one_run(3):
            view.event(event)
        tasks = {task.description: task for task in view._bars.tasks}
        view._bars.refresh()
    assert [(task.completed, task.total) for task in tasks.values()] == [(2048, 2048), (1, 1)]
    assert list(tasks) == ["load draw", "2/4 draw"]
    assert "2/4 draw" in stream.getvalue()


def test_the_view_fits_the_stream() -> None:
    assert type(open_view(False, Terminal())) is BarView
    assert type(open_view(False, io.StringIO())) is LineView
    assert type(open_view(True, Terminal())) is View


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0.4 ms"),
        (0.0123, "12.3 ms"),
        (0.9996, "1.0 s"),
        (1.5, "1.5 s"),
        (119.4, "119.4 s"),
        (119.6, "2 min 0 s"),
        (125.0, "2 min 5 s"),
    ],
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
