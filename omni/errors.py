"""Every error Omni raises on purpose, in one picklable tree.

    OmniError
    |- UsageError              the user can fix it; exit code 2, no traceback
    |  |- GraphError           the graph file is wrong (all mistakes at once)
    |  |- InputError           a request carries a wrong or missing input
    |  `- PlanError            the graph cannot run on this hardware
    |- StageError              one stage failed; exit code 1
    |  |- StageSetupError      it could not load
    |  |- StageDiedError       its process went away
    |  |- StageTimeoutError    it missed a deadline
    |  `- SharedInputError     it wrote into an input that others read
    |- RequestFailed           what a caller of `generate` sees: the failed stage, cause and remedy
    |- RequestAborted          the request was aborted
    `- RunnerError             the runner itself cannot start or go on

Each class passes all its arguments to `Exception.__init__`, so that it keeps its type across processes.
"""

from __future__ import annotations

import msgspec


class Mistake(msgspec.Struct, frozen=True):
    """One fault in a graph file, printed as `file:line:column: path: message`."""

    path: str
    """Dotted path in the YAML (`stages.draw.call`), empty for the document."""
    message: str
    """What is wrong, what is allowed, and the nearest match."""
    file: str = ""
    line: int = 0
    """1-based; 0 when the fault has no place in a file."""
    column: int = 0

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return ": ".join(part for part in (place, self.path, self.message) if part)


def one_line(error: BaseException) -> str:
    """`TypeError: what it says`, without line breaks."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class OmniError(Exception):
    """Base of all errors that Omni raises on purpose."""


class UsageError(OmniError):
    """Wrong usage: the message says what to change."""


class GraphError(UsageError):
    """A graph that cannot be used; `mistakes` holds every fault found."""

    def __init__(self, mistakes: tuple[Mistake, ...]) -> None:
        super().__init__(mistakes)
        self.mistakes = tuple(mistakes)

    def __str__(self) -> str:
        return "\n".join(str(mistake) for mistake in self.mistakes)


class InputError(UsageError):
    """A request's input is missing, unknown or of the wrong type."""


class PlanError(UsageError):
    """The graph cannot be placed on the given hardware."""


class StageError(OmniError):
    """A stage failed. `remedy` says what the user can do, or is empty."""

    def __init__(self, stage: str, cause: str, remedy: str = "", details: str = "") -> None:
        super().__init__(stage, cause, remedy, details)
        self.stage = stage
        self.cause = cause
        self.remedy = remedy
        self.details = details
        """Traceback text from where it happened, for logs and `--verbose`."""

    def __str__(self) -> str:
        text = f"stage '{self.stage}': {self.cause}"
        return f"{text} ({self.remedy})" if self.remedy else text


class StageSetupError(StageError):
    """The stage could not load its model or resources."""


class StageDiedError(StageError):
    """The process of the stage went away while it worked."""


class StageTimeoutError(StageError):
    """The stage missed a deadline."""


class SharedInputError(StageError):
    """The stage wrote into an input that other readers share."""


class RequestFailed(OmniError):
    """A request ended in `Failed`; raised by `generate`."""

    def __init__(self, request_id: str, error: StageError) -> None:
        super().__init__(request_id, error)
        self.request_id = request_id
        self.error = error

    def __str__(self) -> str:
        return f"request {self.request_id} failed: {self.error}"


class RequestAborted(OmniError):
    """The request was aborted before it was done; also what a stage raises to stop its own work."""

    def __init__(self, request_id: str, reason: str = "aborted by the caller") -> None:
        super().__init__(request_id, reason)
        self.request_id = request_id
        self.reason = reason

    def __str__(self) -> str:
        return f"request {self.request_id}: {self.reason}"


class RunnerError(OmniError):
    """The runner cannot start or go on; the message names the remedy."""
