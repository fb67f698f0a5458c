# SPDX-License-Identifier: Apache-2.0
"""The command line of the fuzzer."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback

from tests.fuzz import runner
from tests.fuzz.call import Call, Verdict
from tests.fuzz.table import cases


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Fuzz the public functions on the CPU target."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default 0)")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME", help="functions; with one and no length, one case is told"
    )
    parser.add_argument("--count", type=int, help="cases of each function")
    parser.add_argument("--minutes", type=float, help="how long a campaign may take (default 5)")
    parser.add_argument("--narrow", action="store_true", help="few kernels, where there is no time to compile many")
    parser.add_argument("--list", action="store_true", help="the functions")
    given = parser.parse_args()
    logging.getLogger("flashinfer").setLevel(logging.WARNING)
    table = cases()
    if given.list:
        print("\n".join(table))
        return 0
    unknown = sorted(set(given.only) - set(table))
    if unknown:
        parser.error(f"unknown function {', '.join(unknown)}; --list names them")
    if len(given.only) == 1 and given.count is None and given.minutes is None:
        return _tell(given.only[0], given.seed, given.narrow)
    deadline = time.monotonic() + 60 * (given.minutes or (5 if given.count is None else 1e6))
    count = given.count or 1_000_000
    report = runner.run(given.only or list(table), given.seed, deadline, count, given.narrow, sys.stderr)
    groups = report.groups()
    for first, *others in groups:
        print(f"{first}{f'  # and {len(others)} more' if others else ''}")
    counts = report.counts
    hostile = f"{counts['refused'] + counts['returned']} hostile ones, {counts['refused']} of them refused"
    print(f"{counts['legal']} legal calls; {hostile}; {len(groups)} findings ({runner.version()})")
    return bool(groups)


def _tell(name: str, seed: int, narrow: bool) -> int:
    """One case in this process, call by call."""
    kinds = []

    def before(call: Call, text: str) -> None:
        print(f"{text}\n    {'; '.join(call.changes) or 'legal'}", flush=True)

    def after(verdict: Verdict) -> None:
        if verdict.raised is not None:
            print("    " + "    ".join(traceback.format_exception(verdict.raised)[-3:]).rstrip())
        print(f"    -> {verdict.kind or 'as expected'}{': ' + verdict.detail if verdict.kind else ''}", flush=True)
        kinds.append(verdict.kind)

    runner.limit_resources()
    runner.run_case(name, seed, narrow, before, after)
    return any(kinds)


if __name__ == "__main__":
    if "MALLOC_PERTURB_" not in os.environ:  # has to be there when the C library starts
        environment = {**os.environ, "MALLOC_PERTURB_": "165"}  # new and freed memory hold poison too
        os.execve(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]], environment)
    sys.exit(main())
