"""Functions that benches call in place of theirs, and rows in this process instead of fresh ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from omni.errors import UsageError
from omni.registry import import_string
from stages.policies.load import ComponentRequest
from stages.policies.load import load_components as load_rightly

__all__ = ["ComponentRequest"]


def load_components(*arguments: Any) -> dict[str, torch.nn.Module]:
    """Omni's load, with one number wrong."""
    modules = load_rightly(*arguments)
    parameter = next(next(iter(modules.values())).parameters())
    parameter.data = parameter.data.clone()
    parameter.data.view(-1)[0] += 1
    return modules


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """What came in, and where; prints as libraries do."""
    print("a library's greeting")
    return {"job": job, "process": os.getpid(), "setting": os.environ.get("SETTING")}


def refuse(job: Any) -> None:
    """Fails as a row does that the user can mend."""
    raise UsageError("there is no such thing")


def crash(job: Any) -> None:
    """Fails as a bug does."""
    print("before")
    raise ZeroDivisionError("oh")


def run_here(target: str, job: Any, environment: Mapping[str, str] | None = None) -> Any:
    """In place of omni.bench.fresh.run_fresh."""
    text = json.dumps(msgspec.to_builtins(job))
    return json.loads(json.dumps(msgspec.to_builtins(import_string(target)(json.loads(text)))))
