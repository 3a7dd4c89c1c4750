"""The device of a stage, for the threads that work on it."""

from __future__ import annotations

import torch


def use_device(device: str) -> None:
    """Make `cuda:N` the calling thread's current device: some kernels run there, wherever their tensors lie.

    Every thread starts with GPU 0; `cpu` and plain `cuda` need nothing.
    """
    if torch.device(device).type == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)


_peaks: dict[torch.device, int] = {}
"""The most that torch had allocated before its own count began anew."""


def peak_device_bytes(device: str) -> int:
    """The most that torch has allocated on a GPU so far, in this process; 0 for a CPU."""
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return 0
    return max(torch.cuda.max_memory_allocated(chosen), _peaks.get(_numbered(chosen), 0))


def keep_peak(device: str) -> None:
    """Remember the peak: somebody is about to let torch's own count begin anew."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        _peaks[_numbered(chosen)] = peak_device_bytes(device)


def _numbered(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
