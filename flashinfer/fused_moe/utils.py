# SPDX-License-Identifier: Apache-2.0
"""Token counts for tuning mixture-of-experts kernels, which vLLM asks for whatever the model."""

from __future__ import annotations


def get_hybrid_num_tokens_buckets(max_num_tokens: int, min_num_tokens: int = 1) -> tuple[int, ...]:
    """Powers of two from `min_num_tokens` (at least 1) up, and `max_num_tokens` at the end."""
    buckets = []
    size = max(min_num_tokens, 1)
    while size < max_num_tokens:
        buckets.append(size)
        size *= 2
    return (*buckets, max_num_tokens)
