# SPDX-License-Identifier: Apache-2.0
"""Cascade attention and merging of attention states. The code is in flashinfer/attention/cascade.py and merge.py."""

from __future__ import annotations

from flashinfer.attention.cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
)
from flashinfer.attention.merge import (
    merge_state,
    merge_state_in_place,
    merge_states,
    variable_length_merge_states,
)

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "variable_length_merge_states",
]
