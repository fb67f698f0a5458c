# SPDX-License-Identifier: Apache-2.0
"""Results of benchmarks as files: benchmarks/results/<device>-<commit>.json, one for each device and commit.

    {"format": 1, "device": "NVIDIA H200", "commit": "0123abc", "runs": [
      {"benchmark": "decode", "date": "2026-11-21T07:55Z", "command": "benchmarks/bench_decode.py --peer upstream",
       "driver": "580.65.06", "versions": {"torch": "2.11.0+cu130", …}, "note": "", "tables": {
         "decode": {"unit": "us", "partial": "", "cases": {
           "1 x 1024, 32/8": {"figure": 4.98, "peers": {"upstream 0.7.2": 8.98, "SDPA": 8.0}, "bytes": 4210688}}}}}]}

A figure is ours; `null` is what could not be timed. `bytes` and `flops` are what a case moves and computes. A table is
`partial` where options left cases out: the option is its text. What an old file does not say (driver, date of the run)
is `null` or told in `note`.

Runs of several benchmarks on one device and commit share a file. A table that is measured again replaces the old one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

FORMAT = 1
FOLDER = Path(__file__).resolve().parent / "results"
LOWER_IS_BETTER = {"us": True, "ms": True, "s": True, "TFLOP/s": False, "TB/s": False}  # by unit
DATE = "%Y-%m-%dT%H:%MZ"


@dataclass(frozen=True)
class Case:
    figure: float | None
    peers: dict[str, float | None] = field(default_factory=dict)
    bytes: int | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Table:
    unit: str
    cases: dict[str, Case]
    partial: str = ""


@dataclass(frozen=True)
class Run:
    """One command."""

    benchmark: str
    date: str  # UTC, as in DATE
    command: str
    driver: str | None
    versions: dict[str, str]
    tables: dict[str, Table]
    note: str = ""


@dataclass(frozen=True)
class Results:
    device: str
    commit: str
    runs: tuple[Run, ...]

    @property
    def file_name(self) -> str:
        return f"{_slug(self.device)}-{self.commit}.json"


class ResultsError(ValueError):
    """A file of results is not as this module describes it; the message says where, what, and what is expected."""


def case(figure: float, peers: dict[str, float] | None = None, **amounts: Any) -> Case:
    """A case from what was timed; NaN is what could not be."""
    known = {name: _or_none(value) for name, value in (peers or {}).items()}
    return Case(_or_none(figure), known, **amounts)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.5g}")


def _slug(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", device.removeprefix("NVIDIA ")).strip("-")


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Results:
    """Raises ResultsError, or OSError where there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:  # also of text that is not UTF-8
        raise ResultsError(f"{path}: not JSON ({error}); expected the file of a benchmark's --json") from None
    try:
        results = _results(data)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None
    if path.name != results.file_name:
        raise ResultsError(f"{path}: holds device {results.device!r} at {results.commit}; expected {results.file_name}")
    return results


def read_all(folder: Path = FOLDER) -> list[Results]:
    """Every file of a folder but those of trees with local changes, which name no commit that others could measure."""
    return [read(path) for path in sorted(folder.glob("*.json")) if not path.stem.endswith("-dirty")]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _results(data: Any) -> Results:
    found = _fields(data, "the file", {"format", "device", "commit", "runs"}, set())
    if found["format"] != FORMAT:
        raise ResultsError(f"format is {found['format']!r}; expected {FORMAT}")
    commit = _commit(found["commit"])
    runs = _list(found["runs"], "runs")
    results = Results(
        _text(found["device"], "device"), commit, tuple(_run(x, f"runs[{i}]") for i, x in enumerate(runs))
    )
    names = [name for run in results.runs for name in run.tables]
    for name in names:
        if names.count(name) > 1:
            raise ResultsError(f"table {name!r} is in {names.count(name)} runs; expected it once in a file")
    return results


def _commit(data: Any) -> str:
    commit = _text(data, "commit")
    if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", commit):
        raise ResultsError(f"commit is {commit!r}; expected 7 to 40 hexadecimal digits")
    return commit


def _run(data: Any, where: str) -> Run:
    found = _fields(data, where, {"benchmark", "date", "command", "driver", "versions", "tables"}, {"note"})
    date = _text(found["date"], f"{where}.date")
    try:
        datetime.strptime(date, DATE)
    except ValueError:
        raise ResultsError(f"{where}.date is {date!r}; expected UTC as in 2026-11-21T07:55Z") from None
    return Run(
        _text(found["benchmark"], f"{where}.benchmark"),
        date,
        _text(found["command"], f"{where}.command"),
        None if found["driver"] is None else _text(found["driver"], f"{where}.driver"),
        _mapping(found["versions"], f"{where}.versions", _text),
        _mapping(found["tables"], f"{where}.tables", _table),
        _text(found.get("note", ""), f"{where}.note", allow_empty=True),
    )


def _table(data: Any, where: str) -> Table:
    found = _fields(data, where, {"unit", "cases"}, {"partial"})
    if found["unit"] not in LOWER_IS_BETTER:
        raise ResultsError(f"{where}.unit is {found['unit']!r}; expected one of {', '.join(LOWER_IS_BETTER)}")
    cases = _mapping(found["cases"], f"{where}.cases", _case)
    if not cases:
        raise ResultsError(f"{where}.cases is empty; expected at least one case")
    return Table(found["unit"], cases, _text(found.get("partial", ""), f"{where}.partial", allow_empty=True))


def _case(data: Any, where: str) -> Case:
    found = _fields(data, where, {"figure"}, {"peers", "bytes", "flops"})
    amounts = {name: _positive(found[name], f"{where}.{name}") for name in ("bytes", "flops") if name in found}
    peers = _mapping(found.get("peers", {}), f"{where}.peers", _positive)
    return Case(_positive(found["figure"], f"{where}.figure"), peers, **amounts)


def _fields(data: Any, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ResultsError(f"{where} is {_short(data)}; expected an object with {', '.join(sorted(required))}")
    if missing := required - data.keys():
        raise ResultsError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := data.keys() - required - optional:
        known = ", ".join(sorted(required | optional))
        raise ResultsError(f"{where} has the unknown key {', '.join(sorted(unknown))}; expected {known}")
    return data


def _mapping(data: Any, where: str, read_value: Callable[[Any, str], Any]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ResultsError(f"{where} is {_short(data)}; expected an object")
    return {key: read_value(value, f"{where}[{key!r}]") for key, value in data.items()}


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise ResultsError(f"{where} is {_short(data)}; expected a list")
    return data


def _text(data: Any, where: str, *, allow_empty: bool = False) -> str:
    if not isinstance(data, str) or not (data or allow_empty):
        raise ResultsError(f"{where} is {_short(data)}; expected text")
    return data


def _positive(data: Any, where: str) -> Any:
    if data is None:
        return None
    if isinstance(data, bool) or not isinstance(data, (int, float)) or not 0 < data < math.inf:
        raise ResultsError(f"{where} is {_short(data)}; expected a positive number, or null where it was not timed")
    return data


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "…"


# ------------------------------------------------------------------------------------------------------------- writing


def check(folder: Path, device: str, commit: str) -> None:
    """Raises what `write` would, as far as it does not depend on a run."""
    _commit(commit)
    path = folder / Results(device, commit, ()).file_name
    if path.exists():
        read(path)


def write(folder: Path, device: str, commit: str, run: Run) -> Path:
    """Add a run to the file of its device and commit, in place of the tables that it measured again. Raises
    ResultsError where the file that is there is damaged, or the run is not as this module describes it."""
    path = folder / Results(device, commit, ()).file_name
    earlier = read(path).runs if path.exists() else ()
    results = Results(device, commit, (*_without(earlier, run.tables), run))
    text = _text_of(results)
    _results(json.loads(text))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _without(runs: Iterable[Run], names: Iterable[str]) -> Iterable[Run]:
    names = set(names)
    for run in runs:
        if kept := {name: table for name, table in run.tables.items() if name not in names}:
            yield Run(**{**vars(run), "tables": kept})


def _text_of(results: Results) -> str:
    """Indented JSON with a case a line, so that a difference between two files can be read."""
    data = {"format": FORMAT, **asdict(results)}
    lines: dict[str, str] = {}
    for run in data["runs"]:
        for table in run["tables"].values():
            for name, one in table["cases"].items():
                slim = {key: value for key, value in one.items() if key == "figure" or value not in (None, {})}
                mark = f"\0{len(lines)}"
                lines[json.dumps(mark)] = json.dumps(slim, ensure_ascii=False)
                table["cases"][name] = mark
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    return re.sub(r'"\\u0000\d+"', lambda mark: lines[mark[0]], text)
