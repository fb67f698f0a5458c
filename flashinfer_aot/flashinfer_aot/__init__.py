# SPDX-License-Identifier: Apache-2.0
"""Precompiled kernels for flashinfer: data that flashinfer finds by itself once it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def root() -> Path:
    """The folder of registry.json; the files it names lie below it."""
    return Path(__file__).resolve().parent


def registry() -> dict[str, Any]:
    """The parsed registry.json. Raises FileNotFoundError in a source tree where no set has been built."""
    data: dict[str, Any] = json.loads((root() / "registry.json").read_text())
    return data
