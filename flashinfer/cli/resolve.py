# SPDX-License-Identifier: Apache-2.0
"""`flashinfer resolve`: a dry run. Which store would answer each kernel of a config, and why the earlier ones not."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

from flashinfer.cli import _requests
from flashinfer.cli._text import count, table
from flashinfer.jit.resolver import make_resolver
from flashinfer.jit.source import render
from flashinfer.jit.stores import Answer, Hit

_COMPILE = "compile"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "resolve",
        help="which store would answer each kernel of a config, and why not",
        description="Dry run: which store would answer each kernel of a config, and why the ones before it would not. "
        "Loads, compiles and records nothing. Exit code 1 if a kernel would be compiled.",
        examples=(
            "resolve --config core",
            "resolve --config mine.toml --target sm_90a",
            "resolve --config core --require aot --problems",
        ),
    )
    _requests.add_arguments(parser)
    parser.add_argument(
        "--require",
        choices=("any", "aot"),
        default="any",
        help="what counts as answered: any store (default), or precompiled kernels alone",
    )
    parser.add_argument("--problems", action="store_true", help="list only what is not answered by precompiled kernels")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    resolver = make_resolver()
    rows = []
    for spec in _requests.requested(args):
        hit, reasons = _summary(resolver.explain(spec))
        store, source = (hit.store, hit.source) if hit is not None else (_COMPILE, render(spec))
        implementation = source.implementation.header
        rows.append(
            {
                "kernel": spec.name,
                **spec.to_dict(),
                "answer": store,
                "implementation": implementation,
                "reasons": reasons,
            }
        )
    answers = Counter(row["answer"] for row in rows)
    if args.json:
        print(json.dumps({"kernels": rows, "answers": answers}, indent=1))
    else:
        shown = [row for row in rows if row["answer"] != "aot"] if args.problems else rows
        if shown:
            cells = [
                [row["answer"], row["target"], row["implementation"], "; ".join(row["reasons"]), row["kernel"]]
                for row in shown
            ]
            print(table(["answer", "target", "implementation", "why not before", "kernel"], cells) + "\n")
        summary = [f"{answers[store]} {words}" for store, words in _WORDS.items() if answers[store]]
        print(f"{count(len(rows), 'kernel')}: {', '.join(summary)}")
    answered = answers["aot"] + (answers["jit-cache"] if args.require == "any" else 0)
    return 0 if answered == len(rows) else 1


_WORDS = {"aot": "precompiled", "jit-cache": "in the JIT cache", _COMPILE: "to be compiled"}


def _summary(answers: list[tuple[str, Answer]]) -> tuple[Hit | None, list[str]]:
    """What the first store that has it answers, and the reasons of those before it."""
    reasons: list[str] = []
    for store, answer in answers:
        if isinstance(answer, Hit):
            return answer, reasons
        reasons.append(f"{store}: {answer.reason}")
    return None, reasons
