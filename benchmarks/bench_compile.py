# SPDX-License-Identifier: Apache-2.0
"""Cold compile time of every kernel family, one by one, as a first request at run time meets it.

    python benchmarks/bench_compile.py [--target sm_90a] [--config aot_configs/smoke.toml] [--limit 8] [--json]

Or what a build of a whole config takes, kernel by kernel, for flashinfer/aot/figures.json, from which
`flashinfer aot build --dry-run` estimates. SET is the folder that it builds in; what lies there is not compiled again.

    python benchmarks/bench_compile.py --figures SET --target sm_80,sm_90a,sm_100f,sm_120f,x86-64-v3

Or what a server without precompiled kernels waits for at its start: decode, what is compiled beside it, and what is
asked for later, of Llama-3-8B in bf16.

    python benchmarks/bench_compile.py --start [--target sm_90a]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from common import environment, git_commit, parse, print_table, table, write_results

from flashinfer import target as targets
from flashinfer.aot import build, estimate
from flashinfer.aot.config import read_specs
from flashinfer.attention.served import beside_decode
from flashinfer.families import page, sampling
from flashinfer.families.attention import decode
from flashinfer.jit import KernelSpec
from flashinfer.jit.ahead import Ahead
from flashinfer.jit.source import render
from flashinfer.jit.toolchain import toolchain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--limit", type=int, default=8, help="kernels per family (default 8)")
    parser.add_argument("--figures", type=Path, metavar="SET", help="build in this folder, and write the figures")
    parser.add_argument("--start", action="store_true", help="the kernels of a server's start, as it compiles them")
    args = parse(parser)
    os.environ["CUDA_CACHE_DISABLE"] = "1"  # NVRTC's own, on machines with a driver: it would remember the last run
    if args.figures is not None:
        write_figures(args)
        return
    if args.start:
        start_a_server(args.target)
        return
    compiler = toolchain(targets.kind(args.target))
    print("compiler:", compiler.identity)
    by_family: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    for spec in read_specs(args.config or ["core"], [args.target]):
        if len(by_family[spec.family]) < args.limit:
            start = time.perf_counter()
            compiled = compiler.compile(render(spec))
            by_family[spec.family].append((time.perf_counter() - start, len(compiled.machine_code), spec.name))
    rows = []
    for family, entries in sorted(by_family.items()):
        seconds = [entry[0] for entry in entries]
        slowest = max(entries)
        rows.append([family, len(entries), min(seconds), max(seconds), max(entry[1] for entry in entries), slowest[2]])
    print_table(
        f"{args.target}; {environment()}",
        ["family", "kernels", "fastest s", "slowest s", "most bytes", "slowest kernel"],
        rows,
    )
    families = sorted(by_family.items())
    tables = {
        f"compile {args.target}, {word}": table(
            "s", [(f, pick(e[0] for e in entries), {}, {}) for f, entries in families]
        )
        for word, pick in (("fastest", min), ("slowest", max))
    }
    write_results(args, tables, device="cpu", compiler=compiler.identity)


def start_a_server(machine: str) -> None:
    """Who asks compiles decode, and the other kernels unless they are under way; the order is that of the resolver."""
    axes = {
        "q_dtype": "bf16", "kv_dtype": "bf16", "o_dtype": "bf16", "head_dim": 128, "head_dim_vo": 128,
        "pos_encoding": "none", "has_window": False, "has_soft_cap": False, "has_sinks": False, "variant": "none",
    }  # fmt: skip
    first = decode.decode(machine, kv_storage="paged", group_size=4, device_scales=False, **axes)
    expected = [decode.DECODE_PLAN.spec(machine), *beside_decode(machine, page_size=16, axes=axes)]
    later = [
        page.APPEND_PAGED_KV.spec(
            machine, dtype="bf16", cache_dtype="bf16", key_dim=128, value_dim=128, token_index="int32",
            page_index="int32", vec_size=8, heads_per_thread=4,
        ),
        sampling.SAMPLE_ROW.spec(
            machine, dtype="fp32", input="logits", filter="top_k_top_p",
            **sampling.placement("fp32", 128256, 1, 132, machine, True),
        ),
    ]  # fmt: skip
    compiler = toolchain("cuda")
    print("compiler:", compiler.identity)
    rows: dict[KernelSpec, list[object]] = {}

    def find(spec: KernelSpec, by: str) -> bool:
        start = time.thread_time()
        compiled = compiler.compile(render(spec))
        rows[spec] = [spec.name, by, time.thread_time() - start, len(compiled.machine_code)]
        return True

    start = time.perf_counter()
    ahead = Ahead(find)
    for spec in expected:
        ahead.start(spec, "ahead")
    asked = [first, *expected, *later]
    for spec in asked:
        ahead.take(spec) or find(spec, "who asks")
    wall = time.perf_counter() - start
    print_table(
        f"a start on {machine}; {environment()}",
        ["kernel", "compiled", "s of a processor", "bytes"],
        [rows[spec] for spec in asked],
    )
    print(f"{sum(row[2] for row in rows.values()):.2f} s of a processor, {wall:.2f} s until the last one was there")


def write_figures(args: argparse.Namespace) -> None:
    """Replace the figures of the targets, and say how far they would be off for a kernel that is not among them."""
    specs = read_specs(args.config or ["core"], targets.named(args.target))
    report = build.build(specs, args.figures)
    if report.failures:
        sys.exit(f"{len(report.failures)} kernels failed, the first: {report.failures[0].error}")
    commit = git_commit() or "unknown"  # before the figures themselves change
    for target in targets.named(args.target):
        built = [one for one in report.built if one.entry.target == target]
        about = {"compiler": built[0].entry.compiler, "commit": commit}
        estimate.write_figures(built, about)
        print(f"{target}: {len(built)} kernels, {sum(one.seconds for one in built):.0f} s of a processor")
    rows = []
    for target, families in sorted(estimate.figures().items()):
        for family, measured in sorted(families.items()):
            if len(measured) > 1:
                rows.append([target, family, len(measured), *_left_out(list(measured.values()))])
    print_table(
        "bytes of each kernel, were it not measured but its most alike one, off by (fraction)",
        ["target", "family", "kernels", "in all", "median", "worst"],
        rows,
    )


def _left_out(measured: list[estimate.Measured]) -> tuple[float, float, float]:
    guessed = [
        estimate.most_alike(axes, [*measured[:index], *measured[index + 1 :]])[1].bytes
        for index, (axes, _) in enumerate(measured)
    ]
    true = [one.bytes for _, one in measured]
    errors = [abs(guess - size) / size for guess, size in zip(guessed, true)]
    return sum(guessed) / sum(true) - 1, statistics.median(errors), max(errors)


if __name__ == "__main__":
    main()
