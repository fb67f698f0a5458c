# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention with a pattern of each head, under the name and signature of upstream: a row of blocks of a KV
head is a request of prefill with one KV head."""

from __future__ import annotations

import math
from typing import Optional

import torch

from flashinfer.attention.plan import NO_FUNCTIONS
from flashinfer.attention.planned import DataType, Result
from flashinfer.attention.sparse import SCALES_OF_BLOCKS, SparsePrefill, refuse
from flashinfer.attention.variant import Overrides
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks
from flashinfer.host import indices as index_values


class VariableBlockSparseAttentionWrapper(SparsePrefill):
    """Attention under a mask of blocks of any sizes, with a pattern and sizes of its own for every KV head.

    A row of blocks of a KV head is planned as a request, and computed by the kernels of prefill as if it had one KV
    head.

    Args:
        float_workspace_buffer, backend: as of `BlockSparseAttentionWrapper`.
    """

    _op_name = "variable_block_sparse_attention"
    _index_names = ("block_row_sz", "kv_indptr", "kv_indices", "last_page_len")
    _sizes = (0, 0, 1)  # query heads, KV heads, page size
    _lengths_of_heads: tuple[Optional[int], Optional[int]] = (None, None)  # queries and keys, where known

    def plan(
        self,
        block_mask_map: torch.Tensor,
        block_row_sz: torch.Tensor,
        block_col_sz: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        non_blocking: bool = True,
        q_data_type: DataType = "float16",
        kv_data_type: Optional[DataType] = None,
        q_scale: Optional[torch.Tensor] = None,
        k_scale: Optional[torch.Tensor] = None,
        v_scale: Optional[torch.Tensor] = None,
    ) -> None:
        """Describe the mask that the following runs work under.

        How long the lists of keys are follows from the mask: one that is on the device is waited for. Sizes of columns
        that are on the CPU are looked at: where they have a common divisor, keys are looked up by pages of that many
        rows, which is faster from 8 on.

        Args:
            block_mask_map: bool `[num_kv_heads, MB, NB]`; row i of blocks sees column j where it is True.
            block_row_sz: int32 `[num_kv_heads, MB]`, queries of each row; the same number in all for every head.
            block_col_sz: int32 `[num_kv_heads, NB]`, keys of each column, likewise.
            num_qo_heads, num_kv_heads, head_dim: shapes; query heads of one KV head share its pattern.
            causal: within what a row of blocks sees, end to end, as in `BlockSparseAttentionWrapper.plan`.
            pos_encoding_mode: "NONE", or "ROPE_LLAMA" by positions that count what a row sees.
            logits_soft_cap, sm_scale, rope_scale, rope_theta, q_data_type, kv_data_type: as there; the output has the
                dtype of q.
            use_fp16_qk_reduction, non_blocking: accepted for compatibility.
            q_scale, k_scale, v_scale: None.

        Raises:
            ValueError, TypeError: a shape, dtype, device or value does not fit, or a workspace is too small.
            UnsupportedConfig: no kernel for these arguments.
        """
        op = self._op_name
        refuse(op, SCALES_OF_BLOCKS, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        given = {"block_mask_map": block_mask_map, "block_row_sz": block_row_sz, "block_col_sz": block_col_sz}
        checks.require_tensors(op, **given)
        if pos_encoding_mode == "ALIBI":
            raise UnsupportedConfig(
                f"{op}: pos_encoding_mode is 'ALIBI'; expected 'NONE' or 'ROPE_LLAMA', as slopes are of all heads"
            )
        qo_heads = checks.integer(op, "num_qo_heads", num_qo_heads, 1)
        heads = checks.integer(op, "num_kv_heads", num_kv_heads, 1)
        checks.require(
            qo_heads % heads == 0, op, f"num_qo_heads is {qo_heads}; expected a multiple of num_kv_heads, {heads}"
        )
        checks.require(
            block_mask_map.dim() == 3 and block_mask_map.shape[0] == heads, op,
            f"block_mask_map has shape {list(block_mask_map.shape)}; expected [{heads}, MB, NB]",
        )  # fmt: skip
        num_rows, num_columns = block_mask_map.shape[1:]
        for name, sizes, count in (
            ("block_row_sz", block_row_sz, num_rows),
            ("block_col_sz", block_col_sz, num_columns),
        ):
            fits = sizes.shape == (heads, count) and sizes.dtype in (torch.int32, torch.int64)
            checks.require(fits, op, f"{name} is {sizes.dtype} {list(sizes.shape)}; expected int32 [{heads}, {count}]")
        lengths = tuple(_common_sum(op, name, given[name]) for name in ("block_row_sz", "block_col_sz"))
        page_size = max(1, math.gcd(*block_col_sz.reshape(-1).tolist())) if block_col_sz.is_cpu else 1
        device = block_mask_map.device
        kv_indptr, kv_indices = _listed_pages(block_mask_map, block_col_sz.to(device), page_size)
        checks.require(kv_indices.numel() < 1 << 31, op, f"{kv_indices.numel()} keys are listed; expected below 2^31")
        ends = block_row_sz.to(device).reshape(-1).cumsum(0)
        qo_indptr = torch.nn.functional.pad(ends, (1, 0)).int()
        last = torch.full((heads * num_rows,), page_size, dtype=torch.int32, device=device)
        arguments = (
            "causal" if checks.boolean(op, "causal", causal) else "none", qo_heads // heads, 1, page_size, head_dim,
            None, q_data_type, kv_data_type, None, (None, False), NO_FUNCTIONS, pos_encoding_mode, -1, logits_soft_cap,
            sm_scale, rope_scale, rope_theta,
        )  # fmt: skip
        self._settle((qo_indptr, kv_indptr, kv_indices, last), arguments)
        self._sizes, self._lengths_of_heads = (qo_heads, heads, page_size), (lengths[0], lengths[1])

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
    ) -> Result:
        """Attention of one layer, as planned.

        Operands that are not contiguous are copied; so are q, out and lse where several query heads share a KV head.

        Args:
            q: `[num_qo_heads, qo_len, head_dim]`.
            k, v: `[num_kv_heads, kv_len, head_dim]`; dtype of q, or fp8.
            out: `[num_qo_heads, qo_len, head_dim]`, dtype of q; allocated when None.
            lse: fp32 `[num_qo_heads, qo_len]`; allocated when None and return_lse.
            return_lse: also return the base-2 logarithm of the sum of exponentials.
            enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).

        Returns:
            out, or (out, lse). A query that sees no key gives zeros and -inf.

        Raises:
            ValueError, TypeError: nothing is planned, or a shape, dtype, device or stride does not fit.
        """
        return self._attend(q, k, v, out, lse, return_lse, enable_pdl, None)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
        pdl: Optional[bool],
        overrides: Optional[Overrides],
    ) -> Result:
        self._require_plan()
        qo_heads, heads, page = self._sizes
        qo_len, kv_len = self._lengths_of_heads
        self._require_shape("q", q, "num_qo_heads, qo_len, head_dim", qo_heads, qo_len, None)
        self._require_shape("k", k, "num_kv_heads, kv_len, head_dim", heads, kv_len, None)
        self._require_shape("v", v, "num_kv_heads, kv_len, head_dim", heads, kv_len, None)
        if out is not None:
            self._require_shape("out", out, "num_qo_heads, qo_len, head_dim", *q.shape[:2], v.shape[2])
        if lse is not None:
            self._require_shape("lse", lse, "num_qo_heads, qo_len", *q.shape[:2])
        group, (_, rows, dim) = qo_heads // heads, q.shape
        q_rows = q.view(heads, group, rows, dim).transpose(1, 2).reshape(heads * rows, group, dim)
        kv = tuple(x.reshape(heads * x.shape[1] // page, page, 1, x.shape[2]) for x in (k, v))
        inner_out = _rows_in_place(out, group)
        inner_lse = _rows_in_place(lse, group)
        result = self._run(q_rows, (kv[0], kv[1]), inner_out, inner_lse, return_lse, (None, None, None), pdl, overrides)
        attended, summed = result if isinstance(result, tuple) else (result, inner_lse)
        out = _by_heads(attended, out, inner_out, heads, rows)
        if not return_lse or summed is None:
            return out
        return out, _by_heads(summed, lse, inner_lse, heads, rows)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Result:
        """The older spelling of `run`, which takes every option but the mask from its own arguments, defaults too."""
        overrides = Overrides.of_forward(
            None, pos_encoding_mode, -1, logits_soft_cap, sm_scale, rope_scale, rope_theta, self._head_dim_of(q)
        )
        return self._attend(q, k, v, None, None, False, None, overrides)


def _common_sum(op: str, name: str, sizes: torch.Tensor) -> Optional[int]:
    """The rows of every head, where the host may look at their sizes."""
    if not index_values.are_visible(sizes):
        return None
    index_values.require_within(op, name, sizes, 0, 1 << 31, "a size")
    sums = sizes.sum(1, dtype=torch.int64).tolist()
    checks.require(
        len(set(sums)) == 1, op, f"{name} adds up to {sums[:8]} for the first heads; expected the same for all"
    )
    return int(sums[0])


def _listed_pages(
    block_mask_map: torch.Tensor, block_col_sz: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages that each row of blocks sees, head by head: int32 offsets and numbers. Rows of all heads are numbered
    one after the other."""
    num_pages = (block_col_sz.long() // page_size).clamp_(min=0)
    flat = num_pages.reshape(-1)
    begins = (flat.cumsum(0) - flat).view(num_pages.shape)
    counts = num_pages[:, None] * (block_mask_map != 0)
    offsets = torch.nn.functional.pad(counts.sum(2).reshape(-1).cumsum(0), (1, 0))
    counts = counts.reshape(-1)
    ends, total = counts.cumsum(0), int(offsets[-1])
    shifts = begins[:, None].expand(block_mask_map.shape).reshape(-1) - (ends - counts)
    numbers = torch.arange(total, device=ends.device) + torch.repeat_interleave(shifts, counts, output_size=total)
    return offsets.int(), numbers.int()


def _rows_in_place(tensor: Optional[torch.Tensor], group: int) -> Optional[torch.Tensor]:
    """An output of heads as one of rows, `[heads * rows, 1, ...]`, if it is memory of that form."""
    if tensor is None or group > 1 or not tensor.is_contiguous():
        return None
    return tensor.view(-1, 1, *tensor.shape[2:])


def _by_heads(
    rows: torch.Tensor, given: Optional[torch.Tensor], in_place: Optional[torch.Tensor], heads: int, num_rows: int
) -> torch.Tensor:
    """Results of rows as results of heads: where the caller wants them, or new."""
    if given is not None and in_place is not None:
        return given
    by_heads = rows.view(heads, num_rows, *rows.shape[1:]).transpose(1, 2).flatten(0, 1).contiguous()
    return by_heads if given is None else given.copy_(by_heads)
