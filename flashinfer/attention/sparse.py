# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention, under the names and signatures of upstream: a row of blocks is a request of prefill, whose
pages are the blocks of keys that it lists."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch

from flashinfer.attention.plan import NO_FUNCTIONS, dtype_of
from flashinfer.attention.planned import DataType, Result
from flashinfer.attention.prefill.plan import PrefillPlan
from flashinfer.attention.prefill.wrapper import PrefillWrapper
from flashinfer.attention.variant import GivenScale, Overrides
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks
from flashinfer.host import indices as index_values

_OTHER_PATTERNS = {
    "block_mask": "VariableBlockSparseAttentionWrapper, whose plan() takes a mask for each KV head",
    "kv_block_lens": "mask or packed_mask, which hide keys inside of blocks",
    "q2k_indices": "indptr and indices, or VariableBlockSparseAttentionWrapper for a pattern of each head",
    "q2k_num": "indptr and indices, or VariableBlockSparseAttentionWrapper for a pattern of each head",
    "kv_splits": "leave it out: the planner splits where that is faster",
    "use_clc": "leave it out: the planner balances the blocks of the grid",
}
SCALES_OF_BLOCKS = dict.fromkeys(("q_scale", "k_scale", "v_scale"), "one number for a whole tensor, given to run()")


def refuse(op: str, next_steps: dict[str, str], **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise UnsupportedConfig(
                f"{op}: {name} is {type(value).__name__}; expected None. Next step: {next_steps[name]}"
            )


def convert_bsr_mask_layout(mask: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    """A mask inside of blocks in the order of a custom mask of prefill: of every row of blocks its `R` rows, each over
    the keys of all blocks that the row lists.

    Args:
        mask: `[nnz, R, C]` of any dtype; block `i` is the i-th of those that are listed.
        indptr: int32 or int64 `[num_block_rows + 1]`, from 0 to nnz: the blocks of each row.

    Returns:
        `[nnz * R * C]`, dtype and device of mask.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
    """
    op = "convert_bsr_mask_layout"
    checks.require_tensors(op, mask=mask, indptr=indptr)
    checks.require(mask.dim() == 3, op, f"mask has shape {list(mask.shape)}; expected [nnz, R, C]")
    checks.check_index(op, "indptr", indptr)
    checks.require_device(op, "indptr", indptr, mask, "mask")
    checks.require(indptr.numel() > 0, op, "indptr is empty; expected [num_block_rows + 1] offsets")
    num_blocks, num_rows, num_columns = mask.shape
    if index_values.are_visible(indptr):
        index_values.require_offsets(op, "indptr", indptr, num_blocks, f"the {num_blocks} blocks of mask")
    flat = torch.zeros(num_blocks * num_rows, num_columns, dtype=mask.dtype, device=mask.device)
    if mask.numel() == 0 or indptr.numel() < 2:
        return flat.view(-1)
    block = torch.arange(num_blocks, device=mask.device)
    offsets = indptr.long()
    row = (torch.searchsorted(offsets, block, right=True) - 1).clamp_(0, indptr.numel() - 2)
    begin, count = offsets[row], offsets[row + 1] - offsets[row]
    within = torch.arange(num_rows, device=mask.device)
    place = (begin * num_rows + block - begin)[:, None] + within * count[:, None]  # in rows of C
    flat.index_copy_(0, place.clamp_(0, len(flat) - 1).view(-1), mask.reshape(-1, num_columns))
    return flat.view(-1)


class SparsePlan(PrefillPlan):
    """Of rows of blocks, whose keys and values other rows read as well."""

    def queries_of(self, num_tokens: int) -> str:
        queries = super().queries_of(num_tokens)
        return "shared" if queries == "short" else queries


class SparsePrefill(PrefillWrapper):
    """Paged prefill whose caller gives keys and values as rows."""

    _plan_class = SparsePlan

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer, backend=backend)

    def _require_plan(self) -> None:
        if self._plan is None:
            raise ValueError(f"{self._op_name}: run() before plan(); call plan() with the blocks first")

    def _require_shape(self, name: str, tensor: Any, axes: str, *sizes: Optional[int]) -> None:
        """sizes: None for one that is not planned."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{self._op_name}: {name} is {type(tensor).__name__}; expected a tensor")
        shape = tensor.shape
        if len(shape) != len(sizes) or any(size is not None and size != n for n, size in zip(shape, sizes)):
            planned = ["any" if size is None else size for size in sizes]
            raise ValueError(
                f"{self._op_name}: {name} has shape {list(shape)}; planned for {planned} ({axes})".replace("'any'", "*")
            )


class BlockSparseAttentionWrapper(SparsePrefill):
    """Attention under a mask of blocks: R queries by C keys, listed row by row as in scipy's `bsr_matrix`.

        out[i] = sum over the keys of the blocks that row i / R lists of softmax(sm_scale * q · k) v

    A row of blocks is planned as a request of R queries whose pages are the blocks of keys, and computed by the kernels
    of prefill. plan() neither copies from the device nor waits for it.

    Args:
        float_workspace_buffer: scratch memory on the device to run on; 128 MB suffice for every common shape. A CPU
            tensor of any size makes this a wrapper for the CPU.
        backend: accepted for compatibility.
    """

    _op_name = "block_sparse_attention"
    _index_names = ("qo_indptr", "indptr", "indices", "last_block_len")
    _sizes = (0, 0, 1)  # M, N, C

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        M: int,  # noqa: N803  # upstream's names
        N: int,  # noqa: N803
        R: int,  # noqa: N803
        C: int,  # noqa: N803
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: Optional[torch.Tensor] = None,
        packed_mask: Optional[torch.Tensor] = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type: DataType = "float16",
        kv_data_type: Optional[DataType] = None,
        o_data_type: DataType = "float16",
        non_blocking: bool = True,
        block_mask: Optional[torch.Tensor] = None,
        kv_block_lens: Optional[torch.Tensor] = None,
        q2k_indices: Optional[torch.Tensor] = None,
        q2k_num: Optional[torch.Tensor] = None,
        kv_splits: Union[int, str, None] = None,
        use_clc: Optional[bool] = None,
        q_scale: Optional[torch.Tensor] = None,
        k_scale: Optional[torch.Tensor] = None,
        v_scale: Optional[torch.Tensor] = None,
    ) -> None:
        """Describe the mask that the following runs work under.

        Args:
            indptr: int32 `[ceil(M / R) + 1]`; row i of blocks has the columns `indices[indptr[i]:indptr[i + 1]]`. On
                the device (used in place) or the CPU (uploaded asynchronously), as indices.
            indices: int32, from 0 to N / C - 1, each once a row, in any order.
            M, N: queries and keys. N is a multiple of C; the last row of blocks may be cut off by M.
            R, C: queries and keys of a block, any. Pages of TMA are blocks with C a multiple of 8.
            num_qo_heads, num_kv_heads, head_dim: shapes; all heads have the same blocks.
            mask: bool `[nnz, R, C]`, visible or not, of the blocks in the order of indices. Takes the place of causal.
            packed_mask: the same as `segment_packbits` packs it, of each row of blocks its R rows over all of its keys
                (`convert_bsr_mask_layout`), little-endian, every row of blocks from a byte of its own.
            causal: within what a row of blocks lists, end to end: its last query sees all of it, every query before
                that one key less. It is the causal mask of M = N where R = C and the block on the diagonal is listed
                last in every row; for other patterns give a mask.
            pos_encoding_mode, rope_scale, rope_theta: positions count what a row lists.
            logits_soft_cap, sm_scale: as in `BatchPrefillWithPagedKVCacheWrapper.plan`.
            q_data_type, kv_data_type: dtypes of q, and of k and v (default that of q).
            o_data_type: of queries of 8 bits, fp16 or bf16. Other queries have outputs of their own dtype, whatever
                "float16" says; another dtype than that is an error.
            use_fp16_qk_reduction, non_blocking: accepted for compatibility.
            The others: None; of kernels and formats that are not here.

        Raises:
            ValueError, TypeError, IndexError: a shape, dtype, device or value does not fit, or a workspace is too
                small.
            UnsupportedConfig: no kernel for these arguments.
        """
        op = self._op_name
        refuse(
            op, _OTHER_PATTERNS, block_mask=block_mask, kv_block_lens=kv_block_lens, q2k_indices=q2k_indices,
            q2k_num=q2k_num, kv_splits=kv_splits, use_clc=use_clc,
        )  # fmt: skip
        refuse(op, SCALES_OF_BLOCKS, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        m, n = (checks.integer(op, name, size, 0) for name, size in (("M", M), ("N", N)))
        r, c = (checks.integer(op, name, size, 1) for name, size in (("R", R), ("C", C)))
        checks.require(
            n % c == 0, op,
            f"N is {n} and C {c}; expected a multiple of C. Next step: rows of zeros behind k and v, hidden by mask",
        )  # fmt: skip
        checks.require_tensors(op, indptr=indptr, indices=indices)
        num_rows = -(-m // r)
        checks.require(
            indptr.shape == (num_rows + 1,), op,
            f"indptr has shape {list(indptr.shape)}; expected [{num_rows + 1}], ceil(M / R) + 1",
        )  # fmt: skip
        checks.require(indices.dim() == 1, op, f"indices has shape {list(indices.shape)}; expected one dimension")
        for name, tensor in (("indptr", indptr), ("indices", indices)):
            is_index = tensor.dtype in (torch.int32, torch.int64)
            checks.require(is_index, op, f"{name} is {tensor.dtype}; expected torch.int32")
        if index_values.are_visible(indptr, indices):
            index_values.require_offsets(op, "indptr", indptr, len(indices), f"the {len(indices)} entries of indices")
            listed = indices[: int(indptr[-1])]
            index_values.require_within(op, "indices", listed, 0, n // c, f"the {n // c} blocks of {n} keys")
        masks: Optional[tuple[Optional[torch.Tensor], Optional[torch.Tensor]]] = None
        if packed_mask is not None:
            masks = None, packed_mask
        elif mask is not None:
            checks.require_tensors(op, mask=mask)
            checks.require(
                mask.dim() == 3 and mask.shape[1:] == (r, c), op,
                f"mask has shape {list(mask.shape)}; expected [nnz, {r}, {c}] ([nnz, R, C])",
            )  # fmt: skip
            masks = convert_bsr_mask_layout(mask, indptr.to(mask.device)), None
        kind = "custom" if masks is not None else "causal" if checks.boolean(op, "causal", causal) else "none"
        is_default = o_data_type in ("float16", torch.float16) and dtype_of(op, "q_data_type", q_data_type).itemsize > 1
        # On the side of indptr, where a plan looks for all of them or none.
        qo_indptr = torch.arange(0, num_rows * r + 1, r, dtype=torch.int32, device=indptr.device)
        if m % r:
            qo_indptr[-1:] = m
        last_block_len = torch.full((num_rows,), c, dtype=torch.int32, device=indptr.device)
        arguments = (
            kind, num_qo_heads, num_kv_heads, c, head_dim, None, q_data_type, kv_data_type,
            None if is_default else o_data_type,
            (None, False), NO_FUNCTIONS, pos_encoding_mode, -1, logits_soft_cap, sm_scale, rope_scale, rope_theta,
        )  # fmt: skip
        self._settle((qo_indptr, indptr, indices, last_block_len), arguments, masks, longest=r)
        self._sizes = m, n, c

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: GivenScale = None,
        scale_k: GivenScale = None,
        scale_v: GivenScale = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
    ) -> Result:
        """Attention of one layer, as planned.

        Args:
            q: `[M, num_qo_heads, head_dim]`, unit stride in the last axis.
            k, v: `[N, num_kv_heads, head_dim]`; dtype of q, or fp8.
            scale_q, scale_k, scale_v: factors of quantized q, k and v, a number or one float32 on the device; those of
                heads are refused.
            out, lse, return_lse, enable_pdl: as in `BatchPrefillWithPagedKVCacheWrapper.run`.

        Returns:
            out `[M, num_qo_heads, head_dim]`, or (out, lse), lse base 2. A query that sees no key gives zeros and -inf.

        Raises:
            ValueError, TypeError: nothing is planned, or a shape, dtype, device or stride does not fit.
        """
        return self._attend(q, k, v, (scale_q, scale_k, scale_v), out, lse, return_lse, enable_pdl, None)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scales: tuple[GivenScale, GivenScale, GivenScale],
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
        pdl: Optional[bool],
        overrides: Optional[Overrides],
    ) -> Result:
        self._require_plan()
        m, n, c = self._sizes
        self._require_shape("q", q, "M, num_qo_heads, head_dim", m, None, None)
        self._require_shape("k", k, "N, num_kv_heads, head_dim", n, None, None)
        self._require_shape("v", v, "N, num_kv_heads, head_dim", n, None, None)
        kv = (k.view(n // c, c, k.shape[1], k.shape[2]), v.view(n // c, c, v.shape[1], v.shape[2]))
        return self._run(q, kv, out, lse, return_lse, scales, pdl, overrides)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: GivenScale = None,
        scale_k: GivenScale = None,
        scale_v: GivenScale = None,
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
        return self._attend(q, k, v, (scale_q, scale_k, scale_v), None, None, False, None, overrides)
