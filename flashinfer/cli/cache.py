# SPDX-License-Identifier: Apache-2.0
"""`flashinfer cache`: what the JIT cache holds, and making room in it."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashinfer.cli import UsageError
from flashinfer.cli._text import ago, count, parse_size, size, table
from flashinfer.jit import cache_dir
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import JitCache

# A folder is filled within milliseconds of the end of its compile; one untouched for an hour has lost its process.
_STALE_SECONDS = 3600.0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "cache", help="list and shrink the JIT cache", description="The kernels compiled on this machine."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    listing = commands.add_parser(
        "list", help="what the cache holds", description="Most recently used first.", examples=("cache list",)
    )
    listing.add_argument("--json", action="store_true", help="one JSON object")
    listing.set_defaults(run=_list)
    collect = commands.add_parser(
        "gc",
        help="evict the least recently used",
        description="Remove the least recently used kernels until the cache fits, and what killed processes left "
        "behind. Safe while others use the cache: at worst they compile again.",
        examples=("cache gc --max-size 1G --dry-run", "cache gc --max-size 500M"),
    )
    collect.add_argument("--max-size", required=True, metavar="SIZE", help="such as 500M or 1G")
    collect.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    collect.set_defaults(run=_gc)
    clear = commands.add_parser(
        "clear",
        help="remove every kernel",
        description="Remove every compiled kernel. Miss records stay.",
        examples=("cache clear",),
    )
    clear.set_defaults(run=_clear)


@dataclass(frozen=True)
class _Artifact:
    folder: Path
    name: str
    target: str
    compiler: str
    bytes: int
    last_used: float


def _list(args: argparse.Namespace) -> int:
    cache = _cache()
    artifacts = sorted(_artifacts(cache), key=lambda artifact: -artifact.last_used)
    total = sum(artifact.bytes for artifact in artifacts)
    if args.json:
        rows = [{**vars(artifact), "folder": str(artifact.folder)} for artifact in artifacts]
        print(json.dumps({"root": str(cache.root), "bytes": total, "kernels": rows}, indent=1))
        return 0
    if artifacts:
        now = time.time()
        rows_ = [
            [size(entry.bytes), ago(now - entry.last_used), entry.target, entry.compiler, entry.name]
            for entry in artifacts
        ]
        print(table(["size", "used", "target", "compiler", "kernel"], rows_, right="size,used") + "\n")
    print(f"{count(len(artifacts), 'kernel')}, {size(total)} in {cache.root}")
    return 0


def _gc(args: argparse.Namespace) -> int:
    limit = parse_size(args.max_size)
    cache = _cache()
    artifacts = list(_artifacts(cache))
    total = sum(artifact.bytes for artifact in artifacts)
    kept = total
    evicted = []
    for artifact in artifacts:  # least recently used first
        if kept <= limit:
            break
        evicted.append(artifact)
        kept -= artifact.bytes
    leftovers = list(cache.leftovers(_STALE_SECONDS))
    if not args.dry_run:
        for artifact in evicted:
            cache.remove(artifact.folder)
        _sweep(leftovers)
    verb = "would be removed" if args.dry_run else "removed"
    for artifact in evicted:
        print(f"{artifact.name} {artifact.target} ({size(artifact.bytes)})")
    print(
        f"{count(len(evicted), 'kernel')} and {count(len(leftovers), 'leftover')} {verb}, {size(total - kept)} in all"
    )
    print(f"{count(len(artifacts) - len(evicted), 'kernel')}, {size(kept)} in {cache.root}")
    return 0


def _clear(args: argparse.Namespace) -> int:
    cache = _cache()
    folders = list(cache.folders())
    for folder in folders:
        cache.remove(folder)
    _sweep(cache.leftovers(_STALE_SECONDS))
    shutil.rmtree(cache.root.parent / "failed", ignore_errors=True)
    print(f"{count(len(folders), 'kernel')} removed from {cache.root}")
    return 0


def _cache() -> JitCache:
    folder = cache_dir.preferred()
    if folder is None:
        raise UsageError("the cache directory is unknown: {}; next step: {}".format(*cache_dir.unknown()))
    return JitCache(folder / "jit")


def _artifacts(cache: JitCache) -> Iterable[_Artifact]:
    """Least recently used first."""
    for folder in cache.folders():
        try:
            num_bytes = sum(file.stat().st_size for file in folder.iterdir())
            last_used = folder.stat().st_mtime
        except FileNotFoundError:  # removed by another process meanwhile
            continue
        meta = _meta(folder)
        spec = KernelSpec(meta["family"], tuple(meta["args"].items()), meta["target"])
        yield _Artifact(folder, spec.name, spec.target, meta["compiler"], num_bytes, last_used)


def _meta(folder: Path) -> dict[str, Any]:
    damaged = {"family": "(damaged)", "args": {}, "target": "?", "compiler": "?"}
    try:
        meta = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
        alike = [type(meta.get(name)) is type(value) for name, value in damaged.items()]
        return meta if all(alike) else damaged
    except (AttributeError, OSError, ValueError):
        return damaged


def _sweep(leftovers: Iterable[Path]) -> None:
    """Delete leftovers. A lock file goes only while nobody holds it; deleting one that a process is just opening costs
    that process a duplicate compile, no more."""
    import filelock

    for path in leftovers:
        if path.suffix != ".lock":
            shutil.rmtree(path, ignore_errors=True)
            continue
        try:
            with filelock.FileLock(str(path)).acquire(timeout=0):
                path.unlink(missing_ok=True)
        except (OSError, NotImplementedError):
            continue
