"""`flashinfer cpp`: where the headers for C++ are, for build systems."""

from __future__ import annotations

import argparse
from typing import Any

from flashinfer.jit.source import include_root


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "cpp",
        help="where the headers for C++ are",
        description="Where the headers for C++ and C are (docs/cpp.md): cmake -Dflashinfer_DIR=$(flashinfer cpp "
        "--cmake), PKG_CONFIG_PATH=$(flashinfer cpp --pkg-config), or g++ $(flashinfer cpp --flags).",
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--cmake", action="store_true", help="folder of flashinfer-config.cmake")
    chosen.add_argument("--pkg-config", action="store_true", help="folder of flashinfer.pc")
    chosen.add_argument("--flags", action="store_true", help="flags of a compiler: include paths")
    chosen.add_argument("--source", action="store_true", help="folder of the C interface and the benchmark programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    root = include_root().parent
    if args.flags:
        print(f"-I{root / 'include'} -I{include_root()}")
    else:
        print(root / "cpp" / ("cmake" if args.cmake else "pkgconfig" if args.pkg_config else ""))
