# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of operators on rows: groups of cases, each timed beside what it replaces, and the bandwidths of all."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import (
    DEVICE,
    Times,
    device_us,
    environment,
    parser_of,
    print_failures,
    print_table,
    run,
    table,
    write_results,
)
from results import Table

Call = Callable[[], Any]
Row = tuple[str, str, int, list[Call], list[Call]]  # operator, shape, bytes, calls, those it replaces
CEILING = "copy (ceiling): 1 GiB"


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)


def time_of(calls: list[Call]) -> float:
    """Enough calls to a CUDA graph that its own launch does not count."""
    return device_us(calls * -(-16 // len(calls)) if DEVICE == "cuda" else calls)


def main(
    doc: str | None,
    cases: dict[str, list[Any]],
    rows: dict[str, Callable[[Any], Iterator[Row]]],
    replaced: str = "replaces",
    prefix: str = "",
) -> None:
    """cases, rows: by group, what `rows` makes one or several of. replaced: the title of the times of what is replaced;
    prefix: of the groups in files of results."""

    def measure(args: argparse.Namespace, times: Times) -> None:
        for group in args.only.split(","):
            for size in cases[group]:
                with times.noting(f"{group} {size}"):
                    torch.manual_seed(0)
                    for row in rows[group](size):
                        _measure_row(times, group, row, may_fail=replaced != "replaces")
        if DEVICE == "cuda":
            source, target = (torch.empty(1 << 30, dtype=torch.int8, device=DEVICE) for _ in range(2))
            times.columns["bytes"][CEILING] = 2 << 30
            times.measure(CEILING, "us", time_of, [lambda: target.copy_(source)])

    parser = parser_of(doc, only=False, host=False)

    def groups(text: str) -> str:
        if not set(text.split(",")) <= cases.keys():
            raise argparse.ArgumentTypeError(f"got {text}; expected some of {','.join(cases)}")
        return text

    parser.add_argument(
        "--only", type=groups, default=",".join(cases), help=f"comma-separated, of {','.join(cases)} (default: all)"
    )
    args, ours, peers = run(parser, measure)
    shown: list[list[object]] = []
    for case, us in ours.columns["us"].items():
        bandwidth = ours.columns["bytes"][case] / us * 1e-6
        shown.append([*case.split(": "), us, bandwidth, ours.us(case, "replaced"), *(p.us(case, "us") for p in peers)])
    header = ["operator", "shape", "us", "TB/s", f"{replaced} us", *(f"{peer.library} us" for peer in peers)]
    print_table(environment(), header, shown)
    print_failures([ours, *peers])
    write_results(args, {f"{prefix}{group}": _table(group, ours, peers) for group in args.only.split(",")})


def _measure_row(times: Times, group: str, row: Row, may_fail: bool) -> None:
    """may_fail: what a call replaces is another library's."""
    name, shape, num_bytes, calls, replaced = row
    case = f"{name}: {shape}"
    for column in ("bytes", group):
        times.columns.setdefault(column, {})[case] = num_bytes
    times.measure(case, "us", time_of, calls)
    if replaced and not times.is_peer:
        try:
            times.measure(case, "replaced", time_of, replaced)
        except Exception as error:  # whatever another library raises
            if not may_fail:
                raise
            times.failures.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")


def _table(group: str, ours: Times, peers: list[Times]) -> Table:
    def others(case: str) -> dict[str, float]:
        replaced = {"replaced": ours.us(case, "replaced")} if case in ours.columns.get("replaced", {}) else {}
        return {**{peer.library: peer.us(case, "us") for peer in peers}, **replaced}

    cases = ours.columns[group].items()
    return table("us", [(case, ours.us(case, "us"), others(case), {"bytes": size}) for case, size in cases])
