"""The device of a stage, for the threads that work on it."""

from __future__ import annotations

import torch


def use_device(device: str) -> None:
    """Make `cuda:N` the calling thread's current device: some kernels run there, wherever their tensors lie.

    Every thread starts with GPU 0; `cpu` and plain `cuda` need nothing.
    """
    if torch.device(device).type == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)


def peak_device_bytes(device: str) -> int:
    """The most that torch has allocated on a GPU so far, in this process; 0 for a CPU."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else 0
