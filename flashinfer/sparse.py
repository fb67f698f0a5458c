# SPDX-License-Identifier: Apache-2.0
"""Attention under masks of blocks. The code is in flashinfer/attention/sparse.py and sparse_heads.py."""

from __future__ import annotations

from flashinfer.attention.sparse import BlockSparseAttentionWrapper, convert_bsr_mask_layout
from flashinfer.attention.sparse_heads import VariableBlockSparseAttentionWrapper

__all__ = ["BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper", "convert_bsr_mask_layout"]
