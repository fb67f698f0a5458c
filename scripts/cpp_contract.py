#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write include/flashinfer/contract.hpp: what kernels and their hosts agree on, for hosts in C++.

    python scripts/cpp_contract.py            # after a change of a parameter struct, or of a number that hosts use
    python scripts/cpp_contract.py --check    # writes nothing; exit status 1 where the file is stale

Structs are those of csrc/, which this only asserts; numbers are those of flashinfer/families.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flashinfer import families, target  # noqa: E402
from flashinfer.families.attention import mla, mla_sm90, prefill, prefill_sm90  # noqa: E402
from flashinfer.families.attention.params import MASKS  # noqa: E402
from flashinfer.jit import description  # noqa: E402
from flashinfer.jit import spec as specs  # noqa: E402
from flashinfer.jit.stores import REGISTRY_FORMAT  # noqa: E402
from flashinfer.version import __version__  # noqa: E402

FILE = ROOT / "include" / "flashinfer" / "contract.hpp"
_NUMBERS = {
    "kShortRows": prefill.SHORT_ROWS,
    "kLongRows": prefill.LONG_ROWS,
    "kManyRows": prefill.MANY_ROWS,
    "kMaxItems": prefill.MAX_ITEMS,
    "kMaxCounters": prefill.MAX_COUNTERS,
    "kMinBoxRows": prefill_sm90.MIN_BOX_ROWS,
    "kMlaShortRows": mla.SHORT_ROWS,
    "kMlaMaxBlocks": mla.MAX_BLOCKS,
    **{f"kMask{name.title()}": number for name, number in MASKS.items()},
}
_COSTS = {
    "kPrefillCosts": prefill.COSTS,
    "kMlaCosts": mla.costs(mla.SHORT_ROWS + 1, mla.MlaParams),
    "kMlaShortCosts": mla.costs(mla.SHORT_ROWS, mla.MlaParams),
    "kMlaSm90Costs": mla.costs(mla_sm90.BLOCK_M, mla.Sm90MlaParams),
}


def text() -> str:
    families.register_all()
    structs = {one.params for family in specs.known_families() for one in family.implementations}
    ordered = sorted(structs, key=lambda params: params.__name__)
    headers = sorted({_header(params) for params in ordered})
    return "\n".join(
        [
            "// SPDX-License-Identifier: Apache-2.0",
            "// What kernels of this version and their hosts agree on. Written by scripts/cpp_contract.py from",
            "// flashinfer/families; a test compares. Structs are those of the kernels' own headers, asserted here.",
            "#pragma once",
            "",
            *(f'#include "{header}"' for header in headers),
            "",
            "namespace flashinfer {",
            "",
            f'constexpr const char* kVersion = "{__version__}";',
            f"constexpr int kRegistryFormat = {REGISTRY_FORMAT};",
            "",
            "namespace contract {",
            "",
            *(f"constexpr int {name} = {number};" for name, number in _NUMBERS.items()),
            "",
            *(_costs(name, costs) for name, costs in _COSTS.items()),
            "",
            "// Levels of a CPU, each with the flags of /proc/cpuinfo that it takes besides those before it.",
            "struct CpuLevel {",
            "  const char *name, *flags;",
            "};",
            *_levels("kX86Levels", "x86-64", target.X86_FLAGS),
            *_levels("kArmLevels", "armv8-a", target.ARM_FLAGS),
            "",
            "}  // namespace contract",
            "",
            "// The name that a registry has for a parameter struct, and for its layout.",
            "template <class Params>",
            "struct Layout;",
            "",
            "#if defined(__GNUC__)",
            "#pragma GCC diagnostic push",
            '#pragma GCC diagnostic ignored "-Winvalid-offsetof"',
            "#endif",
            *(line for params in ordered for line in _layout(params)),
            "#if defined(__GNUC__)",
            "#pragma GCC diagnostic pop",
            "#endif",
            "",
            "}  // namespace flashinfer",
            "",
        ]
    )


def _header(params: type[ctypes.Structure]) -> str:
    """Of the C++ struct: its mirror's docstring names it."""
    match = re.match(r"Mirror of csrc/([\w/]+\.h)", params.__doc__ or "")
    if match is None:
        raise ValueError(f'{params.__name__} does not say "Mirror of csrc/…"; expected that its docstring begins so')
    return match[1]


def _costs(name: str, costs: prefill.PlanCosts) -> str:
    of_item, of_partial, min_split, fills_gaps = costs
    return f"constexpr PlanCosts {name} = {{{of_item}f, {of_partial}f, {min_split}, {int(fills_gaps)}}};"


def _levels(name: str, lowest: str, flags: dict[str, set[str]]) -> list[str]:
    levels = {lowest: set(), **flags}
    rows = [f'    {{"{level}", "{" ".join(sorted(needed))}"}},' for level, needed in levels.items()]
    return [f"constexpr CpuLevel {name}[] = {{", *rows, "};"]


def _layout(params: type[ctypes.Structure]) -> list[str]:
    name = params.__name__
    asserts = [f"static_assert(sizeof({name}) == {ctypes.sizeof(params)});"]
    for field in params._fields_:
        asserts.append(f"static_assert(__builtin_offsetof({name}, {field[0]}) == {getattr(params, field[0]).offset});")
    return [
        "",
        "template <>",
        f"struct Layout<{name}> {{",
        f'  static constexpr const char* kName = "{name}";',
        f"  static constexpr uint64_t kAbi = 0x{description.abi(params)};",
        "};",
        *asserts,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the file is stale")
    if parser.parse_args().check:
        is_current = FILE.is_file() and FILE.read_text(encoding="utf-8") == text()
        print(f"{FILE.relative_to(ROOT)} is {'current' if is_current else 'stale: run scripts/cpp_contract.py'}")
        return 0 if is_current else 1
    FILE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
