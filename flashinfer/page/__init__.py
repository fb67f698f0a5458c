# SPDX-License-Identifier: Apache-2.0
"""Paged KV cache: appending keys and values, and the indices that say where they go.

A paged cache is one 5-D tensor with K and V on dim 1, or a `(k_cache, v_cache)` pair of 4-D tensors; `"NHD"` is
`[num_pages, page_size, num_kv_heads, head_dim]`, `"HND"` swaps the two middle axes. Any strides do, as long as the
last axis is dense.
"""

from __future__ import annotations

from typing import Optional

import torch

from flashinfer.host.paged_cache import PagedCache
from flashinfer.host.quant_scale import Scale
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.page import append, lengths, sparse_offsets

__all__ = [
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "block_sparse_indices_to_vector_sparse_offsets",
    "get_batch_indices_positions",
    "get_seq_lens",
]


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: Optional[torch.Tensor],
    kv_layout: str = "NHD",
    *,
    k_scale: Scale = None,
    v_scale: Scale = None,
    enable_pdl: Optional[bool] = None,
) -> None:
    """Write rows of keys and values to their slots in a paged cache.

    Row `i` goes to slot `positions[i] % page_size` of page `kv_indices[kv_indptr[b] + positions[i] // page_size]`, with
    `b = batch_indices[i]`. A negative request, position or page number marks padding: the row is skipped, so a captured
    CUDA graph may be replayed with fewer rows. One that leads past the requests, the request's pages or the cache is an
    IndexError on the CPU, and skipped on a GPU (docs/safety.md).

    Args:
        append_key: `[nnz, num_kv_heads, head_dim]`.
        append_value: `[nnz, num_kv_heads, head_dim_v]`.
        batch_indices: `[nnz]`, int32 or int64; the request of each row, -1 for padding.
        positions: `[nnz]`, dtype of batch_indices; the row's position in its request, counted from 0, below 2^31 - 1.
        paged_kv_cache: see the module's docstring; the dtype of append_key, or fp8, to which fp16, bf16 and fp32 rows
            are converted.
        kv_indices: page numbers of all requests, one after the other, int32 or int64; may be longer than needed.
        kv_indptr: `[batch_size + 1]`, dtype of kv_indices; where each request's pages start in kv_indices.
        kv_last_page_len: accepted for compatibility; positions already say where rows go.
        kv_layout: "NHD" or "HND".
        k_scale, v_scale: an fp8 cache holds `key / k_scale` and `value / v_scale`, rounded to nearest even and
            saturated; a number, or an fp32 tensor of one element on the same device. Only where rows are converted.
        enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or type does not fit; elements of the cache overlap.
        IndexError: an index leads outside, where the host sees values.
        UnsupportedConfig: no kernel for these dtypes or head dimensions.
    """
    run = append.paged_door if is_dynamo_compiling() else append.run_paged
    rows, slots = (append_key, append_value), (batch_indices, positions, kv_indices, kv_indptr)
    run(rows, slots, paged_kv_cache, kv_layout, k_scale, v_scale, enable_pdl)


def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: Optional[torch.Tensor],
    kpe_cache: Optional[torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: Optional[torch.Tensor],
) -> None:
    """Write rows of compressed KV and of its rotary part (multi-head latent attention, DeepSeek-V2) to a paged cache.

    Args:
        append_ckv: `[nnz, ckv_dim]`.
        append_kpe: `[nnz, kpe_dim]`.
        ckv_cache: `[num_pages, page_size, ckv_dim]`, or None: compressed KV is not stored.
        kpe_cache: `[num_pages, page_size, kpe_dim]`, or None: the rotary part is not stored. Both may be slices of
            one tensor.
        batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len: as in `append_paged_kv_cache`, as are
            padding and errors.
    """
    run = append.mla_door if is_dynamo_compiling() else append.run_mla
    rows, slots = (append_ckv, append_kpe), (batch_indices, positions, kv_indices, kv_indptr)
    run(rows, slots, ckv_cache, kpe_cache)


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: Optional[torch.Tensor] = None,
    positions: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The request and the position of every row of a ragged batch.

    Args:
        append_indptr: `[batch_size + 1]`, int32 or int64; where each request's rows start. Ascending, `nnz` at most.
        seq_lens: `[batch_size]`; length of each request with the appended rows, which are its last ones.
        nnz: rows to fill in; may exceed `append_indptr[-1]` (a padded batch).
        batch_indices, positions: `[nnz]` int32 outputs; allocated when None.

    Returns:
        `(batch_indices, positions)`, int32, `[nnz]`. Row `i` of request `b` has position
        `seq_lens[b] - append_indptr[b + 1] + i`. Rows of no request, past `append_indptr[-1]` or before
        `append_indptr[0]`, get batch index -1, which `append_paged_kv_cache` skips, and position 0.

    Raises:
        ValueError, TypeError, IndexError: a shape, dtype, device or type does not fit; or, where the host sees values,
            the offsets descend or end past nnz, or a request is shorter than its rows.
    """
    run = lengths.trace_positions if is_dynamo_compiling() else lengths.run_positions
    return run(append_indptr, seq_lens, nnz, batch_indices, positions)


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Length of every request of a paged cache.

    Args:
        kv_indptr: `[batch_size + 1]`, int32 or int64; where each request's pages start.
        kv_last_page_len: `[batch_size]`; entries used in each request's last page, page_size at most.
        page_size: entries of a page.

    Returns:
        `[batch_size]` int32: `(num_pages - 1) * page_size + kv_last_page_len`, and 0 for a request without pages.

    Raises:
        ValueError, TypeError: a shape, dtype, device or type does not fit; or, where the host sees values, the offsets
            descend, a last page is longer than a page, or a length does not fit int32.
    """
    run = lengths.trace_seq_lens if is_dynamo_compiling() else lengths.run_seq_lens
    return run(kv_indptr, kv_last_page_len, page_size)


def block_sparse_indices_to_vector_sparse_offsets(
    block_sparse_indices: torch.Tensor,
    block_sparse_indptr: torch.Tensor,
    vector_sparse_offsets: torch.Tensor,
    vector_sparse_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    stride_block: int,
    stride_n: int,
    block_size: int,
) -> torch.Tensor:
    """Where each row of the blocks of a batch starts. Kernels of this library look up blocks and need no such list.

    Row `r < kv_lens[b]` of request `b` gets, at `vector_sparse_indptr[b] + r` of vector_sparse_offsets,
    `block_sparse_indices[block_sparse_indptr[b] + r // block_size] * stride_block + r % block_size * stride_n`.
    Other entries are left as they are.

    Args:
        block_sparse_indices: numbers of blocks, of all requests one after the other, int32 or int64, as the others.
        block_sparse_indptr: `[batch_size + 1]`; where each request's blocks start.
        vector_sparse_offsets: the output; may be longer than needed.
        vector_sparse_indptr: `[batch_size + 1]`; where each request's rows start in it.
        kv_lens: `[batch_size]`, rows of each request.
        stride_block, stride_n: distances of blocks and of rows, in whatever the offsets count.
        block_size: rows of a block.

    Returns:
        vector_sparse_offsets.

    Raises:
        ValueError, TypeError, IndexError: a shape, dtype, device or type does not fit; or, where the host sees values,
            offsets descend or end past their lists, or a request has more rows than its blocks.
    """
    sparse_offsets.fill_offsets(
        block_sparse_indices, block_sparse_indptr, vector_sparse_offsets, vector_sparse_indptr, kv_lens, stride_block,
        stride_n, block_size,
    )  # fmt: skip
    return vector_sparse_offsets
