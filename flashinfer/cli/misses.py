# SPDX-License-Identifier: Apache-2.0
"""`flashinfer misses`: what the precompiled set lacks, from the records of one process or of a fleet."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashinfer import env
from flashinfer import target as targets
from flashinfer.aot import advice, records, suggest
from flashinfer.aot.records import Summary, Tally
from flashinfer.aot.suggest import Candidate, Suggestion
from flashinfer.cli import UsageError
from flashinfer.cli._text import count, parse_since, parse_size, size, table
from flashinfer.jit import cache_dir, misses
from flashinfer.jit.spec import KernelSpec

_TOP = 20


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
        examples=(
            "misses report --since 7d",
            "misses report /collected/misses --by model",
            "misses report --format toml > mine.toml",
        ),
    )
    report.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="record files or folders of them")
    report.add_argument("--format", choices=("table", "json", "toml"), default="table")
    report.add_argument("--by", choices=tuple(records.GROUPINGS), help="sum up by this instead of by kernel")
    report.add_argument("--since", metavar="WHEN", help="only what is newer: 30min, 2h, 7d, 2026-11-29T03:00")
    report.add_argument(
        "--top",
        type=int,
        metavar="N",
        help=f"only the costliest; 0 for all (default: {_TOP} in a table, all elsewhere)",
    )
    report.set_defaults(run=_report)
    _add_html(report)
    suggesting = commands.add_parser(
        "suggest",
        help="what to add to the precompiled set within a budget",
        description="The kernels that save the fleet most seconds (or processes) within a budget of bytes, as rows for "
        "`flashinfer aot build --config`. Misses that another step mends, such as installing flashinfer_aot, do not "
        "count.",
        examples=(
            "misses suggest --budget 5MB --out mine.toml /collected/misses",
            "misses suggest --budget 5MB --save processes --target sm_80,sm_90a",
        ),
    )
    suggesting.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="record files or folders of them")
    suggesting.add_argument(
        "--budget", required=True, metavar="SIZE", help="of machine code, over all targets: 5MB, 500K"
    )
    suggesting.add_argument("--target", metavar="T,T", help="of the build (default: those that the records are of)")
    suggesting.add_argument("--save", choices=("seconds", "processes"), default="seconds", help="what counts")
    suggesting.add_argument("--all", action="store_true", help="count misses too that another step mends")
    suggesting.add_argument("--since", metavar="WHEN", help="only what is newer: 30min, 2h, 7d, 2026-11-29T03:00")
    suggesting.add_argument("--out", type=Path, metavar="FILE", help="write the rows there, and a table here")
    _add_html(suggesting)
    suggesting.set_defaults(run=_suggest)
    compact = commands.add_parser(
        "compact",
        help="many records into one small file",
        description="Write the records of a fleet as one row per day and kernel, reason, caller and so on. What a "
        "report or a build makes of the file is what it makes of the records.",
        examples=("misses compact /collected/misses --out fleet.jsonl",),
    )
    compact.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="record files or folders of them")
    compact.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="a .jsonl file, or .parquet (takes flashinfer[parquet])"
    )
    compact.set_defaults(run=_compact)
    clear = commands.add_parser(
        "clear",
        help="delete the records",
        description="Delete files of miss records: of this machine, or those that are named and in folders that are "
        "named. A file that does not begin with records is left alone.",
        examples=("misses clear", "misses clear /collected/misses"),
    )
    clear.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="record files or folders of them")
    clear.set_defaults(run=_clear)


def _add_html(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with charts as well, all in one file")


def _report(args: argparse.Namespace) -> int:
    if args.top is not None and args.top < 0:
        raise UsageError(f"--top is {args.top}; expected a number of rows, or 0 for all")
    if args.by is not None and args.format == "toml":
        raise UsageError(f"--format toml is a row for each kernel; expected table or json with --by {args.by}")
    paths = args.paths or _default_paths()
    summary = _summary(args)
    top = args.top or None
    if args.html is not None:
        _write_page(args.html, summary, suggest.suggest(summary, 0, (), every_reason=True, cache=_cache()))
    if args.format == "json":
        rows = (summary.kernels if args.by is None else summary.groups)[:top]
        data = {"misses" if args.by is None else args.by: [tally.as_json() for tally in rows]}
        print(json.dumps({**data, "broken_lines": summary.broken}, indent=1))
    elif args.format == "toml":
        print(_as_toml(summary, top))
    else:
        _print_report(summary, args, paths, _TOP if args.top is None else top)
    return 0


def _summary(args: argparse.Namespace) -> Summary:
    _require_existing(args.paths)
    paths = [path for path in args.paths or _default_paths() if path.exists()]
    since = 0.0 if args.since is None else parse_since(args.since, time.time())
    return records.summarize(paths, since, getattr(args, "by", None))


def _print_report(summary: Summary, args: argparse.Namespace, paths: Sequence[Path], top: int | None) -> None:
    if not summary.kernels:
        newer = "" if args.since is None else f" since {args.since}"
        print(f"no misses recorded in {_quoted(paths)}{newer}")
        _say_broken(summary.broken)
        return
    rows = summary.kernels if args.by is None else summary.groups
    print(_kernel_table(rows[:top]) if args.by is None else _group_table(rows[:top], args.by))
    if left := rows[len(rows[:top]) :]:
        lost = sum(tally.seconds for tally in left)
        print(f"and {len(left)} more, {lost:.2f} s (--top 0 shows all)")
    kernels, processes = count(len(summary.kernels), "kernel"), count(len(summary.processes), "process")
    waited = sum(tally.waited for tally in summary.kernels)
    waiting = f", {waited:.2f} s of them waiting for another process to compile" if waited >= 0.01 else ""
    print(f"\n{kernels}, {processes}, {summary.seconds:.2f} s lost in all{waiting}")
    _say_broken(summary.broken)
    _print_steps(summary, args, paths)


def _kernel_table(kernels: Sequence[Tally]) -> str:
    header = [
        "seconds",
        "compile",
        "waiting",
        "processes",
        "size",
        "target",
        "resolved by",
        "model",
        "caller",
        "kernel",
    ]
    rows = [
        [
            f"{kernel.seconds:.2f}",
            f"{kernel.compiled:.2f}",
            f"{kernel.waited:.2f}",
            str(len(kernel.processes)),
            size(kernel.bytes),
            kernel.spec["target"],
            ", ".join(sorted(kernel.resolved_by)),
            _first(kernel.models),
            _first(kernel.callers).rpartition("/")[2],
            kernel.name,
        ]
        for kernel in kernels
    ]
    empty = {header[column] for column in (2, 7) if all(row[column] in ("", "0.00") for row in rows)}
    kept = [column for column, name in enumerate(header) if name not in empty]
    cells = [[row[column] for column in kept] for row in rows]
    return table([header[column] for column in kept], cells, right="seconds,compile,waiting,processes,size")


def _group_table(groups: Sequence[Tally], by: str) -> str:
    header = ["seconds", "compile", "waiting", "processes", "kernels", by]
    rows = [
        [
            f"{group.seconds:.2f}",
            f"{group.compiled:.2f}",
            f"{group.waited:.2f}",
            str(len(group.processes)),
            str(len(group.kernels)),
            group.name or "(no tag)",
        ]
        for group in groups
    ]
    return table(header, rows, right="seconds,compile,waiting,processes,kernels")


def _first(sums: dict[str, float]) -> str:
    """The costliest of some names, and how many more there are."""
    names = [name for name in records.costliest(sums) if name]
    return "" if not names else names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")


def _print_steps(summary: Summary, args: argparse.Namespace, paths: Sequence[Path]) -> None:
    print("\nWhat to do, most seconds first:")
    in_set: list[Tally] = []
    found = advice.steps(summary.kernels)
    for number, step in enumerate(found, 1):
        share = f" ({100 * step.seconds / summary.seconds:.0f} %)" if summary.seconds else ""
        more = f", and {len(step.reasons) - 1} like it" if len(step.reasons) > 1 else ""
        print(f"{number}. {step.what}")
        print(f"   {step.seconds:.2f} s{share}, {count(len(step.kernels), 'kernel')}: {step.reasons[0]}{more}")
        if step.what == advice.INSTALL:
            in_set = advice.in_core(step.kernels)
            lost = sum(kernel.reasons[advice.NOT_INSTALLED] for kernel in in_set)
            print(f"   its core set has {len(in_set)} of these {len(step.kernels)}, {lost:.2f} s")
        if step.what == advice.ADD:
            since = f"--since {shlex.quote(args.since)} " if args.since else ""
            named = f" {_quoted(args.paths)}" if args.paths else ""
            print("   all of them: the command below; those that are worth their bytes:")
            print(f"   flashinfer misses suggest {since}--budget 5MB --out mine.toml{named}")
    covered = {id(kernel) for kernel in in_set if set(kernel.reasons) == {advice.NOT_INSTALLED}}
    missing = [kernel for kernel in summary.kernels if id(kernel) not in covered]
    if not missing:
        return
    add = " ".join(f"--add {shlex.quote(str(path))}" for path in paths)
    older = ", and whatever else the records have from before" if args.since else ""
    print(f"\nTo have them precompiled{older}:")
    command, then = _build(add, sorted({kernel.spec["target"] for kernel in missing}))
    print(f"  {command}\n{then}")


def _build(what: str, names: Sequence[str]) -> tuple[str, str]:
    """The command that adds kernels to the set in use, or to a new one, and what is left to do then."""
    in_use = env.AOT_PATH.get()
    out = shlex.quote(str(in_use[0])) if in_use else "my_kernels"
    then = "" if in_use else f"; then package it, or let processes find it with {env.AOT_PATH.name}={out}"
    command = f"flashinfer aot build {what} --target {shlex.quote(','.join(names))} --out {out}"
    return command, f"which adds them to whatever the folder holds{then}"


# -------------------------------------------------------------------------------------------------------------- suggest


def _suggest(args: argparse.Namespace) -> int:
    budget = parse_size(args.budget)
    names = () if args.target is None else targets.named(args.target)
    summary = _summary(args)
    if not summary.kernels:
        raise UsageError(f"no misses recorded in {_quoted(args.paths or _default_paths())}: nothing to suggest from")
    by_processes = args.save == "processes"
    found = suggest.suggest(summary, budget, names, by_processes=by_processes, every_reason=args.all, cache=_cache())
    said = _said(found, summary, args)
    command, then = _build(f"--config {shlex.quote(str(args.out or 'FILE'))}", found.targets)
    of_rows = [*said, f"build: {command}"] if found.chosen else said
    toml = "".join(f"# {line}\n" for line in of_rows) + "\n" + _suggested_rows(found, summary)
    if args.html is not None:
        _write_page(args.html, summary, found, budget)
    if args.out is None:
        print(toml.rstrip("\n"))
        return 0
    args.out.write_text(toml, encoding="utf-8")
    if found.chosen:
        print(_suggested_table(found.chosen[:_TOP]))
        if len(found.chosen) > _TOP:
            print(f"and {len(found.chosen) - _TOP} more")
        print()
    print("\n".join(said))
    if found.chosen:
        print(f"\nNext: {command}\n{then}")
    return 0


def _said(found: Suggestion, summary: Summary, args: argparse.Namespace) -> list[str]:
    of = f"{count(len(found.chosen), 'kernel')} of {len(found.all)}"
    saved = _percent(found.seconds, summary.seconds)
    lines = [
        f"{of}, {size(found.bytes)} of {size(parse_size(args.budget))}, for {','.join(found.targets)}",
        f"saved: {found.seconds:.2f} of {summary.seconds:.2f} s of cold starts ({saved:.1f} %), "
        f"{_rest(saved):.1f} % remain",
        f"{found.processes_without_misses} of {count(len(summary.processes), 'process')} would miss nothing",
    ]
    smallest = min((one.bytes for one in found.all), default=0)
    more = _percent(found.bound - found.value, found.value)
    if smallest > parse_size(args.budget):
        lines.append(f"nothing fits the budget: the smallest takes {size(smallest)}")
    elif found.bound > found.value * (1 + 1e-6):
        lines.append(f"no choice within the budget saves {more:.2g} % more {args.save}")
    else:
        lines.append(f"no choice within the budget saves more {args.save}")
    if found.unaffected >= 0.01:
        lines.append(f"{found.unaffected:.2f} s are not for a set to save: see flashinfer misses report, or --all")
    if found.unknown:
        lines.append(f"{count(found.unknown, 'kernel')} left out, which this version does not have for these targets")
    if summary.broken:
        lines.append(f"{count(summary.broken, 'unreadable line')} left out")
    return lines


def _suggested_rows(found: Suggestion, summary: Summary) -> str:
    rows, saved = [], 0.0
    for one in found.chosen:
        saved += one.seconds
        remain = _rest(_percent(saved, summary.seconds))
        about = "about " if one.is_estimate else ""
        processes = count(len(one.processes), "process")
        rows.append(f"# {one.seconds:.2f} s of {processes}, {about}{size(one.bytes)}; {remain:.1f} % remain then\n")
        rows.append(misses.to_toml([one.spec]) + "\n")
    return "".join(rows)


def _suggested_table(chosen: Sequence[Candidate]) -> str:
    rows = [
        [
            f"{one.seconds:.2f}",
            str(len(one.processes)),
            ("~" if one.is_estimate else "") + size(one.bytes),
            KernelSpec(one.spec["family"], tuple(one.spec["args"].items()), "").name,
        ]
        for one in chosen
    ]
    return table(["seconds", "processes", "size", "kernel"], rows, right="seconds,processes,size")


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def _rest(percent: float) -> float:
    """Not -0.0, where sums in another order are more than all."""
    return max(0.0, 100 - percent)


def _cache() -> Path | None:
    folder = cache_dir.preferred()
    return None if folder is None else folder / "jit"


def _write_page(file: Path, summary: Summary, found: Suggestion, budget: int | None = None) -> None:
    from flashinfer.cli import _misses_page

    file.write_text(_misses_page.page(summary, found, budget), encoding="utf-8")
    print(f"charts: {file}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------------ all


def _quoted(paths: Sequence[Path]) -> str:
    return " ".join(shlex.quote(str(path)) for path in paths)


def _say_broken(broken: int) -> None:
    if broken:
        print(f"{count(broken, 'line')} could not be read (a process killed while writing) and {_is(broken)} left out")


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _as_toml(summary: Summary, top: int | None) -> str:
    """Rows for a file of aot_configs/, each under a comment that says what it would save."""
    merged: dict[str, list[Tally]] = {}
    for tally in summary.kernels:
        merged.setdefault(tally.name, []).append(tally)  # a row is for every target
    lines = [f"# {count(summary.broken, 'unreadable line')} left out"] if summary.broken else []
    for same in list(merged.values())[:top]:
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
    if args.paths:
        named = list(dict.fromkeys(file.absolute() for path in args.paths for file in records.files(path)))
        files = [file for file in named if records.holds_any(file)]  # of all before one is deleted
    else:
        named = files = [file for path in _default_paths() for file in records.files(path) if file.exists()]
    for file in files:
        file.unlink(missing_ok=True)  # a process that still runs begins a new one
    print(f"{count(len(files), 'record file')} deleted")
    if others := [file for file in named if file not in files]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        print(f"left alone, for no miss record begins it: {_quoted(others[:3])}{more}")
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
