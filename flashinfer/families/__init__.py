# SPDX-License-Identifier: Apache-2.0
"""Kernel families: which specs can exist, their legal axes and tile tables. Data, little behaviour.

A module here never imports torch, so that the AOT build's compile processes start quickly.
"""

from __future__ import annotations

import importlib
import pkgutil


def register_all() -> None:
    """Import every family module, so that specs can be read from configs and records by name."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
