# SPDX-License-Identifier: Apache-2.0
"""The folder that compiled kernels and miss records live in."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from pathlib import Path

from flashinfer import env, log, packages


def preferred() -> Path | None:
    """FLASHINFER_CACHE_DIR, else the user's cache directory; None when the user has no home. Touches nothing."""
    chosen = env.CACHE_DIR.get()
    if chosen is None:
        try:
            import platformdirs

            chosen = Path(platformdirs.user_cache_dir("flashinfer", appauthor=False))
        except (ImportError, RuntimeError, KeyError):  # a bare source tree; no home directory
            return None
    return chosen if chosen.is_absolute() else None  # "~/.cache" stays as it is for a user unknown to the system


def unknown() -> tuple[str, str]:
    """Why there is no preferred cache directory, and the next step."""
    name = env.CACHE_DIR.name
    if packages.is_missing("platformdirs"):
        why = "platformdirs, which knows where users' caches are, is not installed"
        return why, f"pip install platformdirs, or set {name} to a writable folder"
    return "there is no home directory", f"set {name} to a writable folder"


def usable() -> Path:
    """The preferred cache directory, created; a private temporary one when it cannot be written. Never fails: where
    nothing at all can be written, kernels that need no compiling must still load."""
    chosen = preferred()
    if chosen is None:
        why, step = unknown()
        return _temporary(f"the user's cache directory is unknown: {why}", step)
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        if not os.access(chosen, os.W_OK | os.X_OK):
            return _temporary(f"the cache directory {chosen} is not writable")
    except OSError as error:
        return _temporary(f"the cache directory {chosen} cannot be made: {error.strerror}")
    return chosen


@functools.cache
def _temporary(why: str, step: str = f"set {env.CACHE_DIR.name} to a writable folder") -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="flashinfer-cache-"))
    except OSError:
        return Path(os.devnull, "flashinfer-cache")  # every write below a file fails, with a warning of its own
    atexit.register(_discard, folder, os.getpid())
    log.logger().warning(
        "%s; kernels compiled now are kept in %s for this process only. Next step: %s",
        why,
        folder,
        step,
    )
    return folder


def _discard(folder: Path, owner: int) -> None:
    """Remove a temporary cache, all but its miss records, when its process ends."""
    if os.getpid() == owner:
        shutil.rmtree(folder / "jit", ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
