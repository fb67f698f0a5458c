# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: timing, tables, plots, files of results, and another installation of flashinfer to compare
with."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import results
import torch
from plot import Panel, save_bars

if importlib.util.find_spec("flashinfer") is None:  # straight from a source tree
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L2_BYTES = 128 << 20  # more than the L2 cache of any GPU we know
WARM_SECONDS = 0.05  # in which a GPU that was idle comes to its clocks
Calls = Sequence[Callable[[], Any]]
# Of a file of results: case, figure, figures of peers, `bytes` and `flops`.
Row = tuple[str, float, dict[str, float], dict[str, float]]

# ------------------------------------------------------------------------------------------------------------- timing


def device_us(calls: Calls, *, repeats: int = 20) -> float:
    """Median microseconds per call: from CUDA graph replays on a GPU, host time on a CPU.

    Give several closures over different buffers when the data of one would stay in the L2 cache: they are captured in
    turn into one graph, so that launch gaps shrink and no closure finds its data cached.
    """
    return device_us_in_turns({"": calls}, rounds=1, repeats=repeats)[""]


def device_us_in_turns(
    kinds: dict[str, Calls], *, rounds: int = 3, repeats: int = 10, seconds: float = WARM_SECONDS
) -> dict[str, float]:
    """The same of every kind of calls. They take turns, in another order each round: in a long run a card is at the
    limit of its power, and as fast as what it did just before lets it be. seconds: before each is timed."""
    for call in itertools.chain.from_iterable(kinds.values()):
        call()
    if DEVICE == "cpu":
        runs = {name: [_seconds(calls) for _ in range(5)] for name, calls in kinds.items()}
        return {name: statistics.median(runs[name]) / len(calls) * 1e6 for name, calls in kinds.items()}
    graphs = {name: _captured(calls) for name, calls in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name in random.sample(list(kinds), len(kinds)):
            times[name].append(_replay_us(graphs[name], repeats, seconds))
    return {name: statistics.median(times[name]) / len(calls) for name, calls in kinds.items()}


def _captured(calls: Calls) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph, repeats: int, seconds: float) -> float:
    """The median of so many, of long ones of fewer, of a GPU that has come to its clocks."""
    warm = time.perf_counter() + seconds
    while time.perf_counter() < warm:
        graph.replay()
        torch.cuda.synchronize()
    times: list[float] = []
    enough = time.perf_counter() + 2 * seconds
    while len(times) < 3 or (len(times) < repeats and time.perf_counter() < enough):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copies_for(num_bytes: int) -> int:
    """How many buffer sets a benchmark must rotate over so that none stays in the L2 cache."""
    return max(2, min(64, -(-2 * L2_BYTES // max(1, num_bytes)))) if DEVICE == "cuda" else 1


def host_us(call: Callable[[], Any], *, rounds: int = 30, calls: int = 200) -> float:
    """Microseconds of host time per call: the best of many short rounds, the GPU's queue emptied between them. The
    queue holds more than a round, so that no call waits for a kernel to end."""
    best, end = math.inf, time.perf_counter() + 1.0  # enough rounds of what computes on the host, on a CPU
    for _ in range(rounds):
        if best < math.inf and time.perf_counter() > end:
            break
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
    def noting(self, what: str, is_other: bool = False) -> Iterator[None]:
        """Of a peer, or of another library that is timed beside us, note that it raised, and why, and go on; our own
        errors are errors."""
        try:
            yield
        except Exception as error:  # whatever another library raises
            if not (self.is_peer or is_other):
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


def parser_of(doc: str | None, *, only: bool = True, host: bool = True) -> argparse.ArgumentParser:
    """Of a benchmark of that docstring: with --only, of cases by their names, and --no-host."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if only:
        parser.add_argument("--only", default="", help="cases whose name contains this text")
    if host:
        parser.add_argument("--no-host", action="store_true", help="leave out the host costs")
    return parser


def run(
    parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace, Times], None]
) -> tuple[argparse.Namespace, Times, list[Times]]:
    """The arguments, our times, and those of the peer that --peer names (a list of one, or empty).

    The peer has the same name as we have, so it is timed by this same script in a process of its own, with the same
    arguments, where `import flashinfer` finds it; that process hands its times back as JSON.
    """
    add_peer(parser)
    parser.add_argument("--times-to", metavar="FILE", help=argparse.SUPPRESS)  # in the peer's process
    args = parse(parser)
    times = Times(library_name(), is_peer=bool(args.times_to))
    measure(args, times)
    if args.times_to:
        Path(args.times_to).write_text(json.dumps(asdict(times)))
        raise SystemExit
    return args, times, [_peer_times(args.peer)] if args.peer else []


def _folder_of_peer(text: str) -> str:
    """Said before our own cases are timed, which may take minutes."""
    if not (Path(text) / "flashinfer" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(
            f"{text} has no package flashinfer; expected a folder that holds a package flashinfer, such as that of pip "
            "install --target or a checkout"
        )
    return text


def add_peer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        type=_folder_of_peer,
        metavar="FOLDER",
        help="time another installation of flashinfer too, over the same cases: upstream's (pip install --target "
        "FOLDER flashinfer-python) or an earlier one of ours; what it cannot run is a dash, with the reason below",
    )


def library_name() -> str:
    """Of the flashinfer that this process imports, for a process that a peer runs in."""
    import flashinfer

    folder = str(Path(flashinfer.__file__).parent.parent)
    is_upstream = any(importlib.metadata.distributions(name="flashinfer-python", path=[folder]))
    return f"{'upstream' if is_upstream else 'peer'} {flashinfer.__version__}"


def peer_environment(folder: str) -> dict[str, str]:
    """Of a process where `import flashinfer` finds the one in that folder."""
    path = os.pathsep.join([str(Path(folder).resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def _peer_times(folder: str) -> Times:
    variables = peer_environment(folder)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "times.json"
        subprocess.run([sys.executable, *sys.argv, "--times-to", str(result)], env=variables, check=True)
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
    save_bars(Path(path), title, unit, cases, [Panel(environment(), series)], {})


# ------------------------------------------------------------------------------------------------------------- results


def conclude(args: argparse.Namespace, ours: Times, peers: Sequence[Times], tables: dict[str, results.Table]) -> None:
    """The end of a benchmark: host costs, unless --no-host, what a peer could not run, and the file of results, where
    host costs are named after the first table."""
    if not args.no_host:
        print_host(ours, peers)
        tables = {**tables, f"{next(iter(tables))} host": host_table(ours, peers)}
    print_failures([ours, *peers])
    write_results(args, tables)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with those of files of results; whether one can be written is known before anything is timed."""
    parser.add_argument(
        "--json",
        metavar="FOLDER",
        nargs="?",
        const=str(results.FOLDER),
        help="also write what was timed to FOLDER/<device>-<commit>.json (benchmarks/results unless it is named), "
        "beside the tables of other benchmarks on this device and commit",
    )
    parser.add_argument("--commit", help="of this tree, unless git tells; for --json")
    args = parser.parse_args()
    if args.json is not None:
        args.commit = args.commit or git_commit()
        if not args.commit:
            parser.error("--json: git does not tell the commit of this tree; name it with --commit")
        with _naming_json():
            results.check(Path(args.json), device_name(), args.commit)
    return args


@contextmanager
def _naming_json() -> Iterator[None]:
    try:
        yield
    except (results.ResultsError, OSError) as error:
        raise SystemExit(f"--json: {error}") from None


def write_results(
    args: argparse.Namespace, tables: dict[str, results.Table], *, device: str = DEVICE, compiler: str = ""
) -> None:
    """Where --json asks for it. `device` is the kind that was timed; `compiler` too, where that was one."""
    if args.json is None:
        return
    run = results.Run(
        benchmark=Path(sys.argv[0]).stem.removeprefix("bench_"),
        date=datetime.now(timezone.utc).strftime(results.DATE),
        command=_command(),
        driver=_driver() if device == "cuda" else None,
        versions=_versions(compiler or _compiler(device)),
        tables=tables,
    )
    with _naming_json():
        path = results.write(Path(args.json), device_name(device), args.commit, run)
    print(f"\nwritten: {path}")


def table(
    unit: str,
    rows: Iterable[Row],
    partial: str = "",
) -> results.Table:
    cases = {name: results.case(figure, peers, **amounts) for name, figure, peers, amounts in rows}
    return results.Table(unit, cases, partial)


def host_table(ours: Times, peers: Sequence[Times]) -> results.Table:
    """What `print_host` prints."""
    host = ours.columns["host"]
    return table("us", ((n, us, {peer.library: peer.us(n, "host") for peer in peers}, {}) for n, us in host.items()))


def _command() -> str:
    """The command line without what says where to: the peer by the name of its folder alone."""
    words, arguments = [f"{Path(__file__).parent.name}/{Path(sys.argv[0]).name}"], sys.argv[1:]
    while arguments:
        word, _, value = arguments.pop(0).partition("=")
        names_file, is_left_out = word in ("--peer", "--fa3"), word in ("--json", "--commit", "--plot")
        if not value and (names_file or is_left_out) and arguments and arguments[0][:1] != "-":
            value = arguments.pop(0)
        if names_file:
            words += [word, Path(value).name]
        elif not is_left_out:
            words.append(f"{word}={value}" if value else word)
    return shlex.join(words)


def _versions(compiler: str) -> dict[str, str]:
    import flashinfer

    versions = {"flashinfer": flashinfer.__version__, "python": sys.version.split()[0], "torch": torch.__version__}
    return {**versions, **({"compiler": compiler} if compiler else {})}


def _compiler(device: str) -> str:
    """Empty where there is none, and every kernel was precompiled."""
    try:
        from flashinfer.errors import ToolchainMissing
        from flashinfer.jit.toolchain import toolchain
    except ImportError:  # another flashinfer is timed
        return ""
    try:
        return toolchain(device).identity
    except ToolchainMissing:
        return ""


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def device_name(device: str = DEVICE) -> str:
    """A CPU by its model and the cores that this process may use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def git_commit() -> str:
    """Of this tree, `-dirty` where what is timed differs from it; empty where git cannot tell."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    timed = ["flashinfer", "csrc", "benchmarks", ":!benchmarks/results"]
    try:
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        commit = run([*git, "rev-parse", "--short", "HEAD"]).stdout.strip()
        return commit + ("-dirty" if run([*git, "status", "--porcelain", "-uno", "--", *timed]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> str:
    """One line that says what was measured: device, software, commit."""
    commit = git_commit() or "unknown commit"
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    return f"{device}, torch {torch.__version__}, Python {sys.version.split()[0]}, {commit}"
