"""What the benchmarks share: timing on the GPU and on the host, a table, and the peers that happen to be installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

if importlib.util.find_spec("flashinfer") is None:  # straight from a source tree
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

L2_BYTES = 128 << 20  # more than the L2 cache of any GPU we know


def gpu_us(calls: Sequence[Callable[[], Any]], *, repeats: int = 20) -> float:
    """Median microseconds per call, from CUDA graph replays.

    Give several closures over different buffers when the data of one would stay in the L2 cache: they are captured in
    turn into one graph, so that launch gaps shrink and no closure finds its data cached.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies_for(num_bytes: int) -> int:
    """How many buffer sets a benchmark must rotate over so that none stays in the L2 cache."""
    return max(2, min(64, -(-2 * L2_BYTES // max(1, num_bytes))))


def host_us(call: Callable[[], Any], *, rounds: int = 30, calls: int = 200) -> float:
    """Microseconds of host time per call: the best of many short rounds, the GPU's queue emptied between them."""
    best = float("inf")
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in itertools.repeat(None, calls):
            call()
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


def upstream() -> ModuleType | None:
    """Upstream FlashInfer, if its distribution (not this one) is what `import flashinfer_upstream` finds."""
    if importlib.util.find_spec("flashinfer_upstream") is None:
        return None
    return importlib.import_module("flashinfer_upstream")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, so that it can go into docs/performance.md as it is."""
    cells = [[_text(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}\n")
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def save_plot(path: str, title: str, header: Sequence[str], rows: Sequence[Sequence[object]], *, columns: str) -> None:
    """Bars of the columns whose header contains `columns`, a group for each row, as an image. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [any(isinstance(row[index], (int, float)) for row in rows) for index in range(len(header))]
    chosen = [index for index, name in enumerate(header) if columns in name and measured[index]]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.4 * len(rows)))
    height = 0.8 / len(chosen)
    for number, index in enumerate(chosen):
        values = [cell if isinstance(cell := row[index], (int, float)) else 0.0 for row in rows]
        places = [place + number * height for place in range(len(rows))]
        label = "flashinfer" if header[index] == columns else header[index].removesuffix(columns).strip()
        axes.barh(places, values, height, label=label)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], [str(row[0]) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(columns)
    axes.set_title(f"{title}\n{environment()}", fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.2f}" if abs(cell) < 100 else f"{cell:.0f}"
    return str(cell)


def environment() -> str:
    """One line that says what was measured: device, software, commit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        root = Path(__file__).parent
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown commit"
    return f"{device}, torch {torch.__version__}, Python {sys.version.split()[0]}, {commit}"


def distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
