# SPDX-License-Identifier: Apache-2.0
"""Matrix products: of segments of rows with weights of their own (`SegmentGEMMWrapper`), of fp8 operands with scales of
blocks, as DeepSeek's models have them, and of batches of fp8 matrices."""

from __future__ import annotations

from flashinfer.gemm.batched import bmm_fp8
from flashinfer.gemm.scaled import fp8_blockscale_gemm_sm90, gemm_fp8_nt_groupwise, group_gemm_fp8_nt_groupwise
from flashinfer.gemm.segments import SegmentGEMMWrapper

__all__ = [
    "SegmentGEMMWrapper",
    "bmm_fp8",
    "fp8_blockscale_gemm_sm90",
    "gemm_fp8_nt_groupwise",
    "group_gemm_fp8_nt_groupwise",
]
