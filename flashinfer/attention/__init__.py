"""Attention operators. Their public modules are flashinfer.decode, flashinfer.prefill, flashinfer.cascade, …; the two
wrappers of sinks.py are here, as upstream has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashinfer.attention.sinks import (
        BatchAttentionWithAttentionSinkWrapper as BatchAttentionWithAttentionSinkWrapper,
    )
    from flashinfer.attention.sinks import BatchDecodeWithAttentionSinkWrapper as BatchDecodeWithAttentionSinkWrapper

__all__ = ["BatchAttentionWithAttentionSinkWrapper", "BatchDecodeWithAttentionSinkWrapper"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashinfer.attention import sinks

    globals().update({wrapper: getattr(sinks, wrapper) for wrapper in __all__})
    return globals()[name]
