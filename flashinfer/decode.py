# SPDX-License-Identifier: Apache-2.0
"""Decode attention: one query token per request. The code is in flashinfer/attention/decode/."""

from __future__ import annotations

from flashinfer import absent
from flashinfer.attention.block_table.calls import trtllm_batch_decode_with_kv_cache, xqa_batch_decode_with_kv_cache
from flashinfer.attention.decode.paged import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    fast_decode_plan,
)
from flashinfer.attention.decode.single import single_decode_with_kv_cache
from flashinfer.mla import BatchDecodeMlaWithPagedKVCacheWrapper

__all__ = [
    "BatchDecodeMlaWithPagedKVCacheWrapper",
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "single_decode_with_kv_cache",
    "trtllm_batch_decode_with_kv_cache",
    "xqa_batch_decode_with_kv_cache",
]

__getattr__ = absent.names_of(__name__)
