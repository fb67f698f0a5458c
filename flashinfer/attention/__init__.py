# SPDX-License-Identifier: Apache-2.0
"""Attention operators. Their public modules are flashinfer.decode, flashinfer.prefill, flashinfer.cascade, …; the
wrapper of mixed batches and the two of sinks.py are here, as upstream has them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashinfer.attention.mixed import BatchAttention as BatchAttention
    from flashinfer.attention.sinks import (
        BatchAttentionWithAttentionSinkWrapper as BatchAttentionWithAttentionSinkWrapper,
    )
    from flashinfer.attention.sinks import BatchDecodeWithAttentionSinkWrapper as BatchDecodeWithAttentionSinkWrapper

__all__ = ["BatchAttention", "BatchAttentionWithAttentionSinkWrapper", "BatchDecodeWithAttentionSinkWrapper"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"flashinfer.attention.{'mixed' if name == 'BatchAttention' else 'sinks'}")
    globals()[name] = wrapper = getattr(module, name)
    return wrapper
