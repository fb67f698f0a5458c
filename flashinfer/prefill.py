# SPDX-License-Identifier: Apache-2.0
"""Prefill and append attention. The code is in flashinfer/attention/prefill/."""

from __future__ import annotations

from flashinfer import absent
from flashinfer.attention.block_table.calls import trtllm_batch_context_with_kv_cache
from flashinfer.attention.prefill.paged import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.attention.prefill.ragged import BatchPrefillWithRaggedKVCacheWrapper
from flashinfer.attention.prefill.single import single_prefill_with_kv_cache, single_prefill_with_kv_cache_return_lse

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
    "trtllm_batch_context_with_kv_cache",
]

__getattr__ = absent.names_of(__name__)
