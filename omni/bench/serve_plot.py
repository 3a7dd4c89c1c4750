"""Draws what `omni bench serve` measured: latency by percentile, and the server's memory over the requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omni.errors import UsageError

if TYPE_CHECKING:
    from omni.bench.memory_slope import Memory

SUFFIXES = (".png", ".svg")
MIB = 1024**2


def check(file: str) -> None:
    """Raises UsageError when `file` cannot be drawn, before anything is measured."""
    if Path(file).suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {file}: the name must end in {' or '.join(SUFFIXES)}")
    if not Path(file).resolve().parent.is_dir():
        raise UsageError(f"--plot {file}: there is no such folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'omni-stages[plots]'") from error


def draw(file: str, latencies: Mapping[str, Sequence[float]], memory: Memory | None) -> None:
    """Draw seconds by row, and memory where it was watched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 if memory else 6.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if memory else 1, squeeze=False)[0]
    for name, values in latencies.items():
        ordered = sorted(values)
        # Each value against the share of requests that took longer: 0.5 is the median, 0.01 the 99th percentile.
        longer = [1 - rank / (len(ordered) + 1) for rank in range(1, len(ordered) + 1)]
        axes[0].plot(longer, [value * 1000 for value in ordered], label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="percentile", ylabel="latency, ms", title="Latency from when due")
    axes[0].invert_xaxis()
    shares = [0.5, 0.1, 0.01, 0.001]
    axes[0].set_xticks(shares, [f"p{100 * (1 - share):g}" for share in shares])
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    if memory is not None:
        counts, sizes = zip(*memory.samples, strict=True)
        axes[1].plot(counts, [size / MIB for size in sizes])
        axes[1].set(xlabel="requests answered", ylabel="MiB", title=f"Memory of the server ({memory.words})")
        axes[1].set_ylim(0, 1.2 * max(sizes) / MIB)
        axes[1].grid(alpha=0.3)
    figure.savefig(file, dpi=120)
