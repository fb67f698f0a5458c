# SPDX-License-Identifier: Apache-2.0
"""Prefill over ragged keys and values: the requests' rows end to end, without a cache."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch

from flashinfer.attention.compat import IndexBuffer, check_later_arguments
from flashinfer.attention.plan import Shape
from flashinfer.attention.planned import NO_SCALES, DataType, Result
from flashinfer.attention.prefill.plan import RaggedKv
from flashinfer.attention.prefill.wrapper import PrefillWrapper
from flashinfer.attention.variant import Functional, GivenScale, Overrides
from flashinfer.host import checks
from flashinfer.host.paged_cache import PagedKv


class BatchPrefillWithRaggedKVCacheWrapper(PrefillWrapper):
    """Prefill of a batch over keys and values that lie one request after the other, as they leave the projections.

    Args:
        kv_layout: "NHD": `[num_kv_tokens, num_kv_heads, head_dim]`; "HND": the first axes swapped.
        kv_indptr_buf: int32 `[batch_size + 1]`, in place of the three buffers of pages.

    Other arguments: as `BatchPrefillWithPagedKVCacheWrapper`.
    """

    _op_name = "batch_prefill_ragged"
    _index_names = ("qo_indptr", "kv_indptr")
    _roles = ("qo_indptr", "kv_indptr")
    _kv_indptr_buf = IndexBuffer("kv_indptr")

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Optional[torch.Tensor] = None,
        kv_indptr_buf: Optional[torch.Tensor] = None,
        custom_mask_buf: Optional[torch.Tensor] = None,
        mask_indptr_buf: Optional[torch.Tensor] = None,
        backend: str = "auto",
        jit_args: Optional[list[Any]] = None,
        jit_kwargs: Optional[dict[str, Any]] = None,
    ) -> None:
        mask_buffers = (custom_mask_buf, mask_indptr_buf)
        buffers = {"qo_indptr_buf": qo_indptr_buf, "kv_indptr_buf": kv_indptr_buf}
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers, mask_buffers, backend, jit_args)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: Optional[int] = None,
        custom_mask: Optional[torch.Tensor] = None,
        packed_custom_mask: Optional[torch.Tensor] = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type: DataType = "float16",
        kv_data_type: Optional[DataType] = None,
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
            qo_indptr, kv_indptr: int32 `[batch_size + 1]`: where each request's rows start in q, and in k and v.

        Other arguments and raises: as `BatchPrefillWithPagedKVCacheWrapper.plan`.
        """
        kind, masks = self._mask_of(custom_mask, packed_custom_mask, causal, later)
        arguments = (
            kind, num_qo_heads, num_kv_heads, 1, head_dim_qk, head_dim_vo, q_data_type, kv_data_type,
            o_data_type, (fixed_split_size, disable_split_kv), (variant, mask),
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta,
        )  # fmt: skip
        given = (qo_indptr, kv_indptr)
        self._settle(given, arguments, masks, later.get("max_token_per_sequence"))

    begin_forward = plan

    def _kv(self, shape: Shape, kv_dtype: torch.dtype) -> Union[PagedKv, RaggedKv]:
        return RaggedKv(self._kv_layout, shape.num_kv_heads, shape.head_dim_qk, shape.head_dim_vo)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: GivenScale = None,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        o_scale: Optional[float] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
        sinks: Optional[torch.Tensor] = None,
        **later: Any,
    ) -> Result:
        """Attention of one layer, as planned.

        Args:
            q: `[num_tokens, num_qo_heads, head_dim_qk]`, unit stride in the last axis.
            k, v: `[num_kv_tokens, num_kv_heads, head_dim_qk]` and `[.., head_dim_vo]` (NHD); dtype of q, or fp8.
            q_scale, k_scale, v_scale: factors of quantized q, k and v, numbers or one float32 on the device, which the
                kernel alone reads; those of q and k are positive.
            o_scale: the output is divided by it.
            out, lse, return_lse, enable_pdl, sinks: as in `BatchPrefillWithPagedKVCacheWrapper.run`.

        Returns and raises: as there.
        """
        if args:
            raise TypeError(
                f"{self._op_name}: run() takes q, k and v, got {len(args)} more; give the rest by keyword, "
                "scales of quantized tensors as q_scale, k_scale and v_scale"
            )
        if later:
            check_later_arguments(self._op_name, later)
        if o_scale is not None:
            if not isinstance(v_scale, torch.Tensor):
                v_scale = 1.0 if v_scale is None else checks.real(self._op_name, "v_scale", v_scale)
            v_scale = v_scale / checks.real(self._op_name, "o_scale", o_scale, above=0.0)
        if sinks is None:
            sinks = self._sinks
        scales = NO_SCALES if q_scale is k_scale is v_scale is None else (q_scale, k_scale, v_scale)
        return self._run(q, (k, v), out, lse, return_lse, scales, enable_pdl, None, None, sinks)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
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
        return self._run(q, (k, v), None, None, return_lse, (None, None, None), None, overrides)
