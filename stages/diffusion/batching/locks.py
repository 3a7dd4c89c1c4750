"""One thread at a time inside the components that requests share, except for denoisers.

Many are not made for threads: Wan's and Qwen-Image's VAEs keep features of the last frames on the module, and fast
tokenizers refuse a second thread ("Already borrowed").
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from stages.diffusion.denoiser import current_run, find_denoisers
from stages.policies.offload.gates import ENTRY_METHODS, LONG_METHODS, WAIT_SECONDS, Gate, entries, scoped

LOOK_SECONDS = 0.04
"""How often a waiting request looks whether it was aborted."""
TEXT_METHODS = ("__call__", "encode", "decode", "batch_decode", "pad", "apply_chat_template")
"""Through which pipelines use a tokenizer or processor."""


class Lock:
    """A re-entrant lock of one component; a request that is aborted stops waiting for it. A scope."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._lock.acquire(timeout=LOOK_SECONDS):
            run = current_run()
            if run is not None:
                run.raise_if_aborted()
            if time.monotonic() > deadline:
                raise RuntimeError(f"'{self._name}' is held by another request for {WAIT_SECONDS:.0f} s")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Locks:
    """The locks of one pipeline's components."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def add_module(self, name: str, module: nn.Module) -> None:
        """One thread at a time in a model."""
        lock = Lock(name)
        for entry in entries(module, ENTRY_METHODS + LONG_METHODS):
            self._undo.append(Gate(module, entry, scoped(lock)).remove)

    def add_text(self, name: str, part: Any) -> None:
        """One thread at a time in a tokenizer or processor. Python looks `__call__` up in the class, so it gets one of
        its own that is called the same."""
        before = type(part)
        part.__class__ = _locked_class(before, Lock(name))
        self._undo.append(functools.partial(setattr, part, "__class__", before))

    def remove(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()


def lock_components(pipeline: DiffusionPipeline) -> Locks:
    """Put a lock on each component of `pipeline` that is not a denoiser and computes something."""
    locks, denoisers = Locks(), find_denoisers(pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name not in denoisers:
            locks.add_module(name, part)
        elif isinstance(part, (PreTrainedTokenizerBase, ProcessorMixin)):
            locks.add_text(name, part)
    return locks


def _locked_class(kind: type[Any], lock: Lock) -> type[Any]:
    def locked(method: Any) -> Any:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return method(self, *args, **kwargs)

        return call

    methods = {name: locked(getattr(kind, name)) for name in TEXT_METHODS if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__, "__doc__": kind.__doc__})
