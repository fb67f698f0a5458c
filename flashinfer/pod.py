"""Prefill beside decode. The code is in flashinfer/attention/mixed.py."""

from __future__ import annotations

from flashinfer.attention.mixed import BatchPODWithPagedKVCacheWrapper, PODWithPagedKVCacheWrapper

__all__ = ["BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"]
