# SPDX-License-Identifier: Apache-2.0
"""`python -m flashinfer`: the same as the command `flashinfer`."""

from __future__ import annotations

import sys

from flashinfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
