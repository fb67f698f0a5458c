# SPDX-License-Identifier: Apache-2.0
"""The `flashinfer` logger.

A compile that stalls a process must never be silent, so when the application has not configured logging, messages go to
stderr at the level of FLASHINFER_LOG_LEVEL. An application that configures the root or the `flashinfer` logger is in
charge.
"""

from __future__ import annotations

import functools
import logging

from flashinfer import env, locks

_setup = locks.lock()


@functools.cache
def logger() -> logging.Logger:
    with _setup:  # two threads with a first message add one handler
        return _logger()


def _logger() -> logging.Logger:
    log = logging.getLogger("flashinfer")
    if log.level == logging.NOTSET:
        log.setLevel(env.LOG_LEVEL.get().upper())
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[flashinfer] %(levelname)s %(message)s"))
        # An application that configures logging after our first message takes over; without this it would see twins.
        handler.addFilter(lambda record: not logging.getLogger().handlers)
        log.addHandler(handler)
    return log


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time this exact message is seen in the process."""
    logger().warning(message)
