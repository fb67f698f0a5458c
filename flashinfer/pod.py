# SPDX-License-Identifier: Apache-2.0
"""Prefill beside decode. The code is in flashinfer/attention/pod.py."""

from __future__ import annotations

from flashinfer.attention.pod import BatchPODWithPagedKVCacheWrapper, PODWithPagedKVCacheWrapper

__all__ = ["BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"]
