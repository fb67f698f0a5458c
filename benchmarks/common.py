"""What the benchmarks share: timing, tables, plots, and another installation of flashinfer to compare with."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

if importlib.util.find_spec("flashinfer") is None:  # straight from a source tree
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L2_BYTES = 128 << 20  # more than the L2 cache of any GPU we know
Calls = Sequence[Callable[[], Any]]

# ------------------------------------------------------------------------------------------------------------- timing


def device_us(calls: Calls, *, repeats: int = 20) -> float:
    """Median microseconds per call: from CUDA graph replays on a GPU, host time on a CPU.

    Give several closures over different buffers when the data of one would stay in the L2 cache: they are captured in
    turn into one graph, so that launch gaps shrink and no closure finds its data cached.
    """
    for call in calls:
        call()
    if DEVICE == "cpu":
        return statistics.median(_seconds(calls) for _ in range(5)) / len(calls) * 1e6
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
    return max(2, min(64, -(-2 * L2_BYTES // max(1, num_bytes)))) if DEVICE == "cuda" else 1


def host_us(call: Callable[[], Any], *, rounds: int = 30, calls: int = 200) -> float:
    """Microseconds of host time per call: the best of many short rounds, the GPU's queue emptied between them. The
    queue holds more than a round, so that no call waits for a kernel to end."""
    best = math.inf
    for _ in range(rounds):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, _seconds(itertools.repeat(call, calls)))
    return best / calls * 1e6


def _seconds(calls: Any) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


# -------------------------------------------------------------------------------------------------------------- peers


@dataclass
class Times:
    """Microseconds by column and case, of the flashinfer that this process imports."""

    library: str
    is_peer: bool = False
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Of a peer, note that it raised, and why, and go on; our own errors are errors."""
        try:
            yield
        except Exception as error:  # whatever another library raises
            if not self.is_peer:
                raise
            reason = (str(error).strip() or "no message").splitlines()[0]
            self.failures.append(f"{what}: {type(error).__name__}: {reason[:200]}")

    def measure(self, case: str, column: str, measure: Callable[..., float], *args: Any, **options: Any) -> None:
        with self.noting(f"{case} {column}".rstrip()):
            self.columns.setdefault(column, {})[case] = measure(*args, **options)

    def us(self, case: str, column: str = "") -> float:
        """NaN (a dash in a table) where the case was not timed."""
        return self.columns.get(column, {}).get(case, math.nan)

    def best_us(self, case: str) -> float:
        """Of all columns."""
        return min((times[case] for times in self.columns.values() if case in times), default=math.nan)


def run(
    parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace, Times], None]
) -> tuple[argparse.Namespace, Times, list[Times]]:
    """The arguments, our times, and those of the peer that --peer names (a list of one, or empty).

    The peer has the same name as we have, so it is timed by this same script in a process of its own, with the same
    arguments, where `import flashinfer` finds it; that process hands its times back as JSON.
    """
    parser.add_argument(
        "--peer",
        metavar="FOLDER",
        help="time another installation of flashinfer too, over the same cases: upstream's (pip install --target "
        "FOLDER flashinfer-python) or an earlier one of ours; what it cannot run is a dash, with the reason below",
    )
    parser.add_argument("--times-to", metavar="FILE", help=argparse.SUPPRESS)  # in the peer's process
    args = parser.parse_args()
    import flashinfer

    folder = str(Path(flashinfer.__file__).parent.parent)
    is_upstream = any(importlib.metadata.distributions(name="flashinfer-python", path=[folder]))
    library = f"{'upstream' if is_upstream else 'peer'} {flashinfer.__version__}"
    times = Times(library, is_peer=bool(args.times_to))
    measure(args, times)
    if args.times_to:
        Path(args.times_to).write_text(json.dumps(asdict(times)))
        raise SystemExit
    return args, times, [_peer_times(args.peer)] if args.peer else []


def _peer_times(folder: str) -> Times:
    if not (Path(folder) / "flashinfer" / "__init__.py").is_file():
        raise SystemExit(f"--peer {folder}: expected a folder that holds a package flashinfer, found none")
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    path = os.pathsep.join([str(Path(folder).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "times.json"
        subprocess.run(
            [sys.executable, *sys.argv, "--times-to", str(result)], env={**os.environ, "PYTHONPATH": path}, check=True
        )
        return Times(**json.loads(result.read_text()))


# ------------------------------------------------------------------------------------------------------------- output


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, so that it can go into docs/performance.md as it is."""
    cells = [[_text(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}\n")
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def measure_host(times: Times, calls: dict[str, Callable[[], Any]]) -> None:
    """Host microseconds of each call, beside torch.add(out=), the price of a bare launch."""
    x, y, z = (torch.zeros(1024, device=DEVICE) for _ in range(3))
    for name, call in {"torch.add(out=)": lambda: torch.add(x, y, out=z), **calls}.items():
        times.measure(name, "host", host_us, call)


def print_host(ours: Times, peers: Sequence[Times]) -> None:
    rows = [[name, us, *(peer.us(name, "host") for peer in peers)] for name, us in ours.columns["host"].items()]
    print_table("Host cost per call, us", ["call", "us", *(peer.library for peer in peers)], rows)


def print_failures(peers: Sequence[Times]) -> None:
    for peer in peers:
        print("\n".join(["", *(f"- {peer.library}, {failure}" for failure in peer.failures)]))


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.2f}" if abs(cell) < 100 else f"{cell:.0f}"
    return str(cell)


def save_plot(path: str, title: str, unit: str, cases: Sequence[str], series: dict[str, Sequence[float]]) -> None:
    """Bars of every series, a group for each case, as an image. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {label: values for label, values in series.items() if not all(map(math.isnan, values))}
    colors = ["#1a6faf", "#e8963e", "#c8553d", "#9aa0a6"]
    height = 0.84 / len(series)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.12 * len(cases) * (len(series) + 1)), layout="constrained")
    for number, (label, values) in enumerate(series.items()):
        places = [case + (number + 0.5) * height - 0.42 for case in range(len(cases))]
        drawn = [0.0 if math.isnan(value) else value for value in values]
        axes.barh(places, drawn, 0.92 * height, label=label, color=colors[number % len(colors)])
        for place, value in zip(places, values):
            if not math.isnan(value):
                axes.text(value, place, f" {value:.3g}", va="center", fontsize=6)
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: {environment()}", fontsize=8)
    figure.legend(loc="outside lower center", ncols=len(series), fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)


def environment() -> str:
    """One line that says what was measured: device, software, commit."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown commit"
    return f"{device}, torch {torch.__version__}, Python {sys.version.split()[0]}, {commit}"
