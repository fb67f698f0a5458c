# SPDX-License-Identifier: Apache-2.0
"""Wrappers for layers with attention sinks, under the names and signatures of upstream: those of decode and of paged
prefill, whose every run brings the sinks."""

from __future__ import annotations

from typing import Any, Optional

import torch

from flashinfer.attention.compat import check_later_arguments
from flashinfer.attention.decode.paged import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.attention.planned import DataType, PlannedAttention, Result
from flashinfer.attention.prefill.paged import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.attention.variant import GivenScale, Overrides
from flashinfer.errors import UnsupportedConfig
from flashinfer.host.paged_cache import PagedCache


class _WithSinks(PlannedAttention):
    _has_sinks = True

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        sinks: Optional[torch.Tensor] = None,
        sm_scale: Optional[float] = None,
        *args: Any,
        q_scale: GivenScale = None,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
        window_left: Optional[int] = None,
        **later: Any,
    ) -> Result:
        """Attention of one layer, as planned.

        Args:
            sinks: fp32 `[num_qo_heads]`, a logit for each query head; None is a TypeError.
            sm_scale: overrides the planned one.
            The others, what is returned and what is raised: as in `run` of the wrapper without sinks.
        """
        if args:
            raise TypeError(
                f"{self._op_name}: run() takes q, paged_kv_cache, sinks and sm_scale; give the rest by keyword"
            )
        if later:
            check_later_arguments(self._op_name, later)
        overrides = None if sm_scale is window_left is None else Overrides(window_left=window_left, sm_scale=sm_scale)
        scales = (q_scale, k_scale, v_scale)
        return self._run(q, paged_kv_cache, out, lse, return_lse, scales, enable_pdl, overrides, None, sinks)


def _require_no_position(op: str, pos_encoding_mode: object) -> None:
    if pos_encoding_mode != "NONE":
        raise UnsupportedConfig(
            f"{op}: pos_encoding_mode is {pos_encoding_mode!r:.60}; expected 'NONE', since plan() decides. Next step: "
            "give it to plan()"
        )


class BatchAttentionWithAttentionSinkWrapper(_WithSinks, BatchPrefillWithPagedKVCacheWrapper):
    """`BatchPrefillWithPagedKVCacheWrapper` for layers with attention sinks (GPT-OSS): `run(q, paged_kv_cache, sinks)`.

    Args:
        float_workspace_buffer, kv_layout, use_cuda_graph, custom_mask_buf, mask_indptr_buf: as there.
        qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf: as there.
        pos_encoding_mode: "NONE"; plan() takes others.
        backend, use_fp16_qk_reduction, q_data_type, kv_data_type, head_dim_qk, head_dim_vo, window_left: accepted for
            compatibility, what plan() is given decides.

    Raises:
        UnsupportedConfig: pos_encoding_mode is not "NONE".
    """

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
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: DataType = torch.bfloat16,
        kv_data_type: DataType = torch.bfloat16,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        _require_no_position(self._op_name, pos_encoding_mode)
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf,
            paged_kv_indices_buf, paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf, backend,
        )  # fmt: skip


class BatchDecodeWithAttentionSinkWrapper(_WithSinks, BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` for layers with attention sinks (GPT-OSS): `run(q, paged_kv_cache, sinks)`.

    Args:
        float_workspace_buffer, kv_layout: as there.
        backend, q_data_type, kv_data_type, head_dim_qk, head_dim_vo, window_left: accepted for compatibility, what
            plan() is given decides.
        kwargs: use_cuda_graph and the three buffers, as there.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        backend: str = "auto",
        q_data_type: DataType = torch.bfloat16,
        kv_data_type: DataType = torch.bfloat16,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
        **kwargs: Any,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, backend=backend, **kwargs)
