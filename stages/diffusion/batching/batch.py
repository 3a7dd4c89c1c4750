"""Runs one batch: joins its calls, calls the denoiser once, splits the answer. What goes wrong is found out here.

- A kind of call that was never joined before runs both ways, joined and one by one. It is joined from then on only when
  the answers agree, so that a denoiser for which the rules are wrong costs time and never a picture.
- Out of memory: the batch runs in halves, and calls of this kind are joined in no larger batches any more.
- Any other error, or an answer that is not finite: those calls run by themselves, so that each request has its own end.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch

from stages.diffusion.batching.join import Form, join, split, tensors_of
from stages.diffusion.faults import is_out_of_memory

log = logging.getLogger(__name__)

MAX_KINDS = 256
"""Kinds of calls that are remembered."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3}
"""What joined and single answers may differ by, as a share of their root mean square. Kernels choose their order of
sums by the size of the batch; answers for the wrong sample differ by far more."""
OTHER_TOLERANCE = 0.05
"""The same in bfloat16, float16 and smaller."""


class Member(Protocol):
    """One call in a batch."""

    form: Form | None
    forward: Callable[..., Any]
    answer: Any
    error: BaseException | None

    def call(self) -> Any:
        """Run it by itself, with its own arguments."""


class BatchRunner:
    """Runs the batches of one stage, one at a time."""

    def __init__(self) -> None:
        self._agrees: OrderedDict[Hashable, bool] = OrderedDict()
        self._limits: OrderedDict[Hashable, int] = OrderedDict()
        self.num_forwards = 0
        """Calls of denoisers so far."""
        self.num_calls = 0
        """Calls that requests made."""
        self.largest = 0
        """The most calls that were joined."""

    def limit(self, group: Hashable, form: Form | None) -> int:
        """How many calls of the kind may be joined: 1 for those that cannot be; 0 for no limit."""
        if form is None or self._agrees.get((group, form.structure)) is False:
            return 1
        return self._limits.get((group, form.key), 0)

    def run(self, group: Hashable, members: Sequence[Member]) -> None:
        """Give each member its answer or its error. `group`: what they are calls of."""
        self.num_calls += len(members)
        self._run(group, list(members))

    def _run(self, group: Hashable, members: list[Member]) -> None:
        forms = [member.form for member in members if member.form is not None]
        if len(members) == 1 or len(forms) < len(members):
            self._run_alone(members)
            return
        structure = (group, forms[0].structure)
        try:
            answers = self._joined(members, forms)
        except Exception as error:
            cause = error
            trouble = "memory" if isinstance(error, (MemoryError, RuntimeError)) and is_out_of_memory(error) else ""
            trouble = trouble or f"{type(error).__name__}: {error}"
        else:
            self._deliver(structure, members, answers)
            return
        del cause  # and with it the frames that hold the batch's tensors
        if trouble == "memory":
            self._halve(group, members, forms[0])
        else:
            log.warning("a joined call of %d requests failed, they run one by one: %s", len(members), trouble)
            self._run_alone(members)
            if structure not in self._agrees and all(member.error is None for member in members):
                _remember(self._agrees, structure, False)

    def _joined(self, members: Sequence[Member], forms: Sequence[Form]) -> list[Any]:
        self.num_forwards += 1
        answers = split(members[0].forward(**join(forms)), [form.size for form in forms])
        self.largest = max(self.largest, len(members))
        return answers

    def _run_alone(self, members: Sequence[Member]) -> None:
        for member in members:
            self.num_forwards += 1
            try:
                member.answer = member.call()
            except Exception as error:
                member.error = error

    def _halve(self, group: Hashable, members: list[Member], form: Form) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(members) // 2
        _remember(self._limits, (group, form.key), half)
        log.warning(
            "a joined call of %d requests does not fit into memory: no more than %d from now", len(members), half
        )
        self._run(group, members[:half])
        self._run(group, members[half:])

    def _deliver(self, structure: Hashable, members: list[Member], answers: list[Any]) -> None:
        if structure not in self._agrees:
            self._compare(structure, members, answers)
            return
        suspects = []
        for member, answer in zip(members, answers, strict=True):
            member.answer = answer
            if not is_finite(answer):
                suspects.append(member)
        self._run_alone(suspects)

    def _compare(self, structure: Hashable, members: list[Member], answers: list[Any]) -> None:
        """Run the members one by one too. Their own answers count; do the joined ones agree?"""
        self._run_alone(members)
        pairs = [
            (member.answer, answer)
            for member, answer in zip(members, answers, strict=True)
            if member.error is None and is_finite(member.answer)
        ]
        if len(pairs) < 2:
            return
        agrees = all(agree(alone, joined) for alone, joined in pairs)
        _remember(self._agrees, structure, agrees)
        if not agrees:
            log.warning("calls of this denoiser are not joined: joined answers differ from those of single calls")


def is_finite(answer: Any) -> bool:
    """Whether all numbers of an answer on the CPU are finite. On a GPU the question would wait for the answer: True."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(answer) if tensor.device.type == "cpu")


def agree(alone: Any, joined: Any) -> bool:
    """Whether two answers are equal to the precision of their dtype."""
    ours, theirs = tensors_of(alone), tensors_of(joined)
    return len(ours) == len(theirs) and all(_close(a, b) for a, b in zip(ours, theirs, strict=True))


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = TOLERANCES.get(a.dtype, OTHER_TOLERANCE)
    size, distance = a.double().norm(), (a.double() - b.double()).norm()
    return bool(distance <= tolerance * size)


def _remember(table: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    table[key] = value
    while len(table) > MAX_KINDS:
        table.popitem(last=False)
