#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""List what serving engines want of flashinfer when they are imported, from the sources in their wheels.

    scripts/engine_imports.py vllm==0.33.0 sglang==0.5.23 >tests/compat/engine_imports.json

Downloads the wheels (`pip download --no-deps`, hundreds of megabytes) unless --wheels names a folder that has them, and
runs nothing of them. For each engine:

    imports    names that modules import as they are loaded, which modules and under which condition: must be there
    guarded    for each module, what each `try` imports, there or in a function: the engine does without
    probes     functions that look for names to choose a kernel, and what they look for: must work or stay absent
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "flashinfer"
PROBES = {"hasattr", "getattr", "callable", "find_spec"}
TESTS = re.compile(r"(^|/)(tests?|benchmarks?|examples)/")


def loaded(body: list[ast.stmt], when: tuple[str, ...] = ()) -> Iterator[tuple[ast.stmt, tuple[str, ...]]]:
    """The import statements that run when a module is loaded and must not fail, and under which conditions."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, when
        elif isinstance(node, ast.If):
            condition = ast.unparse(node.test)
            if "TYPE_CHECKING" not in condition:
                yield from loaded(node.body, (*when, condition))
            yield from loaded(node.orelse, (*when, f"not ({condition})"))
        elif isinstance(node, ast.Try):
            for part in (node.body if not node.handlers else [], node.orelse, node.finalbody):
                yield from loaded(part, when)
            for handler in node.handlers:
                yield from loaded(handler.body, when)
        elif isinstance(node, ast.With | ast.For | ast.While | ast.ClassDef):
            yield from loaded(node.body, when)


def attempts(tree: ast.Module) -> Iterator[list[str]]:
    """What of our package each `try` imports, at whatever depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and node.handlers:
            tried = {name for part in node.body for inner in ast.walk(part) for name in names(inner)}
            if tried:
                yield sorted(tried)


def names(node: ast.AST) -> list[str]:
    """What of our package a statement imports, in full; nothing if it is another."""
    found: list[str] = []
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        found = [f"{node.module}.{alias.name}" for alias in node.names if node.level == 0]
    return [name for name in found if name.split(".")[0] == PACKAGE]


def probe(function: ast.FunctionDef) -> list[str]:
    """The names that a function `has_…` or `is_…` looks for, as it spells them, if any is of our package."""
    if not function.name.lstrip("_").startswith(("has_", "is_")):
        return []
    nodes = list(ast.walk(function))
    called = {getattr(node.func, "id", getattr(node.func, "attr", "")) for node in nodes if isinstance(node, ast.Call)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    imported = {name for node in nodes for name in names(node)}
    looks = called & PROBES or (imported and any(isinstance(node, ast.Try) for node in nodes))
    if not looks or not (imported or any(text.split(".")[0] == PACKAGE for text in texts)):
        return []
    return sorted(imported | {text for text in texts if re.fullmatch(r"[A-Za-z_][\w.]*", text)})


def scan(wheel: Path) -> dict[str, Any]:
    imports: dict[str, list[dict[str, str]]] = defaultdict(list)
    guarded: dict[str, list[list[str]]] = {}
    probes: dict[str, list[str]] = {}
    with zipfile.ZipFile(wheel) as file:
        paths = sorted(name for name in file.namelist() if name.endswith(".py") and not TESTS.search(name))
        for path in paths:
            text = file.read(path).decode("utf-8", "replace")
            if PACKAGE not in text:
                continue
            tree = ast.parse(text)
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for node, when in loaded(tree.body):
                for name in names(node):
                    imports[name].append({"by": module, **({"if": " and ".join(when)} if when else {})})
            if tried := sorted(attempts(tree)):
                guarded[module] = tried
            for function in ast.walk(tree):
                if isinstance(function, ast.FunctionDef) and (asked := probe(function)):
                    probes[f"{module}.{function.name}"] = asked
    return {"imports": ordered(imports), "guarded": ordered(guarded), "probes": ordered(probes)}


def ordered(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in sorted(found)}


def wheel_of(engine: str, folder: Path, is_given: bool) -> Path:
    """Raises subprocess.CalledProcessError if it cannot be downloaded, ValueError if the folder does not have it."""
    project, _, version = engine.partition("==")
    if not is_given:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), engine]
        subprocess.run(command, check=True, stdout=sys.stderr)
    pattern = f"{project.replace('-', '_')}-{version or '*'}-*.whl"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} files {pattern}; expected one")
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", help="NAME==VERSION of the package index")
    parser.add_argument("--wheels", type=Path, help="a folder that has their wheels; nothing is downloaded")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.wheels or Path(temporary)
            found = {engine: scan(wheel_of(engine, folder, bool(args.wheels))) for engine in args.engines}
    except (OSError, ValueError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
