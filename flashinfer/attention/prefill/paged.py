# SPDX-License-Identifier: Apache-2.0
"""Prefill, chunked prefill and append over a paged KV cache."""

from __future__ import annotations

from typing import Any, Optional

import torch

from flashinfer.attention.compat import IndexBuffer, check_later_arguments
from flashinfer.attention.planned import NO_SCALES, DataType, Result
from flashinfer.attention.prefill.wrapper import PrefillWrapper
from flashinfer.attention.variant import Functional, GivenScale, Overrides
from flashinfer.host.paged_cache import PagedCache


class BatchPrefillWithPagedKVCacheWrapper(PrefillWrapper):
    """Prefill, chunked prefill or append of a batch over a paged KV cache (FlashAttention-2, Dao 2023,
    arXiv:2307.08691).

    The new tokens' keys and values are in the cache already; query i of a request stands at position
    `kv_len - qo_len + i`.

    With use_cuda_graph plan and run may both be captured, and a captured run may be replayed after planning other
    lengths for the same batch size: give padding requests no tokens and no pages.

    Args:
        float_workspace_buffer: scratch memory on the device to run on, for partial results of long KV under few
            queries; 128 MB suffice for every common shape. May be shared by wrappers that run on one stream. A CPU
            tensor of any size makes this a wrapper for the CPU.
        kv_layout: "NHD" (pages of `[page_size, num_kv_heads, head_dim]`) or "HND" (`[num_kv_heads, page_size,
            head_dim]`).
        use_cuda_graph: keep index tensors in the buffers below, whose addresses a graph may hold.
        qo_indptr_buf, paged_kv_indptr_buf: int32 `[batch_size + 1]`. They fix the batch size.
        paged_kv_indices_buf: int32, as long as the longest list of pages.
        paged_kv_last_page_len_buf: int32 `[batch_size]`.
        custom_mask_buf, mask_indptr_buf: uint8, as long as the longest packed mask, and int32 `[batch_size + 1]`;
            needed only by plans with a custom mask.
        backend, jit_kwargs: accepted for compatibility.
        jit_args: None; upstream's C++ of an attention variant does not compile against these kernels.
    """

    _op_name = "batch_prefill_paged"
    _index_names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
    _paged_kv_indptr_buf = IndexBuffer("kv_indptr")
    _paged_kv_indices_buf = IndexBuffer("kv_indices")
    _paged_kv_last_page_len_buf = IndexBuffer("last_page_len")

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Optional[torch.Tensor] = None,
        paged_kv_indptr_buf: Optional[torch.Tensor] = None,
        paged_kv_indices_buf: Optional[torch.Tensor] = None,
        paged_kv_last_page_len_buf: Optional[torch.Tensor] = None,
        custom_mask_buf: Optional[torch.Tensor] = None,
        mask_indptr_buf: Optional[torch.Tensor] = None,
        backend: str = "auto",
        jit_args: Optional[list[Any]] = None,
        jit_kwargs: Optional[dict[str, Any]] = None,
    ) -> None:
        buffers = {
            "qo_indptr_buf": qo_indptr_buf,
            "paged_kv_indptr_buf": paged_kv_indptr_buf,
            "paged_kv_indices_buf": paged_kv_indices_buf,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
        }
        mask_buffers = (custom_mask_buf, mask_indptr_buf)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers, mask_buffers, backend, jit_args)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: Optional[int] = None,
        custom_mask: Optional[torch.Tensor] = None,
        packed_custom_mask: Optional[torch.Tensor] = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type: DataType = "float16",
        kv_data_type: Optional[DataType] = None,
        non_blocking: bool = True,
        *,
        o_data_type: Optional[DataType] = None,
        fixed_split_size: Optional[int] = None,
        disable_split_kv: bool = False,
        variant: Optional[Functional] = None,
        mask: Optional[Functional] = None,
        **later: Any,
    ) -> None:
        """Describe the batch that the following runs work on. Neither copies from the device nor waits for it.

        Args:
            qo_indptr: int32 `[batch_size + 1]`; request i owns tokens `[qo_indptr[i], qo_indptr[i + 1])` of q. On the
                device (used in place) or the CPU (uploaded asynchronously), as the three below.
            paged_kv_indptr: int32 `[batch_size + 1]`; request i owns `paged_kv_indices[indptr[i]:indptr[i + 1]]`.
            paged_kv_indices: int32 page numbers; may be longer than needed.
            paged_kv_last_page_len: int32 `[batch_size]`, entries in use of each request's last page, 1 to page_size.
            num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo: shapes; any page size, any multiple of
                num_kv_heads; head_dim_vo defaults to head_dim_qk.
            custom_mask: bool, the requests' `[qo_len, kv_len]` masks flattened and concatenated; True = visible. Takes
                the place of causal.
            packed_custom_mask: the same, packed eight to a byte (little-endian, every request from a byte of its own).
            causal: query i sees keys up to its own position.
            pos_encoding_mode: "NONE", "ROPE_LLAMA" (q and k are rotated on the fly) or "ALIBI".
            sm_scale: factor of q·k; default `1 / sqrt(head_dim_qk)`.
            window_left: keys seen before the query's own position; -1 for all.
            logits_soft_cap: logits become `cap * tanh(logits / cap)`; None or 0 for none.
            rope_scale, rope_theta: of ROPE_LLAMA; default 1 and 1e4.
            q_data_type, kv_data_type: dtypes of q and of the cache (default that of q). What run() is given decides;
                naming them here loads the right kernel ahead of a capture.
            o_data_type: None, or that of q; fp16 or bf16 where q is fp8 e4m3, as the cache then is.
            fixed_split_size, disable_split_kv: with either, a row's result is the same, bit by bit, whatever shares the
                batch. Requests of one tile of queries (128 rows or so: tokens times query heads of a KV head) are split
                by so many pages, into 16 splits at most; or one block walks all KV of its queries. Give the workspace
                room: up to 20 partial results for each row of such requests.
            variant, mask: functions of scores and of masks that flashinfer.variant and flashinfer.mask made
                (docs/variants.md). A mask hides keys besides those that causal, the window or a custom mask do.
            use_fp16_qk_reduction, non_blocking: accepted for compatibility.
            later: what later releases added, as far as it asks for nothing that is not here (compat.py). window_right
                is -1, or with causal any, or 0, which is causal. Multi-item scoring is prefix_len_ptr, integers
                `[batch_size]`: the tokens before the first delimiter; and token_pos_in_items_ptr, integers below 2^16
                (uint16 on the device is used in place) for the tokens from there on: 0 for a delimiter, 1, 2, … for
                those of an item, each request's padded to token_pos_in_items_len. Tokens see the prefix and their own
                item, up to themselves, and delimiters the prefix alone.

        Raises:
            ValueError: a shape, dtype or device does not fit, or a workspace is too small.
            UnsupportedConfig: no kernel for these arguments.
        """
        kind, masks = self._mask_of(custom_mask, packed_custom_mask, causal, later)
        arguments = (
            kind, num_qo_heads, num_kv_heads, page_size, head_dim_qk, head_dim_vo, q_data_type, kv_data_type,
            o_data_type, (fixed_split_size, disable_split_kv), (variant, mask),
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta,
        )  # fmt: skip
        given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._settle(given, arguments, masks, later.get("max_token_per_sequence") if later else None)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        *args: Any,
        q_scale: GivenScale = None,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
        window_left: Optional[int] = None,
        sinks: Optional[torch.Tensor] = None,
        **later: Any,
    ) -> Result:
        """Attention of one layer, as planned.

        Args:
            q: `[num_tokens, num_qo_heads, head_dim_qk]`, unit stride in the last axis.
            paged_kv_cache: one tensor `[pages, 2, page_size, num_kv_heads, head_dim]` (NHD; HND swaps the axes of
                page_size and heads) or a tuple (k, v) of such tensors without the axis of 2; dtype of q, or fp8 e4m3 or
                e5m2. What lies in entries no request uses is never read into a result, NaN included.
            q_scale, k_scale, v_scale: factors of quantized q, k and v, numbers or one float32 on the device, which the
                kernel alone reads; those of q and k are positive.
            out: `[num_tokens, num_qo_heads, head_dim_vo]`, dtype of q, or o_data_type; allocated when None.
            lse: fp32 `[num_tokens, num_qo_heads]`; allocated when None and return_lse.
            return_lse: also return the base-2 logarithm of the sum of exponentials, that of the sink included.
            enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).
            window_left: overrides the planned one.
            sinks: fp32 `[num_qo_heads]`, a logit for each query head that takes part in the softmax as a key without a
                value would (GPT-OSS): one more term exp(sinks[h]) of the denominator, on which no scale and no soft cap
                has an effect. -inf for none.
            later: as in `plan`.

        Returns:
            out, or (out, lse). A query that sees no key gives zeros and -inf, or the LSE of the sink alone.

        Raises:
            ValueError: nothing is planned, or a shape, dtype, device or stride does not fit.
        """
        if args:
            raise TypeError(
                f"{self._op_name}: run() takes q and paged_kv_cache, got {len(args)} more; give the rest by keyword, "
                "scales of quantized tensors as q_scale, k_scale and v_scale"
            )
        if later:
            check_later_arguments(self._op_name, later)
        if sinks is None:
            sinks = self._sinks
        overrides = None if window_left is None else Overrides(window_left=window_left)
        scales = NO_SCALES if q_scale is k_scale is v_scale is None else (q_scale, k_scale, v_scale)
        return self._run(q, paged_kv_cache, out, lse, return_lse, scales, enable_pdl, overrides, None, sinks)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        *,
        return_lse: bool = False,
    ) -> Result:
        """The older spelling of `run`, which takes every option from its own arguments: a default here overrides what
        was planned, but for a custom mask, which takes the place of causal.
        """
        overrides = Overrides.of_forward(
            causal,
            pos_encoding_mode,
            window_left,
            logits_soft_cap,
            sm_scale,
            rope_scale,
            rope_theta,
            self._head_dim_of(q),
        )
        return self._run(q, paged_kv_cache, None, None, return_lse, (None, k_scale, v_scale), None, overrides)
