"""Attention under masks of blocks. The code is in flashinfer/attention/sparse.py."""

from __future__ import annotations

from flashinfer.attention.sparse import (
    BlockSparseAttentionWrapper,
    VariableBlockSparseAttentionWrapper,
    convert_bsr_mask_layout,
)

__all__ = ["BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper", "convert_bsr_mask_layout"]
