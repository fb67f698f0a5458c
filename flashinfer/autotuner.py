# SPDX-License-Identifier: Apache-2.0
"""Upstream's autotuner, as far as engines touch it when they start. There is nothing to tune: which kernel and tile
answer follows from shapes and device (`flashinfer resolve`), the same on every rank and in every process.

vLLM runs its model once within `autotune()`, which here loads or compiles what that run needs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from flashinfer.version import __version__

__all__ = ["AutoTuner", "autotune", "autotune_v2", "get_autotune_process_group", "set_autotune_process_group"]

_process_group: Any = None


def set_autotune_process_group(group: Any) -> None:
    """Keep a process group, whose ranks would agree on what is tuned."""
    global _process_group
    _process_group = group


def get_autotune_process_group() -> Any:
    """What `set_autotune_process_group` was given last."""
    return _process_group


@contextlib.contextmanager
def autotune(tune_mode: bool = True, cache: Optional[str] = None, **options: Any) -> Iterator[None]:
    """Runs what is inside. `cache` is neither read nor written; upstream's other options change nothing."""
    yield


@contextlib.contextmanager
def autotune_v2(mode: str = "tune", **options: Any) -> Iterator[None]:
    """As `autotune`. SGLang enters both; vLLM looks for `autotune_v2_reload` beside it, and takes `autotune` alone."""
    yield


class AutoTuner:
    """The one tuner of a process: `AutoTuner.get()`. It holds no results."""

    _one: Optional[AutoTuner] = None
    _dirty = False  # engines save what a tuner has learned

    @classmethod
    def get(cls) -> AutoTuner:
        if cls._one is None:
            cls._one = cls()
        return cls._one

    def save_configs(self, path: str) -> None:
        """Write a file that `load_configs` of this version accepts. Raises OSError."""
        Path(path).write_text(json.dumps({"_metadata": _collect_metadata()}), encoding="utf-8")

    def load_configs(self, path: str) -> bool:
        """Whether the file is one of this version."""
        try:
            configs = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(configs, dict) and configs.get("_metadata") == _collect_metadata()

    def clear_cache(self) -> None:
        """There is none."""


def _collect_metadata() -> dict[str, str]:
    return {"flashinfer_version": __version__}
