"""`flashinfer misses`: what the precompiled set lacks, from the records of one process or of a fleet."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashinfer import env
from flashinfer.cli import UsageError
from flashinfer.cli._text import count, size, table
from flashinfer.jit import cache_dir, misses
from flashinfer.jit.misses import Hole


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
    clear = commands.add_parser("clear", help="delete the records", description="Delete miss records.")
    clear.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="record files or folders of them")
    clear.set_defaults(run=_clear)


def _report(args: argparse.Namespace) -> int:
    paths = args.paths or _default_paths()
    _require_existing(args.paths)
    records, broken = misses.read(path for path in paths if path.exists())
    holes = misses.aggregate(records)
    if args.format == "json":
        print(json.dumps({"misses": [_as_json(hole) for hole in holes], "broken_lines": broken}, indent=1))
    elif args.format == "toml":
        print(_as_toml(holes, broken))
    else:
        _print_table(holes, broken, paths)
    return 0


def _print_table(holes: Sequence[Hole], broken: int, paths: Sequence[Path]) -> None:
    where = " ".join(shlex.quote(str(path)) for path in paths)
    if not holes:
        print(f"no misses recorded in {where}")
    else:
        rows = [
            [
                f"{hole.seconds:.2f}",
                str(len(hole.processes)),
                size(hole.bytes),
                hole.spec["target"],
                ", ".join(sorted(hole.resolved_by)),
                "; ".join(sorted(hole.reasons)),
                hole.name,
            ]
            for hole in holes
        ]
        header = ["seconds", "processes", "size", "target", "resolved by", "why not precompiled", "kernel"]
        print(table(header, rows, right="seconds,processes,size") + "\n")
        processes = {process for hole in holes for process in hole.processes}
        seconds = sum(hole.seconds for hole in holes)
        print(f"{count(len(holes), 'kernel')}, {count(len(processes), 'process')}, {seconds:.2f} s lost in all")
    if broken:
        print(f"{count(broken, 'line')} could not be read (a process killed while writing) and {_is(broken)} left out")
    if holes:
        names = shlex.quote(",".join(sorted({hole.spec["target"] for hole in holes})))
        add = " ".join(f"--add {shlex.quote(str(path))}" for path in paths)
        in_use = env.AOT_PATH.get()
        out = shlex.quote(str(in_use[0])) if in_use else "my_kernels"
        then = "" if in_use else f"; then package it, or let processes find it with {env.AOT_PATH.name}={out}"
        print("\nTo have them precompiled (without a checkout: `flashinfer aot build` with the same arguments):")
        print(f"  python scripts/build_aot.py {add} --target {names} --out {out}")
        print(f"which adds them to whatever the folder holds{then}")


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _as_json(hole: Hole) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in asdict(hole).items()}


def _as_toml(holes: Sequence[Hole], broken: int) -> str:
    """Rows for a file of aot_configs/, each under a comment that says what it would save."""
    merged: dict[str, list[Hole]] = {}
    for hole in holes:
        merged.setdefault(hole.name, []).append(hole)  # a row is for every target
    lines = [f"# {count(broken, 'unreadable line')} left out"] if broken else []
    for same in merged.values():
        processes = {process for hole in same for process in hole.processes}
        names = ", ".join(hole.spec["target"] for hole in same)
        seconds = sum(hole.seconds for hole in same)
        lines += [
            f"# {count(len(processes), 'process')}, {seconds:.2f} s lost on {names}",
            misses.to_toml([same[0].spec]),
        ]
    return "\n".join(lines).rstrip("\n")


def _clear(args: argparse.Namespace) -> int:
    _require_existing(args.paths)
    files = [
        file
        for path in args.paths or _default_paths()
        for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])
        if file.exists()
    ]
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
