"""Gates in the places where a component is entered: its forward, its blocks, methods such as a VAE's decode.

A gate stands in the instance's attribute and calls what was there before, inside a scope (a context manager). It lies
below whatever is put around the same function later (step caches, the seam), so that a skipped call costs nothing.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from omni.errors import UsageError

Function = Callable[..., Any]

ENTRY_METHODS = ("encode", "decode", "get_text_features", "get_image_features")
"""What pipelines call beside forward; a method whose name begins so is an entry too."""
LONG_METHODS = ("generate",)
"""Entries that call forward many times."""
WAIT_SECONDS = 3600.0
"""How long a call may wait for another thread's call of the same component."""


class Gate:
    """Stands in the place of one function of one module."""

    def __init__(self, owner: nn.Module, name: str, around: Callable[[Function], Function]) -> None:
        """`around(function)` is called in the function's stead until `remove`."""
        function = getattr(owner, name)
        inside = around(function)
        self._owner, self._name = owner, name
        self._before = vars(owner).get(name)
        self._open = True

        @functools.wraps(function)
        def gate(*args: Any, **kwargs: Any) -> Any:
            return inside(*args, **kwargs) if self._open else function(*args, **kwargs)

        self._gate = gate
        setattr(owner, name, gate)

    def remove(self) -> None:
        """Put back what was there; a gate that something else lies around stays, and does nothing."""
        self._open = False
        if vars(self._owner).get(self._name) is self._gate:
            delattr(self._owner, self._name)
            if self._before is not None:
                setattr(self._owner, self._name, self._before)


def scoped(scope: AbstractContextManager[Any]) -> Callable[[Function], Function]:
    """Calls inside `scope`, which is entered anew for each."""

    def around(function: Function) -> Function:
        def call(*args: Any, **kwargs: Any) -> Any:
            with scope:
                return function(*args, **kwargs)

        return call

    return around


def entries(module: nn.Module, methods: tuple[str, ...] = ENTRY_METHODS) -> list[str]:
    """Names of the functions through which pipelines compute with a module as a whole."""
    names = [name for name in dir(type(module)) if name.startswith(methods)]
    return ["forward", *(name for name in names if inspect.isroutine(getattr(type(module), name)))]


def conversions_refused(name: str, module: nn.Module, device: torch.device) -> Callable[[Function], Function]:
    """For `module._apply`: conversions pass when they change nothing, else they raise UsageError."""

    def around(apply: Function) -> Function:
        def checked(function: Function, *args: Any, **kwargs: Any) -> Any:
            for dtype in {parameter.dtype for parameter in module.parameters()}:
                probe = torch.zeros(1, device=device).to(dtype)
                result = function(probe)
                if (result.dtype, result.device) != (probe.dtype, probe.device):
                    raise UsageError(
                        f"{name} cannot be converted to {result.dtype} on {result.device} while an offload policy "
                        "moves its weights: set offload.policy: none, or the stage's dtype"
                    )
            return apply(function, *args, **kwargs)

        return checked

    return around


class CallLock:
    """One thread at a time inside a component, from the beginning to the end of the outermost call. A scope."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.RLock()
        self.depth = 0
        """Calls of the thread that is inside, one within another."""
        self.num_calls = 0
        """Outermost calls so far."""

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise RuntimeError(f"'{self.name}' is held by a call of another thread for {WAIT_SECONDS:.0f} s")
        if not self.depth:
            self.num_calls += 1
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        self._lock.release()
