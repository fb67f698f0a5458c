# SPDX-License-Identifier: Apache-2.0
"""Cascade attention: a KV that several requests share (a system prompt) is attended to once for all of their queries,
the unique rest per request, and the results are merged exactly (merge.py).

Ye et al. 2024, "Cascade Inference: Memory Bandwidth Efficient Shared Prefix Batch Decoding".
"""

from __future__ import annotations

import contextlib
from typing import Any, Optional, Union

import torch

from flashinfer.attention import workspace
from flashinfer.attention.decode.paged import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.attention.merge import merge_state_in_place
from flashinfer.attention.planned import all_or_none
from flashinfer.attention.prefill.paged import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.attention.prefill.single import single_prefill_with_kv_cache_return_lse
from flashinfer.host import checks
from flashinfer.host.handles import Uncopyable
from flashinfer.host.paged_cache import PagedCache

DataType = Union[str, torch.dtype]
_MOST_LEVELS = 256  # of which each is a wrapper


class MultiLevelCascadeAttentionWrapper(Uncopyable):
    """Attention over a KV shared at several levels: level 0 by the most requests, the last by none.

    Every level is a paged prefill of its own: its entry of qo_indptr_arr groups the tokens that share its pages. The
    last level is causal if the plan says so, the others show all their keys to all their queries. Results are merged
    exactly.

    Args:
        num_levels: of the cascade, 1 to 256.
        float_workspace_buffer, kv_layout, use_cuda_graph: as in `BatchPrefillWithPagedKVCacheWrapper`.
        qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr: one buffer
            a level, needed with use_cuda_graph.
    """

    _op_name = "multi_level_cascade"

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Optional[list[torch.Tensor]] = None,
        paged_kv_indptr_buf_arr: Optional[list[torch.Tensor]] = None,
        paged_kv_indices_buf_arr: Optional[list[torch.Tensor]] = None,
        paged_kv_last_page_len_buf_arr: Optional[list[torch.Tensor]] = None,
    ) -> None:
        op = self._op_name
        num_levels = checks.integer(op, "num_levels", num_levels, 1, _MOST_LEVELS)
        buffers = (
            qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr
        )  # fmt: skip
        if use_cuda_graph and any(buffer is None for buffer in buffers):
            raise ValueError(f"{op}: use_cuda_graph=True needs four lists of {num_levels} buffers, one a level")
        for buffer in buffers:
            if buffer is not None:
                _require_one_a_level(op, "a list of buffers", buffer, num_levels)
        self._use_cuda_graph = use_cuda_graph
        self._is_half_planned = False  # under use_cuda_graph: the buffers of some levels hold another plan
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(
                float_workspace_buffer,
                kv_layout,
                use_cuda_graph,
                *[None if buffer is None else buffer[level] for buffer in buffers],  # type: ignore[arg-type]
            )
            for level in range(num_levels)
        ]

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: list[torch.Tensor]
    ) -> None:
        """Use other workspaces from the next plan on: one float workspace for all, an int workspace or more a level."""
        op, num_levels = self._op_name, len(self._levels)
        _require_one_a_level(op, "int_workspace_buffers", int_workspace_buffers, num_levels, or_more=True)
        for buffer in (float_workspace_buffer, *int_workspace_buffers):
            workspace.require_workspace(op, buffer, self._levels[0].device)
        for level, int_workspace_buffer in zip(self._levels, int_workspace_buffers):
            level.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def plan(
        self,
        qo_indptr_arr: list[torch.Tensor],
        paged_kv_indptr_arr: list[torch.Tensor],
        paged_kv_indices_arr: list[torch.Tensor],
        paged_kv_last_page_len: list[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
    ) -> None:
        """Describe the batch, level by level; the arguments are those of `BatchPrefillWithPagedKVCacheWrapper.plan`.

        A plan that fails leaves the last one in force. Under use_cuda_graph, where buffers may have been filled by
        then, runs are refused until one succeeds.

        Raises: as there, and ValueError for a list of another length than the number of levels, or, of index tensors
        on the CPU, for levels of different numbers of tokens.
        """
        tables = {
            "qo_indptr_arr": qo_indptr_arr,
            "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        for name, given in tables.items():
            _require_one_a_level(self._op_name, name, given, len(self._levels))
        for indptr in qo_indptr_arr:
            checks.require_addresses(self._op_name, qo_indptr_arr=indptr)
        num_tokens = [int(indptr[-1]) for indptr in qo_indptr_arr if _has_entries_on_host(indptr)]
        checks.require(
            len(set(num_tokens)) <= 1,
            self._op_name,
            f"the entries of qo_indptr_arr end at {num_tokens}; expected the same number of tokens in all levels",
        )
        self._is_half_planned = self._use_cuda_graph  # until all are planned
        with contextlib.nullcontext() if self._use_cuda_graph else all_or_none(self._levels):
            for level, *table in zip(self._levels, *tables.values()):
                level.plan(
                    *table,
                    num_qo_heads,
                    num_kv_heads,
                    head_dim,
                    page_size,
                    causal=causal and level is self._levels[-1],
                    pos_encoding_mode=pos_encoding_mode,
                    sm_scale=sm_scale,
                    window_left=window_left,
                    logits_soft_cap=logits_soft_cap,
                    rope_scale=rope_scale,
                    rope_theta=rope_theta,
                    q_data_type=q_data_type,
                    kv_data_type=kv_data_type,
                )
        self._is_half_planned = False

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache: PagedCache) -> torch.Tensor:
        """Attention of one layer: q `[num_tokens, num_qo_heads, head_dim]`, one cache for all levels; returns the
        output.
        """
        if self._is_half_planned:
            raise ValueError(f"{self._op_name}: the last plan() failed and left buffers half filled; call plan() again")
        out, lse = self._levels[-1].run(q, paged_kv_cache, return_lse=True)
        for level in self._levels[:-1]:
            merge_state_in_place(out, lse, *level.run(q, paged_kv_cache, return_lse=True))
        assert isinstance(out, torch.Tensor)
        return out

    forward = run

    def end_forward(self) -> None:
        """Kept for compatibility; there is nothing to release."""


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper(Uncopyable):
    """Decode of a batch whose requests share a prefix: the prefix as one prefill, the unique rest paged, merged."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._unique = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Use other workspaces from the next plan on."""
        self._unique.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        unique_kv_indptr: torch.Tensor,
        unique_kv_indices: torch.Tensor,
        unique_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: DataType = "float16",
    ) -> None:
        """Describe the unique part of the batch; the arguments are those of
        `BatchDecodeWithPagedKVCacheWrapper.plan`.
        """
        self._unique.plan(
            unique_kv_indptr,
            unique_kv_indices,
            unique_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            data_type=data_type,
        )

    plan = begin_forward

    def forward(
        self, q: torch.Tensor, k_shared: torch.Tensor, v_shared: torch.Tensor, unique_kv_cache: PagedCache
    ) -> torch.Tensor:
        """q: `[batch_size, num_qo_heads, head_dim]`; k_shared, v_shared: `[shared_len, num_kv_heads, head_dim]` (NHD).

        Returns the output, shaped like q.
        """
        out, lse = single_prefill_with_kv_cache_return_lse(q, k_shared, v_shared, kv_layout=self._kv_layout)
        merge_state_in_place(out, lse, *self._unique.run(q, unique_kv_cache, return_lse=True))
        return out

    run = forward

    def end_forward(self) -> None:
        """Kept for compatibility; there is nothing to release."""


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(Uncopyable):
    """Prefill of a batch whose requests share a prefix: the prefix as one prefill, the unique rest paged, merged."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._unique = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Use other workspaces from the next plan on."""
        self._unique.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        """Describe the unique part of the batch; the arguments are those of
        `BatchPrefillWithPagedKVCacheWrapper.plan`.
        """
        self._unique.plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            **options,
        )

    plan = begin_forward

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: PagedCache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        """q: `[num_tokens, num_qo_heads, head_dim]`; k_shared, v_shared: `[shared_len, num_kv_heads, head_dim]` (NHD).

        The shared prefix lies before every query; causal concerns the unique part. Returns the output, shaped like q.
        """
        out, lse = single_prefill_with_kv_cache_return_lse(
            q, k_shared, v_shared, kv_layout=self._kv_layout, sm_scale=sm_scale
        )
        other, other_lse = self._unique.forward(
            q, unique_kv_cache, causal, sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta, return_lse=True
        )
        merge_state_in_place(out, lse, other, other_lse)
        return out

    run = forward

    def end_forward(self) -> None:
        """Kept for compatibility; there is nothing to release."""


def _require_one_a_level(op: str, name: str, given: Any, num_levels: int, or_more: bool = False) -> None:
    is_list = isinstance(given, (list, tuple))
    got = f"has {len(given)} entries" if is_list else f"is a {type(given).__name__}"
    fits = is_list and (len(given) == num_levels or (or_more and len(given) > num_levels))
    checks.require(fits, op, f"{name} {got}; expected a list of {num_levels}, one a level")


def _has_entries_on_host(indptr: Any) -> bool:
    return isinstance(indptr, torch.Tensor) and indptr.is_cpu and indptr.dim() == 1 and indptr.numel() > 0
