# SPDX-License-Identifier: Apache-2.0
"""Reads the miss records of a fleet and sums them up.

One pass in memory that does not grow with the number of records, only with the number of kernels and processes. Two
kinds of lines come mixed, in any order and from any number of files:

- a record (`jit.misses.Miss`): one process missed one kernel;
- a row of `compact`: many records that differ in process, seconds and time of day alone. It has the fields of a record,
  but instead of `process` it has `records` (how many), `processes` (their keys) and `until` (the time of the last).

A Parquet file holds such rows as well; reading and writing it takes DuckDB.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashinfer.errors import FlashInferError

SUFFIXES = (".jsonl", ".parquet")
_DAY = 86400
_SUMS = ("seconds", "compiled", "waited")
# Of names that may come in any number, such as files that a compiler of Python wrote: what is beyond goes together.
_MAX_NAMES, _OTHERS = 1000, "(others)"
_MAX_KERNELS = 10000
_BEGIN = '{"spec": {"family": '  # of a record


# -------------------------------------------------------------------------------------------------------------- reading


def files(path: Path) -> list[Path]:
    """The file itself, or all files of records below a folder."""
    return sorted(file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}")) if path.is_dir() else [path]


def lines(file: Path) -> Iterator[Any]:
    """What each line of a file says, whatever that is; None for one that is no JSON, as one cut short is."""
    if file.suffix == ".parquet":
        yield from _rows_of_parquet(file)
        return
    # Most of a record says which kernel it is of, in the same words in every process. That part is decoded once. If
    # both parts of a line are objects in themselves, the line is the two together.
    kernels: dict[str, Any] = {}
    decode, then = json.JSONDecoder().raw_decode, ', "reason": '
    with open(file, encoding="utf-8", errors="replace") as text:
        for line in text:
            at = line.find(then)
            kernel = kernels.get(line[:at])
            try:
                if kernel is not None:
                    row, end = decode("{" + line[at + 2 :])
                    row.update(kernel)
                    if line[at + 1 + end :] not in ("\n", ""):
                        row = None
                else:
                    row = json.loads(line)
                    if at > 0 and len(kernels) < _MAX_KERNELS:
                        with contextlib.suppress(ValueError, RecursionError):
                            kernels[line[:at]] = json.loads(line[:at] + "}")
            except (ValueError, RecursionError):
                row = None
            yield row
            # The first line of a file may stand behind the last one of another, cut short, that it was appended to.
            if row is None and (begin := line.rfind(_BEGIN)) > 0:
                with contextlib.suppress(ValueError, RecursionError):
                    yield json.loads(line[begin:])


class Rows:
    """Records and compacted rows of files and folders; `broken` counts the lines that are neither."""

    def __init__(self, paths: Iterable[Path], since: float = 0.0) -> None:
        """`since`: leave out what is older, in Unix time. A compacted row is as old as its last record."""
        self.broken = 0
        self._paths = list(paths)
        self._since = since

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Sequence[int]]]:
        """Each with every field that a record has, and the keys of its processes."""
        kernels: dict[tuple[str, str], dict[str, Any]] = {}
        last, last_key = "", (0,)
        since = self._since
        for file in itertools.chain.from_iterable(map(files, self._paths)):
            for row in lines(file):
                try:
                    name, spec, time = row["name"], row["spec"], row["time"]
                    if (name, spec["target"]) not in kernels:
                        kernels[name, spec["target"]] = _checked(name, spec)
                    row["spec"] = kernels[name, spec["target"]]  # one for all, so that memory is needed once
                    if not (
                        type(row["reason"]) is type(row["resolved_by"]) is type(row["caller"]) is str
                        and type(row["version"]) is type(row.get("model", "")) is str
                    ):
                        raise TypeError("not a text")
                    # NaN fails too: one would spoil every sum.
                    if not (
                        0 <= row["seconds"] < 1e12
                        and 0 <= row["bytes"] < 1e12
                        and 0 <= time < 1e12
                        and 0 <= row.get("compiled", 0) < 1e12
                        and 0 <= row.get("waited", 0) < 1e12
                    ):
                        raise ValueError("a number out of range")
                    if "model" not in row:  # of an earlier version
                        compiled = row["seconds"] if row["resolved_by"] == "jit-compile" else 0.0
                        row.update(model="", compiled=compiled, waited=0.0)
                    if "process" not in row:
                        processes, time = _processes(row), row["until"]
                    else:
                        if row["process"] != last:
                            last, last_key = row["process"], (process_key(row["process"]),)
                        processes = last_key
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                    self.broken += 1
                    continue
                if time >= since:
                    yield row, processes


def holds_any(file: Path) -> bool:
    """Whether a record, or a row of `compact`, is among the first hundred lines; none is in what cannot be read."""
    wanted = {"spec", "name", "reason", "resolved_by", "seconds"}
    try:
        return any(isinstance(row, dict) and wanted <= row.keys() for row in itertools.islice(lines(file), 100))
    except (OSError, FlashInferError):
        return False


def _checked(name: Any, spec: Any) -> dict[str, Any]:
    texts = name, spec["family"], spec["target"]
    if not (isinstance(spec["args"], dict) and all(isinstance(text, str) for text in texts)):
        raise TypeError("not a kernel")
    checked: dict[str, Any] = spec
    return checked


def _processes(row: dict[str, Any]) -> Sequence[int]:
    if not (row["records"] > 0 and 0 <= row["until"] < 1e12):
        raise ValueError("a number out of range")
    return array("Q", row["processes"])


@functools.lru_cache(maxsize=1024)
def process_key(name: str) -> int:
    """A number below 2^52, which every reader of JSON keeps exactly; two of a million processes have the same once in
    ten thousand fleets."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 12


class Distinct:
    """How many different keys were added, eight bytes each."""

    __slots__ = ("_keys", "_last", "_limit")

    def __init__(self) -> None:
        self._keys = array("Q")
        self._last: Sequence[int] = ()
        self._limit = 64

    def add(self, keys: Sequence[int]) -> None:
        if keys is self._last:
            return
        self._last = keys
        self._keys.extend(keys)
        if len(self._keys) > self._limit:
            self._limit = max(64, 2 * len(self.as_set()))

    def as_set(self) -> set[int]:
        keys = set(self._keys)
        self._keys = array("Q", keys)
        return keys

    def __len__(self) -> int:
        return len(self.as_set())


# ----------------------------------------------------------------------------------------------------------- summing up


@dataclass(slots=True)
class Tally:
    """A kernel, or any other group of records, over all processes."""

    name: str
    spec: dict[str, Any] = field(default_factory=dict)  # of a kernel
    records: int = 0
    seconds: float = 0.0
    compiled: float = 0.0  # of these seconds
    waited: float = 0.0
    bytes: int = 0  # of machine code
    processes: Distinct = field(default_factory=Distinct)
    kernels: set[tuple[str, str]] = field(default_factory=set)
    # seconds by
    reasons: dict[str, float] = field(default_factory=dict)
    resolved_by: dict[str, float] = field(default_factory=dict)
    callers: dict[str, float] = field(default_factory=dict)
    models: dict[str, float] = field(default_factory=dict)

    def add(self, row: dict[str, Any], processes: Sequence[int]) -> None:
        seconds = row["seconds"]
        self.records += row.get("records", 1)
        self.seconds += seconds
        self.compiled += row["compiled"]
        self.waited += row["waited"]
        if row["bytes"] > self.bytes:
            self.bytes = row["bytes"]
        self.processes.add(processes)
        for sums, name in (
            (self.reasons, row["reason"]),
            (self.resolved_by, row["resolved_by"]),
            (self.callers, row["caller"]),
            (self.models, row["model"]),
        ):
            if name in sums:
                sums[name] += seconds
            else:
                name = sys.intern(name) if len(sums) < _MAX_NAMES else _OTHERS
                sums[name] = sums.get(name, 0.0) + seconds

    def as_json(self) -> dict[str, Any]:
        """Names in the order of their seconds."""
        data = {name: getattr(self, name) for name in ("name", "spec", "records", "bytes")}
        data |= {name: round(getattr(self, name), 4) for name in _SUMS}
        data |= {"processes": len(self.processes), "kernels": len(self.kernels)}
        for name in ("reasons", "resolved_by", "callers", "models"):
            data[name] = [text for text in costliest(getattr(self, name)) if text]
        return data


def costliest(sums: dict[str, float]) -> list[str]:
    return sorted(sums, key=lambda name: (-sums[name], name))


GROUPINGS: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda row: str(row["model"]),
    "caller": lambda row: str(row["caller"]),
    "target": lambda row: str(row["spec"]["target"]),
    "family": lambda row: str(row["spec"]["family"]),
}


@dataclass
class Summary:
    kernels: list[Tally]  # costliest first
    groups: list[Tally]  # the same records in another way
    processes: Distinct
    seconds: float
    hours: dict[int, float]  # hour of Unix time -> seconds
    broken: int  # lines that are no records


def summarize(paths: Iterable[Path], since: float = 0.0, by: str | None = None) -> Summary:
    """Sum up the records of files and folders by kernel, and also by a key of GROUPINGS."""
    rows = Rows(paths, since)
    groups: dict[str, Tally] = {}
    hours: dict[int, float] = {}
    kernels: dict[tuple[str, str], Tally] = {}
    everyone = Distinct()
    for row, processes in rows:
        spec = row["spec"]
        key = row["name"], spec["target"]
        tally = kernels.get(key)
        if tally is None:
            tally = kernels[key] = Tally(row["name"], spec)
        tally.add(row, processes)
        everyone.add(processes)
        hour = int(row["time"]) // 3600
        hours[hour] = hours.get(hour, 0.0) + row["seconds"]
        if by is not None:
            group = GROUPINGS[by](row)
            if group not in groups:
                group = group if len(groups) < _MAX_NAMES else _OTHERS
                groups.setdefault(group, Tally(group))
            groups[group].add(row, processes)
            groups[group].kernels.add(key)
    seconds = sum(tally.seconds for tally in kernels.values())
    return Summary(ranked(kernels.values()), ranked(groups.values()), everyone, seconds, hours, rows.broken)


def ranked(tallies: Iterable[Tally]) -> list[Tally]:
    """Costliest first."""
    return sorted(tallies, key=lambda tally: (-tally.seconds, tally.name))


# ----------------------------------------------------------------------------------------------------------- compacting

# What the records of one row of `compact` have in common, besides the kernel and the day.
_COMMON = ("name", "reason", "resolved_by", "caller", "version", "model")


@dataclass(frozen=True)
class Compacted:
    records: int
    rows: int
    broken: int  # lines that are no records
    bytes_read: int


def compact(paths: Sequence[Path], out: Path) -> Compacted:
    """Write records as one row per day and kernel, reason, caller and so on; what `summarize` says of them stays the
    same.

    Args:
        out: a name that ends in `.jsonl`, or in `.parquet`, which takes DuckDB. Replaced in one step.

    Raises:
        FlashInferError: Parquet is asked for and DuckDB is not installed.
        OSError: `out` cannot be written.
    """
    if out.suffix == ".parquet":
        _duckdb(out)  # said before the work and not after it
    rows = Rows(paths)
    bytes_read = sum(file.stat().st_size for path in paths for file in files(path))
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    num_records = 0
    for row, processes in rows:
        records = row.get("records", 1)
        num_records += records
        key = (int(row["time"]) // _DAY, row["spec"]["target"], *(row[name] for name in _COMMON))
        group = groups.get(key)
        if group is None:
            alike = {name: sys.intern(row[name]) for name in _COMMON}
            begin = {"bytes": 0, "time": row["time"], "until": 0.0, "records": 0, "processes": Distinct()}
            groups[key] = group = {"spec": row["spec"], **alike, **begin, **dict.fromkeys(_SUMS, 0.0)}
        group["records"] += records
        group["bytes"] = max(group["bytes"], row["bytes"])
        group["time"] = min(group["time"], row["time"])
        group["until"] = max(group["until"], row.get("until", row["time"]))
        group["processes"].add(processes)
        for name in _SUMS:
            group[name] += row[name]
    write = _write_parquet if out.suffix == ".parquet" else _write_jsonl
    _replace(out, lambda partial: write(map(_finished, groups.values()), partial))
    return Compacted(num_records, len(groups), rows.broken, bytes_read)


def _finished(group: dict[str, Any]) -> dict[str, Any]:
    sums = {name: round(group[name], 4) for name in _SUMS}
    return {**group, **sums, "processes": sorted(group["processes"].as_set())}


def _replace(out: Path, write: Callable[[Path], None]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{out.name}-", dir=out.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        partial.chmod(0o644)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _write_jsonl(rows: Iterable[dict[str, Any]], out: Path) -> None:
    with open(out, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


# -------------------------------------------------------------------------------------------------------------- Parquet

_COLUMNS = {
    **{"spec": "JSON", "name": "VARCHAR", "reason": "VARCHAR", "resolved_by": "VARCHAR", "seconds": "DOUBLE"},
    **{"bytes": "BIGINT", "caller": "VARCHAR", "time": "DOUBLE", "version": "VARCHAR"},
    **{"model": "VARCHAR", "compiled": "DOUBLE", "waited": "DOUBLE"},
    **{"records": "BIGINT", "until": "DOUBLE", "processes": "BIGINT[]"},
}


def _duckdb(file: Path) -> Any:
    try:
        import duckdb
    except ImportError:
        raise FlashInferError(
            f'{file}: Parquet takes DuckDB, which is not installed: pip install "flashinfer[parquet]", or use .jsonl'
        ) from None
    return duckdb


def _rows_of_parquet(file: Path) -> Iterator[Any]:
    duckdb = _duckdb(file)
    try:
        with contextlib.closing(duckdb.connect()) as connection:
            found = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM read_parquet(?)", [str(file)])
            while rows := found.fetchmany(1000):
                for row in rows:
                    data = dict(zip(_COLUMNS, row))
                    data["spec"] = json.loads(data["spec"])
                    yield data
    except duckdb.Error as error:
        raise FlashInferError(f"{file} holds no rows of `misses compact`: {str(error).splitlines()[0]}") from None


def _write_parquet(rows: Iterable[dict[str, Any]], out: Path) -> None:
    duckdb = _duckdb(out)
    lines_ = Path(f"{out}.jsonl")
    columns = ", ".join(f"{name}: '{kind}'" for name, kind in _COLUMNS.items())
    try:
        _write_jsonl(rows, lines_)
        with contextlib.closing(duckdb.connect()) as connection:
            reading = f"read_json(?, format = 'newline_delimited', columns = {{{columns}}})"
            quoted = str(out).replace("'", "''")
            connection.execute(
                f"COPY (SELECT * FROM {reading}) TO '{quoted}' (FORMAT parquet, COMPRESSION zstd)", [str(lines_)]
            )
    finally:
        lines_.unlink(missing_ok=True)
