"""`flashinfer aot build | list | verify`: sets of precompiled kernels."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flashinfer.cli import UsageError, _text


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("aot", help="build, list and verify precompiled kernels")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="compile the kernels that configs ask for into a folder")
    _add_build_arguments(build)
    for name, run, text in (
        ("list", list_kernels, "what the registries hold"),
        ("verify", verify, "check files, machine code and digests against the registry and this package"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("paths", nargs="*", type=Path, help="folders with a registry.json (default: those in use)")
        if name == "list":
            command.add_argument("--kernels", action="store_true", help="a line per kernel rather than per family")
        command.set_defaults(run=run)


# ---------------------------------------------------------------------------------------------------------------- build


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="a TOML file, or core or smoke; may be repeated"
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        type=Path,
        metavar="MISSES",
        help="miss records, a .jsonl file or a folder",
    )
    parser.add_argument("--target", required=True, metavar="T,T", help="for example sm_80,sm_90a,x86-64-v3")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--jobs", default="auto", help="compile processes at a time (default: by cores and memory)")
    parser.add_argument("--max-bytes", metavar="N", help="fail when the machine code is larger (50M, 2G)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be compiled, and stop")
    parser.set_defaults(run=build)


def build(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when a kernel failed to compile or the set is too large."""
    from flashinfer.aot import build as aot_build
    from flashinfer.aot.config import read_specs

    if not args.config and not args.add:
        raise UsageError("nothing to build: name a --config (core, smoke or a file) or miss records with --add")
    target_names = [name for name in args.target.split(",") if name]
    num_jobs = aot_build.default_jobs() if args.jobs == "auto" else _positive("--jobs", args.jobs)
    max_bytes = None if args.max_bytes is None else _text.parse_size(args.max_bytes)
    specs = read_specs(args.config, target_names, args.add)
    todo = aot_build.plan(specs, args.out)
    print(f"{len(specs)} kernels: {len(todo.fresh)} up to date, {len(todo.stale)} to compile with {num_jobs} jobs")
    if args.dry_run:
        print(_summary([*todo.fresh], stale=todo.stale))
        return 0
    try:
        report = aot_build.build(todo, num_jobs, max_bytes)
    except aot_build.SetTooLarge as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_summary(report.built, failures=report.failures))
    print(
        f"{len(report.built)} kernels, {_text.size(report.bytes)}, in {args.out}; "
        f"{report.num_compiled} compiled in {report.seconds:.1f} s"
    )
    for one in report.built:
        if one.spill_bytes:
            print(f"spills {one.spill_bytes} bytes of registers: {one.entry.name} ({one.entry.target})")
    for failure in report.failures:
        print(f"\nfailed: {failure.name} ({failure.target})\n{failure.error}", file=sys.stderr)
    return 1 if report.failures else 0


def _positive(option: str, text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise UsageError(f"{option} is {text!r}; expected auto or a positive number")
    return int(text)


def _summary(built: Iterable[Any], stale: Iterable[Any] = (), failures: Iterable[Any] = ()) -> str:
    """A row per family and target."""
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0, 0.0, 0])
    for one in built:
        row = rows[one.entry.target, one.entry.family]
        row[0] += 1
        row[3] += one.seconds
        row[4] += one.entry.bytes
    for spec in stale:
        rows[spec.target, spec.family][1] += 1
    for failure in failures:
        rows[failure.target, failure.name.split("-")[0]][2] += 1
    total = [sum(row[i] for row in rows.values()) for i in range(5)]
    lines = [
        (*key, f"{row[0]:.0f}", f"{row[1]:.0f}", f"{row[2]:.0f}", f"{row[3]:.1f}", _text.size(row[4]))
        for key, row in [*sorted(rows.items()), (("total", ""), total)]
    ]
    columns = ("target", "family", "kernels", "to compile", "failed", "seconds", "bytes")
    shown = [0, 1, 2, *([3] if total[1] else []), *([4] if total[2] else []), 5, 6]
    header, cells = [columns[i] for i in shown], [[line[i] for i in shown] for line in lines]
    return _text.table(header, cells, right=",".join(columns[2:]))


# --------------------------------------------------------------------------------------------------------- list, verify


def list_kernels(args: argparse.Namespace) -> int:
    """Print what each registry holds. Exit status 1 when there is none, or one that cannot be read."""
    from flashinfer.version import __version__

    registries, status = _registries(args.paths)
    for registry in registries:
        entries = registry.entries
        compilers = ", ".join(sorted({entry.compiler for entry in entries}))
        print(f"{registry.root}: {len(entries)} kernels, {_text.size(sum(entry.bytes for entry in entries))}")
        print(f"version {registry.version} (this package: {__version__}); compiled by {compilers or 'nothing'}")
        if args.kernels:
            rows = [(entry.target, str(entry.bytes), entry.name) for entry in entries]
            print(_text.table(("target", "bytes", "kernel"), rows, right="bytes"))
        else:
            groups: dict[tuple[str, str], list[int]] = defaultdict(list)
            for entry in entries:
                groups[entry.target, entry.family].append(entry.bytes)
            cells = [(*key, str(len(sizes)), _text.size(sum(sizes))) for key, sizes in sorted(groups.items())]
            print(_text.table(("target", "family", "kernels", "bytes"), cells, right="kernels,bytes"))
    return status


def verify(args: argparse.Namespace) -> int:
    """Print every problem. Exit status 1 when there is one."""
    from flashinfer.aot.verify import verify as find_problems

    registries, status = _registries(args.paths)
    for registry in registries:
        problems = find_problems(registry)
        for problem in problems:
            print(f"{problem.what}: {problem.why}")
        stale = sum(problem.stale for problem in problems)
        verdict = f"{len(problems) - stale} damaged, {stale} stale" if problems else "all sound"
        print(f"{registry.root}: {len(registry.entries)} kernels, {verdict}")
        status |= bool(problems)
    return status


def _registries(paths: Sequence[Path]) -> tuple[list[Any], int]:
    """Registries of the given folders, or those in use; and 1 as exit status when one is missing or unreadable."""
    from flashinfer.jit.stores import AotStore, Registry

    roots = list(paths) or AotStore().roots()
    if not roots:
        raise UsageError("no kernel registry is installed; pip install 'flashinfer[aot]', or set FLASHINFER_AOT_PATH")
    registries, status = [], 0
    for root in roots:
        try:
            registries.append(Registry(root))
        except (OSError, ValueError) as error:
            print(f"{root}: no usable registry: {error}", file=sys.stderr)
            status = 1
    return registries, status
