"""Omni runs graphs of generative models: `from omni import Omni, AsyncOmni, Result`.

The names are imported when they are first used, so that `import omni` and the command line stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni.api import AsyncOmni, Omni, Result

    __version__: str

__all__ = ["AsyncOmni", "Omni", "Result", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("omni-stages")
    if name in __all__:
        return getattr(importlib.import_module("omni.api"), name)
    raise AttributeError(f"module 'omni' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
