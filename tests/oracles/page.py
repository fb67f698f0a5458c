"""A paged cache filled row by row in Python."""

from __future__ import annotations

import torch


def append(
    rows: torch.Tensor,
    cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
) -> torch.Tensor:
    """rows: [nnz, heads, dim]; cache: [pages, page_size, heads, dim], copied. Returns the cache after the append."""
    cache = cache.clone()
    page_size = cache.shape[1]
    for i, (request, position) in enumerate(zip(batch_indices.tolist(), positions.tolist())):
        if not 0 <= request < len(kv_indptr) - 1 or position < 0:
            continue
        pages = kv_indices[int(kv_indptr[request]) : int(kv_indptr[request + 1])].tolist()
        if position // page_size < len(pages):
            cache[pages[position // page_size], position % page_size] = rows[i]
    return cache


def batch_indices_positions(
    append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int
) -> tuple[list[int], list[int]]:
    batch_indices, positions = [], []
    for request, length in enumerate(seq_lens.tolist()):
        count = int(append_indptr[request + 1] - append_indptr[request])
        batch_indices += [request] * count
        positions += range(length - count, length)
    padding = nnz - len(batch_indices)
    return batch_indices + [-1] * padding, positions + [0] * padding
