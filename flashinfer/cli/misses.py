"""`flashinfer misses`: what the precompiled set lacks, from the records of one process or of a fleet."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashinfer import env
from flashinfer.aot import records
from flashinfer.aot.records import Summary, Tally
from flashinfer.cli import UsageError
from flashinfer.cli._text import count, size, table
from flashinfer.jit import cache_dir, misses


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "misses",
        help="what the precompiled kernels did not cover",
        description="Kernels that processes asked for and the precompiled set did not hold.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    report = commands.add_parser(
        "report",
        help="costliest first",
        description="Sum up miss records, costliest first. Records of many machines merge by naming all their files or "
        "folders.",
    )
    report.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="record files or folders of them")
    report.add_argument("--format", choices=("table", "json", "toml"), default="table")
    report.set_defaults(run=_report)
    compact = commands.add_parser(
        "compact",
        help="many records into one small file",
        description="Write the records of a fleet as one row per day and kernel, reason, caller and so on. What a "
        "report or a build makes of the file is what it makes of the records.",
    )
    compact.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="record files or folders of them")
    compact.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="a .jsonl file, or .parquet (takes flashinfer[parquet])"
    )
    compact.set_defaults(run=_compact)
    clear = commands.add_parser("clear", help="delete the records", description="Delete miss records.")
    clear.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="record files or folders of them")
    clear.set_defaults(run=_clear)


def _report(args: argparse.Namespace) -> int:
    paths = args.paths or _default_paths()
    _require_existing(args.paths)
    summary = records.summarize(path for path in paths if path.exists())
    if args.format == "json":
        misses_ = [tally.as_json() for tally in summary.kernels]
        print(json.dumps({"misses": misses_, "broken_lines": summary.broken}, indent=1))
    elif args.format == "toml":
        print(_as_toml(summary))
    else:
        _print_table(summary, paths)
    return 0


def _print_table(summary: Summary, paths: Sequence[Path]) -> None:
    where = " ".join(shlex.quote(str(path)) for path in paths)
    if not summary.kernels:
        print(f"no misses recorded in {where}")
    else:
        rows = [
            [
                f"{tally.seconds:.2f}",
                str(len(tally.processes)),
                size(tally.bytes),
                tally.spec["target"],
                ", ".join(sorted(tally.resolved_by)),
                "; ".join(sorted(tally.reasons)),
                tally.name,
            ]
            for tally in summary.kernels
        ]
        header = ["seconds", "processes", "size", "target", "resolved by", "why not precompiled", "kernel"]
        print(table(header, rows, right="seconds,processes,size") + "\n")
        kernels, processes = count(len(summary.kernels), "kernel"), count(len(summary.processes), "process")
        print(f"{kernels}, {processes}, {summary.seconds:.2f} s lost in all")
    _say_broken(summary.broken)
    if summary.kernels:
        names = shlex.quote(",".join(sorted({tally.spec["target"] for tally in summary.kernels})))
        add = " ".join(f"--add {shlex.quote(str(path))}" for path in paths)
        in_use = env.AOT_PATH.get()
        out = shlex.quote(str(in_use[0])) if in_use else "my_kernels"
        then = "" if in_use else f"; then package it, or let processes find it with {env.AOT_PATH.name}={out}"
        print("\nTo have them precompiled (without a checkout: `flashinfer aot build` with the same arguments):")
        print(f"  python scripts/build_aot.py {add} --target {names} --out {out}")
        print(f"which adds them to whatever the folder holds{then}")


def _say_broken(broken: int) -> None:
    if broken:
        print(f"{count(broken, 'line')} could not be read (a process killed while writing) and {_is(broken)} left out")


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _as_toml(summary: Summary) -> str:
    """Rows for a file of aot_configs/, each under a comment that says what it would save."""
    merged: dict[str, list[Tally]] = {}
    for tally in summary.kernels:
        merged.setdefault(tally.name, []).append(tally)  # a row is for every target
    lines = [f"# {count(summary.broken, 'unreadable line')} left out"] if summary.broken else []
    for same in merged.values():
        processes = records.Distinct()
        for tally in same:
            processes.add(list(tally.processes.as_set()))
        names = ", ".join(tally.spec["target"] for tally in same)
        seconds = sum(tally.seconds for tally in same)
        lines += [
            f"# {count(len(processes), 'process')}, {seconds:.2f} s lost on {names}",
            misses.to_toml([same[0].spec]),
        ]
    return "\n".join(lines).rstrip("\n")


def _compact(args: argparse.Namespace) -> int:
    _require_existing(args.paths)
    out = args.out
    if out.suffix not in records.SUFFIXES:
        raise UsageError(f"--out is {out}; expected a name that ends in {' or '.join(records.SUFFIXES)}")
    for path in args.paths:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise UsageError(
                f"--out {out} lies in {path}, whose records would then count twice; expected a file elsewhere"
            )
    done = records.compact(args.paths, out)
    saved = f"{size(done.bytes_read)} -> {size(out.stat().st_size)}"
    print(f"{count(done.records, 'record')} in {count(done.rows, 'row')} of {out}: {saved}")
    _say_broken(done.broken)
    print(
        f"\nNext: flashinfer misses report {shlex.quote(str(out))}; the records it was made of are still there and "
        "have to go before both are read together"
    )
    return 0


def _clear(args: argparse.Namespace) -> int:
    _require_existing(args.paths)
    files = [file for path in args.paths or _default_paths() for file in records.files(path) if file.exists()]
    for file in files:
        file.unlink(missing_ok=True)  # a process that still runs begins a new one
    print(f"{count(len(files), 'record file')} deleted")
    return 0


def _default_paths() -> list[Path]:
    folder = cache_dir.preferred()
    if folder is None:
        why, _ = cache_dir.unknown()
        raise UsageError(f"the folder of records is unknown: {why}; name files or folders of records")
    return [folder / "misses"]


def _require_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist; expected a .jsonl file of miss records or a folder of them")
