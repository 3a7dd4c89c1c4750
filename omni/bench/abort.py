"""How soon a stage is free after an abort, on a real `omni serve` process, against one step of the same stage.

While a request runs, another waits for the stage. The first is aborted at a random step, by DELETE of its job or by
closing the connection of a synchronous call, and the clock runs from just before that until the waiting request's
`stage_started` has arrived. A step's own time is the stage's time over its number of steps, in requests that are left
alone.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, get_args

from omni.choices import RunnerChoice

if TYPE_CHECKING:
    import socket

    from omni.bench.job_events import Heard, WatchedJob
    from omni.bench.report import Report, Target
    from omni.bench.serve_api import Api
    from omni.bench.server_process import Server

DEFAULT_GRAPH = "configs/draw.yaml"
PROMPT = "a small blue circle on a white background"
MAX_ADDED_MS = 50.0
ALONE = 3
"""Requests that are left alone, to know a step's time."""
LATEST = 0.8
"""Share of a request's steps and time after which it is not aborted any more: it might be done."""
MAX_TRIES = 5
"""Requests for each abort that is to be made."""
TOGETHER_SECONDS = 0.005
"""Events that arrive within it were sent together: progress of quick steps waits for company."""
RUNNING = re.compile(r'^omni_requests_running\{graph="[^"]*"\} ([0-9.]+)', re.MULTILINE)
STEP, DELETED, TOLD, CLOSED = "one step", "DELETE", "DELETE, until `aborted` was heard", "closed connection"
CHOICES: dict[str, Callable[[list[float]], float]] = {"median": median, "longest": max}
HEARD = "one step, as heard"
HEALTH = "GET /health meanwhile"
"""A call that does nothing, while the stage works: what the machine and the network add to each way."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni bench abort`."""
    parser.add_argument("graph", metavar="GRAPH", nargs="?", default=DEFAULT_GRAPH, help=f"default: {DEFAULT_GRAPH}")
    parser.add_argument("--repeat", metavar="N", type=int, default=20, help="aborts of each way (default: 20)")
    parser.add_argument("--input", metavar="NAME=VALUE", action="append", default=[], help="an input of the graph")
    parser.add_argument("--runner", choices=get_args(RunnerChoice), default="auto", help="as of omni serve")
    parser.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="change the graph")


def measure(args: argparse.Namespace) -> Report:
    """Run the bench. Raises UsageError for wrong arguments, OmniError when the server does not come up."""
    from omni.bench.serve_api import choose_api, parse_inputs
    from omni.bench.server_process import started
    from omni.errors import UsageError

    if args.repeat < 1:
        raise UsageError("--repeat must be at least 1")
    inputs = {"prompt": PROMPT, **parse_inputs(args.input)}
    options = ["--runner", args.runner, "--max-running", "1", *(part for text in args.set for part in ("--set", text))]
    with started(args.graph, options) as server:
        api = choose_api(server, None, "auto", args.input, prompt=str(inputs["prompt"]))
        trials = Trials(server, api, inputs)
        trials.leave_alone()
        trials.delete(args.repeat)
        if api.name != "job":
            trials.hang_up(args.repeat)
    return _report(args, trials)


class Trials:
    """Aborts requests of one server, and notes how long it took, in seconds."""

    def __init__(self, server: Server, api: Api, inputs: dict[str, Any]) -> None:
        self._server = server
        self._api = api
        self._inputs = inputs
        self.stage = ""
        """The stage that is aborted: the one with the longest steps' time."""
        self.num_steps = 0
        self.stage_seconds = 0.0
        self.seconds: dict[str, list[float]] = {}
        self.num_over = 0
        """Requests that were over before their abort had arrived; they do not count."""

    def leave_alone(self) -> None:
        """Learn which stage has steps, and how long one takes."""
        whole: list[float] = []
        for number in range(1 + ALONE):
            job = self._submit()
            end = job.wait_for_end()
            finished = [event for event in job.heard if event.type == "stage_finished"]
            steps = _steps_of(job.heard)
            self._check(end, steps)
            longest = max((event for event in finished if event.data["stage"] in steps), key=_seconds)
            self.stage, self.num_steps = longest.data["stage"], steps[longest.data["stage"]]
            if number:  # the first one warms up
                whole.append(_seconds(longest))
                self._note_steps(job)
        self.stage_seconds = median(whole)
        self.seconds[STEP] = [seconds / self.num_steps for seconds in whole]

    def delete(self, repeat: int) -> None:
        """Abort by DELETE, `repeat` times; each request that waited is the next one to be aborted."""
        freed, told = self.seconds.setdefault(DELETED, []), self.seconds.setdefault(TOLD, [])
        job = self._submit()
        for _ in self._tries(freed, repeat):
            waiting = self._submit()
            step = random.randint(1, max(int(self.num_steps * LATEST), 1))
            job.wait(lambda event, step=step: self._is_step(event, step))  # type: ignore[misc]
            self._ask_health()
            begin = time.monotonic()
            job.delete()
            end, start = job.wait_for_end(), waiting.wait(self._is_start)
            if end.type != "aborted" or start.at < begin:
                self.num_over += 1
            else:
                freed.append(start.at - begin)
                told.append(end.at - begin)
            self._note_steps(job)
            job = waiting
        job.delete()
        job.wait_for_end()

    def hang_up(self, repeat: int) -> None:
        """Abort by closing the connection of a synchronous call, `repeat` times."""
        import http.client

        freed = self.seconds.setdefault(CLOSED, [])
        for _ in self._tries(freed, repeat):
            connection = http.client.HTTPConnection(self._server.host, self._server.port)
            connection.request("POST", self._api.path, self._api.body, self._server.headers)
            self._await_running(1, connection.sock)
            waiting = self._submit()
            time.sleep(random.uniform(0, LATEST) * self.stage_seconds)
            begin = time.monotonic()
            connection.close()
            start = waiting.wait(self._is_start)
            if start.at > begin:
                freed.append(start.at - begin)
            else:
                self.num_over += 1
            waiting.delete()
            waiting.wait_for_end()
            self._await_running(0)

    def _note_steps(self, job: WatchedJob) -> None:
        """Note how long steps took, by when they were heard. Those that came together share their time."""
        steps = [event for event in job.heard if event.type == "progress" and event.data["stage"] == self.stage]
        last = None
        for event, following in zip(steps, [*steps[1:], None], strict=True):
            if following is not None and following.at - event.at < TOGETHER_SECONDS:
                continue
            if last is not None:
                share = (event.at - last.at) / (event.data["step"] - last.data["step"])
                self.seconds.setdefault(HEARD, []).append(share)
            last = event

    def _ask_health(self) -> None:
        begin = time.monotonic()
        self._server.ask("GET", "/health")
        self.seconds.setdefault(HEALTH, []).append(time.monotonic() - begin)

    def _tries(self, seconds: list[float], repeat: int) -> Iterator[None]:
        """One turn for each abort that is to be made; some requests are over before."""
        from omni.errors import OmniError

        for _ in range(MAX_TRIES * repeat):
            if len(seconds) == repeat:
                return
            yield
        if len(seconds) < repeat:
            raise OmniError(f"most requests were over before their abort; use a graph that takes longer ({self.words})")

    @property
    def words(self) -> str:
        """The stage and its time, in words."""
        return f"stage {self.stage}: {self.num_steps} steps in {self.stage_seconds * 1000:.0f} ms"

    def _submit(self) -> WatchedJob:
        from omni.bench.job_events import WatchedJob

        return WatchedJob(self._server, self._api.graph, self._inputs)

    def _await_running(self, number: int, answer: socket.socket | None = None) -> None:
        """Wait until so many requests run, or until there is an answer."""
        import select

        from omni.bench.job_events import WAIT_SECONDS
        from omni.errors import OmniError

        deadline = time.monotonic() + WAIT_SECONDS
        while (found := RUNNING.search(self._server.read("/metrics"))) is None or float(found.group(1)) != number:
            if answer is not None and select.select([answer], [], [], 0)[0]:
                return
            if time.monotonic() > deadline:
                raise OmniError(f"there are not {number} running requests after {WAIT_SECONDS:g} s")
            time.sleep(0.002)

    def _is_start(self, event: Heard) -> bool:
        return event.type == "stage_started" and event.data["stage"] == self.stage

    def _is_step(self, event: Heard, step: int) -> bool:
        return event.type == "progress" and event.data["stage"] == self.stage and event.data["step"] >= step

    def _check(self, end: Heard, steps: dict[str, int]) -> None:
        from omni.errors import OmniError, UsageError

        if end.type != "done":
            raise OmniError(f"a request that was left alone ended in '{end.type}': {end.data}")
        if not steps:
            raise UsageError("bench abort needs a graph with a stage that takes steps, as diffusion and llm do")


def _steps_of(events: Sequence[Heard]) -> dict[str, int]:
    """Stage -> number of its steps."""
    return {event.data["stage"]: event.data["step"] for event in events if event.type == "progress"}


def _seconds(event: Heard) -> float:
    return float(event.data["seconds"])


def _targets(seconds: dict[str, list[float]]) -> tuple[Target, ...]:
    from omni.bench.report import build_target

    steps = {"median": seconds[STEP], "longest": [*seconds[STEP], *seconds.get(HEARD, ())]}
    return tuple(
        build_target(f"{way}, {words}", value(seconds[way]) * 1000, value(steps[words]) * 1000 + MAX_ADDED_MS, "ms")
        for way in (DELETED, CLOSED)
        if way in seconds
        for words, value in CHOICES.items()
    )


def _report(args: argparse.Namespace, trials: Trials) -> Report:
    from omni.bench.report import Report, build_section, describe_machine

    notes = [
        trials.words,
        f"requests that were over before their abort: {trials.num_over or 'none'}",
    ]
    if CLOSED not in trials.seconds:
        notes.append("no synchronous call gives this graph's outputs, so no connection was closed")
    return Report(
        bench="abort",
        settings={"graph": args.graph, "runner": args.runner, "repeat": args.repeat},
        machine=describe_machine(("torch", "ray", "fastapi", "uvicorn")),
        sections=(build_section("until the next request's stage_started", STEP, trials.seconds),),
        targets=_targets(trials.seconds),
        correct=True,  # a server that does not abort ends the bench: too many requests are over before
        notes=tuple(notes),
    )
