# SPDX-License-Identifier: Apache-2.0
"""Upstream's folders. `FLASHINFER_WORKSPACE_DIR` is one for this version, whose last two names engines use to tell
caches of their own apart; nothing is kept there. Where compiled kernels are: cache_dir.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

from flashinfer.jit import cache_dir
from flashinfer.version import __version__


def __getattr__(name: str) -> Path:
    # On first use: importing reads no environment variable.
    if name == "FLASHINFER_WORKSPACE_DIR":
        return (cache_dir.preferred() or Path(tempfile.gettempdir(), "flashinfer")) / __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
