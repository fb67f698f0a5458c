# SPDX-License-Identifier: Apache-2.0
"""Exceptions. Each message says what, expected, got, and the next step."""

from __future__ import annotations


class FlashInferError(Exception):
    """Base class of everything this library raises on purpose."""


class UnsupportedConfig(FlashInferError, ValueError):
    """The request is well-formed but no kernel family covers it (an illegal dtype, head_dim, axis value, …)."""


class InvalidSetting(FlashInferError, ValueError):
    """A FLASHINFER_* environment variable has a value that means nothing."""


class KernelMissing(FlashInferError, RuntimeError):
    """No store could answer a kernel request and compiling was not possible or not allowed."""


class ToolchainMissing(FlashInferError, RuntimeError):
    """A compiler, or the headers it needs, was not found."""


class CompileError(FlashInferError, RuntimeError):
    """A kernel did not compile. The last line of the message is the first real error of the compiler."""


class ExchangeFailed(FlashInferError, RuntimeError):
    """Ranks did not come together: one of them raised or died, or they disagree on what they exchange."""


class DriverError(FlashInferError, RuntimeError):
    """The CUDA driver refused a call."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call} failed: {name} ({code})")
        self.code = code
