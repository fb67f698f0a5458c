# SPDX-License-Identifier: Apache-2.0
"""`flashinfer aot build | merge | config | recipes | list | verify | sign | sbom`: sets of precompiled kernels."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flashinfer import env, packages
from flashinfer.cli import UsageError, _text
from flashinfer.errors import ToolchainMissing
from flashinfer.jit import trust
from flashinfer.jit.stores import AotStore, Registry

if TYPE_CHECKING:
    from flashinfer.aot.build import Plan
    from flashinfer.aot.estimate import Estimate
    from flashinfer.aot.kernel_set import Built, Failure
    from flashinfer.jit.spec import KernelSpec

_MAX_LISTED = 10  # of kernels that nobody uses; verify lists all


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "aot",
        help="build, merge, list, verify and sign precompiled kernels",
        description="Sets of precompiled kernels: folders with a registry.json. docs/packaging.md tells the whole way.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser(
        "build",
        help="compile the kernels that configs ask for into a folder",
        description="Compile the kernels that configs and miss records ask for into a folder; what is up to date there "
        "is not compiled again. Takes neither a GPU nor torch. Exit code 1 if a kernel does not compile.",
        examples=(
            "aot build --config core --target native --out my_kernels",
            "aot build --config core --target sm_80,sm_90a --out my_kernels --dry-run",
            "aot build --add /collected/misses --target sm_90a --out my_kernels",
        ),
    )
    _add_build_arguments(build)
    merge = commands.add_parser(
        "merge",
        help="join sets of several machines: shards of a config, or targets",
        description="Copy the kernels of several sets into one. Sets that contradict each other are an error, and "
        "change nothing.",
        examples=("aot merge shard-1 shard-2 --out my_kernels",),
    )
    merge.add_argument("paths", nargs="+", type=_path, metavar="SET", help="folders with a registry.json")
    merge.add_argument(
        "--out", required=True, type=_path, metavar="DIR", help="folder of the joint set; what it holds stays there"
    )
    merge.set_defaults(run=merge_sets)
    config = commands.add_parser(
        "config",
        help="write the [[model]] row of a model's config.json",
        description="Print the row of a model, to be appended to a config. What a row cannot express is said below it.",
        examples=("aot config --from-hf Qwen2.5-7B-Instruct/config.json --tp 1,2 >> mine.toml",),
    )
    config.add_argument(
        "--from-hf", required=True, type=_path, metavar="PATH", help="a config.json of Hugging Face, or its folder"
    )
    config.add_argument("--tp", default="1", metavar="N,N", help="degrees of tensor parallelism to serve (default: 1)")
    config.add_argument("--name", help="of the row (default: as the file or its folder is called)")
    config.set_defaults(run=write_row)
    recipes = commands.add_parser(
        "recipes",
        help="write how kernels are compiled, for programs in C++",
        description="Write the file by which programs in C++ compile what no set holds: JitOptions::recipes.",
        examples=("aot recipes --target sm_80,sm_90a --out recipes.json",),
    )
    recipes.add_argument("--target", required=True, metavar="T,T", help="of GPUs: for example sm_80,sm_90a")
    recipes.add_argument("--out", required=True, type=_path, metavar="FILE", help="the file, for JitOptions::recipes")
    recipes.set_defaults(run=write_recipes)
    for name, run, text in (
        ("list", list_kernels, "what the registries hold"),
        ("verify", verify, "check files, machine code and digests against the registry and this package"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            examples=(f"aot {name}", f"aot {name} my_kernels"),
        )
        command.add_argument("paths", nargs="*", type=Path, help="folders with a registry.json (default: those in use)")
        if name == "list":
            command.add_argument("--kernels", action="store_true", help="a line per kernel rather than per family")
        else:
            command.add_argument(
                "--key",
                type=_path,
                metavar="PUBLIC",
                help=f"check the signature: a public key, or a folder of them (default: {env.AOT_TRUST.name})",
            )
        command.set_defaults(run=run)
    sign = commands.add_parser(
        "sign",
        help="sign a set, for those that trust a key and not a folder",
        description="Write the Ed25519 signature of a set's registry beside it. A build or merge takes it off again.",
        examples=("aot sign my_kernels --key release.key",),
    )
    sign.add_argument("path", type=_path, metavar="SET", help="folder with a registry.json")
    sign.add_argument("--key", required=True, type=_path, metavar="KEY", help="a private key of Ed25519 in PEM")
    sign.set_defaults(run=sign_set)
    sbom = commands.add_parser(
        "sbom",
        help="write what is in a wheel beside it: CycloneDX in JSON",
        description="Write the bill of materials of each wheel, as CycloneDX in JSON, beside it: WHEEL.cdx.json.",
        examples=("aot sbom dist/flashinfer-0.1.0-py3-none-any.whl",),
    )
    sbom.add_argument("wheels", nargs="+", type=_path, metavar="WHEEL", help="of flashinfer or flashinfer-aot")
    sbom.set_defaults(run=write_sboms)


# ---------------------------------------------------------------------------------------------------------------- build


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="a TOML file, or core or smoke; may be repeated"
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        type=_path,
        metavar="MISSES",
        help="miss records, a .jsonl file or a folder",
    )
    parser.add_argument(
        "--target",
        metavar="T,T",
        help="for example sm_80,sm_90a,x86-64-v3; native for those of this machine. --config and --add take it",
    )
    parser.add_argument(
        "--out", required=True, type=_path, metavar="DIR", help="folder of the set; what it holds already stays there"
    )
    parser.add_argument(
        "--exact", action="store_true", help="have the set hold just what is asked for, and list what that removes"
    )
    parser.add_argument(
        "--refresh", action="store_true", help="compile anew what the set holds of other sources, or damaged"
    )
    parser.add_argument("--jobs", default="auto", help="compile processes at a time (default: by cores and memory)")
    parser.add_argument("--max-bytes", metavar="N", help="fail when the machine code of the set is larger (50M, 2G)")
    parser.add_argument(
        "--shard", metavar="I/N", help="build the I-th of N parts that take equally long; `aot merge` joins them"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be compiled and removed and what it would take, and stop"
    )
    parser.set_defaults(run=build)


def _path(text: str) -> Path:
    if not text:  # an unset variable of a shell, say; pathlib would take it for the current folder
        raise argparse.ArgumentTypeError("expected a path; it is empty")
    return Path(text)


def build(args: argparse.Namespace) -> int:
    """Exit status: 0, or 1 when a kernel failed to compile or the set is too large."""
    from flashinfer.aot import build as aot_build

    num_jobs = aot_build.default_jobs() if args.jobs == "auto" else _positive("--jobs", args.jobs)
    max_bytes = None if args.max_bytes is None else _text.parse_size(args.max_bytes)
    specs = _requested(args)
    if args.shard is not None:
        specs = _shard(args.shard, specs)

    def announce(todo: aot_build.Plan) -> None:
        others = f"; {_text.count(len(todo.kept), 'other')} kept" if todo.kept else ""
        part = f" of shard {args.shard}" if args.shard else ""
        print(
            f"{_text.count(todo.num_requested, 'kernel')}{part}: {len(todo.fresh)} up to date, "
            f"{len(todo.to_compile)} to compile with {_text.count(num_jobs, 'job')}{_outlook(todo, num_jobs)}{others}",
            flush=True,
        )

    how = {"exact": args.exact, "refresh": args.refresh, "is_part": args.shard is not None}
    try:
        if args.dry_run:
            todo = aot_build.plan(specs, args.out, **how)
            announce(todo)
            print(_summary(todo.known, ahead=todo.forecast.estimates))
            _print_origins(todo)
            _print_removed("would remove", todo.removed, todo.dropped)
            _print_unusable(args.out, todo)
            _print_lacking(todo.to_compile)
            aot_build.check_size(todo, todo.known, max_bytes)
            aot_build.check_forecast(todo, max_bytes)
            return 0
        report = aot_build.build(specs, args.out, **how, num_jobs=num_jobs, max_bytes=max_bytes, on_plan=announce)
    except aot_build.SetTooLarge as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_summary(report.built, failures=report.failures))
    _print_removed("removed", report.removed, report.dropped)
    removed = f", {len(report.removed)} removed" if report.removed else ""
    print(
        f"{_text.count(len(report.built), 'kernel')}, {_text.size(report.bytes)}, in {args.out}; "
        f"{report.num_compiled} compiled in {report.seconds:.1f} s{removed}"
    )
    for one in report.built:
        if one.spill_bytes:
            print(f"spills {one.spill_bytes} bytes of registers: {one.entry.name} ({one.entry.target})")
    _print_unusable(args.out, report.plan)
    for failure in report.failures:
        print(f"\nfailed: {failure.name} ({failure.target})\n{failure.error}", file=sys.stderr)
    if report.failures and args.exact:
        print("\nnothing was removed, because kernels failed", file=sys.stderr)
    return 1 if report.failures else 0


def _requested(args: argparse.Namespace) -> list[KernelSpec]:
    """The kernels of configs and records. Raises UsageError, ConfigError or UnsupportedConfig when there is none."""
    from flashinfer.aot import tools
    from flashinfer.aot.config import read_specs

    if args.shard is not None and args.refresh:
        raise UsageError("--shard is for --config and --add; --refresh is about what the set of one machine holds")
    if not args.config and not args.add:
        if not args.refresh:
            raise UsageError("nothing to build: name a --config (core, smoke or a file) or miss records with --add")
        if args.target is not None:
            raise UsageError("--target is for --config and --add; --refresh is about every target of the set")
        return []
    if args.target is None:
        raise UsageError("--target is missing; expected for example sm_80,sm_90a,x86-64-v3")
    target_names = tools.target_names(args.target)
    if packages.requirement("tomli") and packages.is_missing("tomli"):
        tools.check(target_names)  # which names it among all that is missing
    return read_specs(args.config, target_names, args.add)


def _outlook(todo: Plan, num_jobs: int) -> str:
    if not todo.to_compile:
        return ""
    seconds = todo.forecast.seconds / num_jobs
    took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f", about {took} and {_text.size(todo.forecast.bytes)} ({_text.size(todo.forecast.packed_bytes)} in a wheel)"


_ORIGINS = {
    "last build": "from their last build here",
    "measured": "measured elsewhere",
    "alike": "from the most alike kernel that was measured",
    "guess": "guessed, since their family was not measured",
}


def _print_origins(todo: Plan) -> None:
    origins = [f"{count} {_ORIGINS[origin]}" for origin, count in todo.forecast.origins()]
    if origins:
        print(f"~ estimates, seconds of a processor and bytes: {', '.join(origins)}")


def _shard(text: str, specs: list[KernelSpec]) -> list[KernelSpec]:
    from flashinfer.aot import estimate

    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard is {text!r}; expected I/N with I from 1 to N, such as 2/8")
    return estimate.shard(specs, int(match[1]), int(match[2]))


def _print_removed(verb: str, removed: Sequence[Built], dropped: Sequence[Built]) -> None:
    for one in removed:
        print(f"{verb}: {one.entry.name} ({one.entry.target})")
    if dropped:
        print(f"{verb}: {_text.count(len(dropped), 'kernel')} that builds which did not end had left behind")


def _print_unusable(out: Path, todo: Plan) -> None:
    if not todo.unusable:
        return
    print(
        f"kept, but never used by this version, {len(todo.unusable)}; --refresh compiles what it can anew, --exact "
        f"drops what is not asked for:"
    )
    for name, target in list(todo.unusable)[:_MAX_LISTED]:
        print(f"  {name} ({target}): {todo.unusable[name, target]}")
    if len(todo.unusable) > _MAX_LISTED:
        print(f"  ... and {len(todo.unusable) - _MAX_LISTED} more: flashinfer aot verify {shlex.quote(str(out))}")


def _print_lacking(to_compile: Iterable[KernelSpec]) -> None:
    from flashinfer.aot import tools

    try:
        tools.check({spec.target for spec in to_compile})
    except ToolchainMissing as error:
        print(f"warning: {error}", file=sys.stderr)


def _positive(option: str, text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise UsageError(f"{option} is {text!r}; expected auto or a positive number")
    return int(text)


def _summary(
    built: Iterable[Built],
    ahead: Mapping[KernelSpec, Estimate] = MappingProxyType({}),
    failures: Iterable[Failure] = (),
) -> str:
    """A row per family and target; with what is ahead, what that will take and what there will be."""
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0, 0.0, 0])
    for one in built:
        row = rows[one.entry.target, one.entry.family]
        row[0] += 1
        row[3] += 0.0 if ahead else one.seconds
        row[4] += one.entry.bytes
    for spec, estimate in ahead.items():
        row = rows[spec.target, spec.family]
        row[1] += 1
        row[3] += estimate.seconds
        row[4] += estimate.bytes
    for failure in failures:
        rows[failure.target, failure.name.split("-")[0]][2] += 1
    total = [sum(row[i] for row in rows.values()) for i in range(5)]
    lines = []
    for key, row in [*sorted(rows.items()), (("total", ""), total)]:
        about = "~" if row[1] else ""
        lines.append((*key, *(f"{count:.0f}" for count in row[:3]), f"{about}{row[3]:.1f}", about + _text.size(row[4])))
    columns = ("target", "family", "kernels", "to compile", "failed", "seconds", "bytes")
    shown = [0, 1, 2, *([3] if total[1] else []), *([4] if total[2] else []), 5, 6]
    header, cells = [columns[i] for i in shown], [[line[i] for i in shown] for line in lines]
    return _text.table(header, cells, right=",".join(columns[2:]))


# --------------------------------------------------------------------------------------------------------------- merge


def merge_sets(args: argparse.Namespace) -> int:
    """Join sets. Exit status 1, and nothing is changed, where two of them contradict each other."""
    from flashinfer.aot import merge

    merged = merge.merge(args.paths, args.out)
    print(_summary(merged.built))
    for root, count in merged.brought.items():
        print(f"{_text.count(count, 'kernel')} of {root}")
    size = _text.size(sum(one.entry.bytes for one in merged.built))
    print(f"{_text.count(len(merged.built), 'kernel')}, {size}, in {args.out}")
    return 0


# --------------------------------------------------------------------------------------------------------------- config


def write_row(args: argparse.Namespace) -> int:
    """Print a row for a config; what it does not say goes to stderr too. Exit status 1 where the model has no row."""
    from flashinfer.aot import hf
    from flashinfer.aot.config import why_unbuildable

    degrees = list(dict.fromkeys(_positive("--tp", text) for text in args.tp.split(",")))
    config, name = hf.read(args.from_hf)
    translation = hf.translate(config, args.name or name, degrees)
    text = hf.toml(translation)
    why = why_unbuildable(text)
    if why is not None:
        print(text, file=sys.stderr)
        print(f"flashinfer: a build of this row fails: {why}", file=sys.stderr)
        return 1
    print(text, end="")
    for note in translation.notes:
        print(f"not in this row: {note}", file=sys.stderr)
    return 0


# --------------------------------------------------------------------------------------------- list, verify, sign, sbom


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

    registries, status = _registries(args.paths, args.key or env.AOT_TRUST.get())
    for registry in registries:
        problems = find_problems(registry)
        for problem in problems:
            print(f"{problem.what}: {problem.why}")
        stale = sum(problem.stale for problem in problems)
        verdict = f"{len(problems) - stale} damaged, {stale} stale" if problems else "all sound"
        print(f"{registry.root}: {len(registry.entries)} kernels, {verdict}{_signature(registry)}")
        status |= bool(problems)
    return status


def _signature(registry: Registry) -> str:
    if registry.signer is not None:
        return f", signed with {registry.signer}"
    return ", its signature not checked (--key PUBLIC)" if (registry.root / trust.SIGNATURE).exists() else ""


def write_recipes(args: argparse.Namespace) -> int:
    from flashinfer.aot import recipes, tools

    target_names = tools.target_names(args.target)
    count = recipes.write(args.out, target_names)
    print(f"{args.out}: recipes of {_text.count(count, 'kernel')}, {_text.size(args.out.stat().st_size)}")
    return 0


def sign_set(args: argparse.Namespace) -> int:
    """Sign a set. Exit status 1, and the set is as it was, where it is damaged or the key is none of Ed25519."""
    from flashinfer.aot.signing import sign

    count = sign(args.path, args.key)
    print(f"{_text.count(count, 'kernel')} signed: {args.path / trust.SIGNATURE}")
    return 0


def write_sboms(args: argparse.Namespace) -> int:
    """Write the bill of materials of each wheel. Exit status 1 for a file that is none of ours."""
    from flashinfer.aot import sbom

    for wheel in args.wheels:
        print(sbom.write(wheel))
    return 0


def _registries(paths: Sequence[Path], trusted: Path | None = None) -> tuple[list[Registry], int]:
    """Registries of the given folders, or those in use; and 1 as exit status when one is missing, unreadable, or not
    signed with a trusted key."""
    roots = list(paths) or AotStore().roots()
    if not roots:
        raise UsageError("no kernel registry is installed; pip install 'flashinfer[aot]', or set FLASHINFER_AOT_PATH")
    registries, status = [], 0
    for root in roots:
        try:
            registries.append(Registry(root, trusted))
        except (OSError, ValueError) as error:
            what = "not trusted" if isinstance(error, trust.Untrusted) else "no usable registry"
            print(f"{root}: {what}: {error}", file=sys.stderr)
            status = 1
    return registries, status
