"""Load on an HTTP server from a process of its own: open loop with Poisson arrivals, or closed loop.

In an open loop requests begin when the plan says, whether or not earlier ones have been answered, and latency counts
from that moment: a server that stalls is charged for all who would have come meanwhile (no coordinated omission). When
all connections are busy a request waits here, and the wait counts. In a closed loop each connection asks again at once.
"""

from __future__ import annotations

import http.client
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import msgspec

IDLE_SECONDS = 2.0
"""A connection that was idle for longer is opened anew, before the server closes it."""
LEAD_SECONDS = 0.1
"""Between the start of the threads and the first request."""
OWN_SECONDS = re.compile(r"(?:^|,)\s*graph;\s*dur=([0-9.]+)")
"""The graph's own milliseconds in a Server-Timing header."""


class LoadJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask, how often and how fast."""

    host: str
    port: int
    path: str
    body: str
    """`{number}` in it becomes the number of the request."""
    headers: dict[str, str] = {}
    expect: str = ""
    """Text that each right answer holds, with `{number}` replaced; empty: any answer of 200."""
    num_requests: int
    rate: float = 0.0
    """Requests per second, open loop; 0: closed loop."""
    connections: int = 64
    first_number: int = 0
    timeout_seconds: float = 60.0
    seed: int = 0
    """Of the arrivals."""


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One answered request. Instants are `time.monotonic()`, which all processes of a machine share."""

    begin: float
    """When it was due; in a closed loop, when it was sent."""
    end: float
    own_seconds: float | None
    """The graph's own time, as the server says; None when it does not."""

    @property
    def latency(self) -> float:
        """Seconds from when it was due until all of the answer was there."""
        return self.end - self.begin


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a LoadJob."""

    samples: list[Sample]
    errors: dict[str, int]
    """Error -> how often; requests with an error have no sample."""
    seconds: float
    """From the first request's begin to the last answer."""
    cpu_seconds: float
    """What this process took of the machine meanwhile."""


Ask = Callable[[int], float | None]
"""Sends request NUMBER and reads the answer; the graph's own seconds. Raises WrongAnswer, OSError or HTTPException."""


class WrongAnswer(Exception):
    """A status that is not 200, or an answer with the wrong content."""


def run(job: dict[str, Any]) -> LoadResult:
    """Carry out a LoadJob; the target of omni.bench.fresh.run_fresh."""
    order = msgspec.convert(job, LoadJob)
    cpu_begin = time.process_time()
    dues = arrivals(order.num_requests, order.rate, order.seed)
    begin = time.monotonic() + LEAD_SECONDS
    work = _Work(dues, begin)
    askers = [_Connection(order) for _ in range(min(order.connections, order.num_requests))]
    threads = [threading.Thread(target=work.run, args=(asker.ask,), daemon=True) for asker in askers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for asker in askers:
        asker.close()
    last = max((sample.end for sample in work.samples), default=begin)
    return LoadResult(
        samples=work.samples,
        errors=dict(work.errors),
        seconds=last - begin,
        cpu_seconds=time.process_time() - cpu_begin,
    )


def arrivals(num_requests: int, rate: float, seed: int = 0) -> list[float | None]:
    """When each request is due, in seconds from the start, as a Poisson process; None: as soon as can be (rate 0)."""
    if rate <= 0:
        return [None] * num_requests
    generator = random.Random(seed)
    return list(accumulate(generator.expovariate(rate) for _ in range(num_requests)))


def open_connections(rate: float) -> int:
    """Connections that an open loop may need: those of a second without an answer, within bounds."""
    return max(16, min(round(rate), 256))


class _Work:
    """The requests that are still to be sent, and what came of the others; threads share it."""

    def __init__(
        self,
        dues: list[float | None],
        begin: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._numbers: Iterator[int] = iter(range(len(dues)))
        self._dues = dues
        self._begin = begin
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self.samples: list[Sample] = []
        self.errors: Counter[str] = Counter()

    def run(self, ask: Ask) -> None:
        """Take request after request until there are none left."""
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            due = self._dues[number]
            at = self._begin + (due or 0.0)
            while (wait := at - self._clock()) > 0:
                self._sleep(wait)
            begin = self._clock() if due is None else at
            try:
                own_seconds = ask(number)
            except WrongAnswer as error:
                self.errors[str(error)] += 1
            except (OSError, http.client.HTTPException) as error:
                self.errors[type(error).__name__] += 1
            else:
                self.samples.append(Sample(begin, self._clock(), own_seconds))


class _Connection:
    """One kept connection."""

    def __init__(self, order: LoadJob) -> None:
        self._order = order
        self._http = http.client.HTTPConnection(order.host, order.port, timeout=order.timeout_seconds)
        self._used_at = 0.0

    def ask(self, number: int) -> float | None:
        """One request; see Ask."""
        order, text = self._order, str(number + self._order.first_number)
        if time.monotonic() - self._used_at > IDLE_SECONDS:
            self._http.close()
        try:
            self._http.request("POST", order.path, order.body.replace("{number}", text), order.headers)
            answer = self._http.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            self._http.close()
            raise
        self._used_at = time.monotonic()
        if answer.status != 200:
            raise WrongAnswer(f"status {answer.status}")
        if order.expect and order.expect.replace("{number}", text).encode() not in content:
            raise WrongAnswer("wrong content")
        found = OWN_SECONDS.search(answer.headers.get("server-timing", ""))
        return float(found.group(1)) / 1000 if found else None

    def close(self) -> None:
        """Hang up."""
        self._http.close()
