# SPDX-License-Identifier: Apache-2.0
"""`flashinfer cpp`: where the headers for C++ are, for build systems."""

from __future__ import annotations

import argparse
from typing import Any

from flashinfer.errors import FlashInferError
from flashinfer.jit.source import include_root
from flashinfer.jit.stores import AotStore


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "cpp",
        help="where the headers for C++ are",
        description="Where the headers for C++ and C are (docs/cpp.md): cmake -Dflashinfer_DIR=$(flashinfer cpp "
        "--cmake), PKG_CONFIG_PATH=$(flashinfer cpp --pkg-config), or g++ $(flashinfer cpp --flags). Without an "
        "option, all of it.",
        examples=("cpp", "cpp --flags"),
    )
    chosen = parser.add_mutually_exclusive_group()
    for option, about in _ABOUT.items():
        chosen.add_argument(f"--{option}", dest="chosen", action="store_const", const=option, help=about)
    parser.set_defaults(run=run)


_ABOUT = {
    "flags": "flags of a compiler: include paths",
    "cmake": "folder of flashinfer-config.cmake",
    "pkg-config": "folder of flashinfer.pc",
    "source": "folder of the C interface and the benchmark programs",
    "sets": "folders of the kernel registries that Python would ask, parted by ':'",
}


def run(args: argparse.Namespace) -> int:
    kernels = include_root()
    root = kernels.parent
    found = {
        "flags": f"-I{root / 'include'} -I{kernels}",
        "cmake": root / "cpp" / "cmake",
        "pkg-config": root / "cpp" / "pkgconfig",
        "source": root / "cpp",
        "sets": ":".join(map(str, AotStore().roots())),
    }
    if args.chosen == "sets" and not found["sets"]:
        raise FlashInferError(
            "no set of kernels is installed. Next step: pip install flashinfer-aot, or flashinfer aot build --config "
            "core --target native --out DIR and FLASHINFER_AOT_PATH=DIR"
        )
    if args.chosen is not None:
        print(found[args.chosen])
        return 0
    for option, value in found.items():
        print(f"{option:<12}{value}".rstrip())
    return 0
