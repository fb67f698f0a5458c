"""Cold compile time of every kernel family, one by one, as a first request at run time meets it.

python benchmarks/bench_compile.py [--target sm_90a] [--config aot_configs/smoke.toml] [--limit 8] [--json]
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

from common import environment, parse, print_table, table, write_results

from flashinfer import target as targets
from flashinfer.aot.config import read_specs
from flashinfer.jit.source import render
from flashinfer.jit.toolchain import toolchain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm_90a")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--limit", type=int, default=8, help="kernels per family (default 8)")
    args = parse(parser)
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


if __name__ == "__main__":
    main()
