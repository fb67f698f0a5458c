# SPDX-License-Identifier: Apache-2.0
"""Locks of modules, which outlive a fork."""

from __future__ import annotations

import os
import threading


def lock() -> threading.Lock:
    """A lock for the life of a process, free in a child: the thread that may hold it at a fork is not there."""
    made = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made._at_fork_reinit)  # type: ignore[attr-defined]  # as logging does
    return made
