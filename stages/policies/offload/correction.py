"""Corrects a memory plan by what requests really take: measured, not estimated, and only between requests."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from omni.checkpoint import CheckpointFacts
from omni.memory import MemoryPlan
from omni.memory_planner import correct
from omni.sizes import format_bytes
from omni.spec import StageSpec
from stages.device import keep_peak
from stages.policies.offload.apply import Offload
from stages.policies.offload.gates import WAIT_SECONDS

log = logging.getLogger(__name__)
T = TypeVar("T")

MARGIN = 1.05
"""Of what was measured: the allocator rounds, and libraries choose other kernels."""
STEP_BACK = 1.25
"""Of what was planned with, when that was too little."""


class Correction:
    """Watches the requests of one stage. The largest one so far says how much memory is left for weights."""

    def __init__(
        self, name: str, offload: Offload, memory: MemoryPlan, spec: StageSpec, facts: CheckpointFacts
    ) -> None:
        """`name`: of the stage; `memory`: the plan that `offload` was made for."""
        self.memory = memory
        """The plan that is in force."""
        self._name, self._offload, self._spec, self._facts = name, offload, spec, facts
        self._condition = threading.Condition()
        self._num_running = 0
        self._num_shrinking = 0
        """Requests that wait for the running ones to end; no other begins meanwhile."""
        self._largest_bytes = 0
        self._least_bytes = 0
        """The plan assumes no less: with less, memory ran out."""
        self._is_settled = False
        """The plan in force comes from a measurement."""

    @classmethod
    def of(
        cls, name: str, offload: Offload | None, memory: MemoryPlan | None, spec: StageSpec, facts: CheckpointFacts
    ) -> Correction | None:
        """None where nothing is offloaded, or not by a plan of the checkpoint's components."""
        if offload is None or memory is None or {part.name for part in memory.components} != set(facts.components):
            return None
        return cls(name, offload, memory, spec, facts) if facts.components else None

    def observe(self) -> None:
        """For stages that cannot do a request twice, while none is under way: let less stay when requests take more
        than the plan thought. Never lets more stay, since a larger request would fail then."""
        self._largest_bytes = max(self._largest_bytes, self._offload.measured_activation_bytes)
        self._is_settled = True
        self._settle()
        keep_peak(str(self._offload.engine.device))
        # What the stage holds for all requests, such as a cache, is part of what they take.
        self._offload.engine.begin_measuring(beside_all=False)

    def run(self, work: Callable[[], T], is_out_of_memory: Callable[[RuntimeError], bool]) -> T:
        """`work`, measured. When the device's memory runs out, as few weights as possible stay, and `work` is done
        once more; what it raises then is raised."""
        try:
            with self._request():
                result = work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            cause = str(error).partition("\n")[0]
        else:
            self._settle()
            return result
        gc.collect()  # the error is gone, and with it the frames that held the request's tensors
        self._shrink(cause)
        with self._request():
            result = work()
        self._settle()
        return result

    @contextlib.contextmanager
    def _request(self) -> Iterator[None]:
        with self._condition:
            if not self._condition.wait_for(lambda: not self._num_shrinking, timeout=WAIT_SECONDS):
                raise RuntimeError(f"memory was not made for {WAIT_SECONDS:.0f} s")
            if not self._num_running:
                keep_peak(str(self._offload.engine.device))
                self._offload.engine.begin_measuring()
            self._num_running += 1
        try:
            yield
        finally:
            with self._condition:
                self._largest_bytes = max(self._largest_bytes, self._offload.measured_activation_bytes)
                self._num_running -= 1
                self._condition.notify_all()

    def _settle(self) -> None:
        """After a request: plan anew if it is the first, or the largest so far, and no other is under way."""
        with self._condition:
            assumed = max(math.ceil(self._largest_bytes * MARGIN), self._least_bytes)
            if self._num_running or not self._largest_bytes:
                return
            if self._is_settled and assumed <= self.memory.activation_bytes:
                return
            before, held = self.memory, self._offload.resident_bytes
            self.memory = correct(before, self._spec, self._facts, assumed)
            self._is_settled = True
            try:
                self._offload.follow(self.memory)
            except torch.OutOfMemoryError:
                self._offload.set_resident(0)
                log.warning("stage '%s': the GPU has less memory left than planned; no block stays there", self._name)
                return
            log.info(
                "stage '%s': a request took %s beside the weights, %s were planned: %s of blocks and turns stay on the "
                "device, before %s",
                self._name,
                format_bytes(self._largest_bytes),
                format_bytes(before.activation_bytes),
                format_bytes(self._offload.resident_bytes),
                format_bytes(held),
            )

    def _shrink(self, cause: str) -> None:
        """Keep the least, once no other request is under way."""
        with self._condition:
            self._num_shrinking += 1
            try:
                if not self._condition.wait_for(lambda: not self._num_running, timeout=WAIT_SECONDS):
                    raise RuntimeError(f"other requests were under way for {WAIT_SECONDS:.0f} s")
                self._least_bytes = max(self._least_bytes, math.ceil(self.memory.activation_bytes * STEP_BACK))
                self._is_settled = False
                self._offload.set_resident(0)
                log.warning(
                    "stage '%s': %s; the request runs once more with %s of weights on the device",
                    self._name,
                    cause,
                    format_bytes(self._offload.device_bytes),
                )
            finally:
                self._num_shrinking -= 1
                self._condition.notify_all()
