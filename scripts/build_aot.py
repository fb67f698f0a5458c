#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compile a set of kernels ahead of time: the sources of this checkout, whether it is installed or not.

    scripts/build_aot.py --config core --target sm_80,sm_90a --exact --out flashinfer_aot/flashinfer_aot
    scripts/build_aot.py --config mine.toml --add misses.jsonl --target sm_90a --out my_kernels --max-bytes 50M

A set keeps what it holds and was not asked for, unless --exact says otherwise.

The command `flashinfer aot build` by itself; docs/packaging.md tells how a folder becomes a wheel.
"""

import sys
from pathlib import Path

if sys.hexversion < 0x030A0000:
    sys.exit(f"Python is {sys.version.split()[0]}; expected 3.10 or newer. Next step: python3.12 {sys.argv[0]} …")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashinfer.cli import main

if __name__ == "__main__":
    sys.exit(main(["aot", "build", *sys.argv[1:]]))
