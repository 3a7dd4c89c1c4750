"""What a library's error means for the user, and what to do about it."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError

from omni.errors import StageError, StageSetupError, UsageError

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|alloc_cpu", re.IGNORECASE)
_DTYPES = re.compile(r"same dtype|scalar type|Input type|expected .*dtype")


class NotFinite(RuntimeError):
    """A denoiser gave numbers that are not finite, which would become a black picture."""

    def __init__(self, step: int | None) -> None:
        place = "a denoise step" if step is None else f"denoise step {step}"
        super().__init__(f"{place} gave numbers that are not finite")


@contextlib.contextmanager
def setup_faults(stage: str, model: str, device: str) -> Iterator[None]:
    """Turn errors of loading `model` into StageSetupError with a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise _setup_error(stage, error, f"the weights of {model} do not fit this pipeline's classes") from error
        remedy = f"free memory on {device}, set dtype: bfloat16, or take a smaller model"
        raise StageSetupError(
            stage, f"{device} is out of memory while loading {model}", remedy, _trace(error)
        ) from error
    except UsageError as error:
        raise StageSetupError(stage, str(error)) from error
    except ImportError as error:
        raise _setup_error(stage, error, "install the package that it names") from error
    except SafetensorError as error:
        raise _setup_error(stage, error, f"a weight file of {model} is damaged: copy or download it again") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise _setup_error(stage, error, f"{model} is for another pipeline class than stages.{stage} names") from error
    except (OSError, ValueError) as error:
        remedy = f"check that {model} is a whole checkpoint with safetensors weights, here or on the hub"
        raise _setup_error(stage, error, remedy) from error


@contextlib.contextmanager
def run_faults(stage: str, pipeline: Any, device: str) -> Iterator[None]:
    """Turn errors of one call of `pipeline` into StageError with a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        cause, remedy = f"{type(pipeline).__name__}: {error}", f"change the request's inputs or stages.{stage}.call"
        missing = [name for name, part in pipeline.components.items() if part is None]
        if is_out_of_memory(error):
            cause = f"{device} is out of memory"
            remedy = "ask for less height, width, num_frames or pictures at once, or set dtype: bfloat16"
        elif isinstance(error, NotFinite):
            remedy = f"set stages.{stage}.dtype: float32, or bfloat16 in place of float16; else look at the inputs"
        elif missing and "NoneType" in str(error):
            cause = f"{cause}; the checkpoint has no {', '.join(missing)}"
            remedy = "send embeddings (prompt_embeds ...) instead of what these components would make"
        elif isinstance(error, RuntimeError) and _DTYPES.search(str(error)):
            remedy = f"set stages.{stage}.dtype: float32"
        raise StageError(stage, cause, remedy, _trace(error)) from error


def _setup_error(stage: str, error: Exception, remedy: str) -> StageSetupError:
    return StageSetupError(stage, f"{type(error).__name__}: {error}", remedy, _trace(error))


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device or the host has no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(_NO_MEMORY.search(str(error)))


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
