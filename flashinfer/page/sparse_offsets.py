# SPDX-License-Identifier: Apache-2.0
"""The rows of blocks, one by one, for kernels that look up rows and not blocks. Those of this library do not."""

from __future__ import annotations

import torch

from flashinfer.host import checks, indices

_OP = "block_sparse_indices_to_vector_sparse_offsets"
_AT_ONCE = 1 << 22  # offsets, whose intermediate results are kept in 64 bits


def fill_offsets(
    block_indices: torch.Tensor,
    block_indptr: torch.Tensor,
    offsets: torch.Tensor,
    indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    stride_block: int,
    stride_n: int,
    block_size: int,
) -> None:
    given = {"block_sparse_indices": block_indices, "block_sparse_indptr": block_indptr,
             "vector_sparse_offsets": offsets, "vector_sparse_indptr": indptr, "kv_lens": kv_lens}  # fmt: skip
    checks.require_tensors(_OP, **given)
    checks.check_index(_OP, "block_sparse_indptr", block_indptr)
    batch_size = len(block_indptr) - 1
    checks.require(batch_size >= 0, _OP, "block_sparse_indptr is empty; expected [batch_size + 1] offsets")
    for name, length in (("block_sparse_indices", None), ("vector_sparse_offsets", None),
                         ("vector_sparse_indptr", batch_size + 1), ("kv_lens", batch_size)):  # fmt: skip
        checks.check_index(_OP, name, given[name], length)
        checks.require_device(_OP, name, given[name], block_indptr, "block_sparse_indptr")
    size = checks.integer(_OP, "block_size", block_size, 1)
    strides = [checks.integer(_OP, *named) for named in (("stride_block", stride_block), ("stride_n", stride_n))]
    if indices.are_visible(*given.values()):
        _require_room(block_indptr, len(block_indices), indptr, len(offsets), kv_lens, size)
    if batch_size == 0 or len(block_indices) == 0:
        return
    for begin in range(0, len(offsets), _AT_ONCE):
        part = offsets[begin : begin + _AT_ONCE]
        place = torch.arange(begin, begin + len(part), device=offsets.device)
        request = (torch.searchsorted(indptr.long(), place, right=True) - 1).clamp_(0, batch_size - 1)
        row = place - indptr[request]
        block = (block_indptr[request] + row // size).clamp_(0, len(block_indices) - 1)
        value = block_indices[block].long() * strides[0] + row % size * strides[1]
        part.copy_(torch.where((row >= 0) & (row < kv_lens[request]), value, part))


def _require_room(
    block_indptr: torch.Tensor,
    num_blocks: int,
    indptr: torch.Tensor,
    num_offsets: int,
    kv_lens: torch.Tensor,
    block_size: int,
) -> None:
    indices.require_offsets(_OP, "block_sparse_indptr", block_indptr, num_blocks, "the block_sparse_indices")
    indices.require_offsets(_OP, "vector_sparse_indptr", indptr, num_offsets, "the vector_sparse_offsets")
    blocks, rows = block_indptr.diff().tolist(), indptr.diff().tolist()
    for i, (length, num_held, num_rows) in enumerate(zip(kv_lens.tolist(), blocks, rows)):
        most = min(num_held * block_size, num_rows)
        if not 0 <= length <= most:
            raise IndexError(
                f"{_OP}: kv_lens[{i}] is {length}; expected 0 to {most}, what its blocks and its place in "
                "vector_sparse_offsets hold"
            )
