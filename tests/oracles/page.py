# SPDX-License-Identifier: Apache-2.0
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


def slots(
    batch_indices: list[int],
    positions: list[int],
    kv_indices: list[int],
    kv_indptr: list[int],
    num_pages: int,
    page_size: int,
) -> list[tuple[int, int] | str]:
    """Page and entry of every row; "padding" where a negative number says that there is none, "wrong" where an index
    leads outside of what it is held against."""
    found: list[tuple[int, int] | str] = []
    for request, position in zip(batch_indices, positions):
        if request < 0 or position < 0:
            found.append("padding")
            continue
        first, end = kv_indptr[request : request + 2] if request < len(kv_indptr) - 1 else (0, 0)
        place = first + position // page_size
        if not 0 <= place < min(end, len(kv_indices)) or kv_indices[place] >= num_pages:
            found.append("wrong")
        elif kv_indices[place] < 0:
            found.append("padding")
        else:
            found.append((kv_indices[place], position % page_size))
    return found


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
