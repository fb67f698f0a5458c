# SPDX-License-Identifier: Apache-2.0
"""Prefill beside decode, each with arguments of its own, under the names and signatures of upstream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional, Union

import torch

from flashinfer.attention import lengths
from flashinfer.attention.beside import MixedPlan
from flashinfer.attention.compat import require_no_jit_args
from flashinfer.attention.decode.paged import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.attention.planned import DataType, PlannedAttention, all_or_none
from flashinfer.attention.prefill.launch import runs_beside
from flashinfer.attention.prefill.paged import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.attention.prefill.single import single_prefill_with_kv_cache
from flashinfer.attention.variant import GivenScale, Overrides
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks, indices, memo
from flashinfer.host.handles import Uncopyable
from flashinfer.host.paged_cache import PagedCache
from flashinfer.host.traced import is_dynamo_compiling

Pair = tuple[torch.Tensor, torch.Tensor]


class PODWithPagedKVCacheWrapper(Uncopyable):
    """Prefill of one sequence beside decode of a batch over a paged cache (POD-Attention, Kamath et al. 2024,
    arXiv:2410.18038).

    The two have caches of their own, and are two launches, one behind the other. To have them overlap, put the sequence
    into the paged cache and use `BatchAttention`.

    Args:
        float_workspace_buffer: scratch memory on the device to run on; 128 MB suffice for every common shape. A CPU
            tensor of any size makes this a wrapper for the CPU.
        kv_layout: of the paged cache, "NHD" or "HND".
        use_cuda_graph, paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer: as of
            `BatchDecodeWithPagedKVCacheWrapper`.
        jit_args: None; upstream's C++ of an attention variant does not compile against these kernels.
    """

    _op_name = "pod_with_paged_kv_cache"

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: Optional[torch.Tensor] = None,
        paged_kv_indices_buffer: Optional[torch.Tensor] = None,
        paged_kv_last_page_len_buffer: Optional[torch.Tensor] = None,
        jit_args: Optional[list[Any]] = None,
    ) -> None:
        require_no_jit_args(self._op_name, jit_args)
        self._decode = BatchDecodeWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout, use_cuda_graph, False, paged_kv_indptr_buffer, paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )  # fmt: skip

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._decode.is_cuda_graph_enabled

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Use other workspaces from the next plan on."""
        self._decode.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: Optional[DataType] = "float16",
        kv_data_type: Optional[DataType] = None,
        data_type: Optional[DataType] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        non_blocking: bool = True,
    ) -> None:
        """Describe the batch that is decoded; the arguments are those of `BatchDecodeWithPagedKVCacheWrapper.plan`.
        What is prefilled, run() is told.

        Raises: as there.
        """
        self._decode.plan(
            indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode,
            window_left, None, q_data_type, kv_data_type, data_type, sm_scale, rope_scale, rope_theta,
        )  # fmt: skip

    begin_forward = plan

    def end_forward(self) -> None:
        """Kept for compatibility; there is nothing to release."""

    def run(
        self,
        q_p: torch.Tensor,
        k_p: torch.Tensor,
        v_p: torch.Tensor,
        q_d: torch.Tensor,
        paged_kv_cache_d: PagedCache,
        custom_mask_p: Optional[torch.Tensor] = None,
        packed_custom_mask_p: Optional[torch.Tensor] = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: Optional[float] = None,
        window_left_p: int = -1,
        rope_scale_p: Optional[float] = None,
        rope_theta_p: Optional[float] = None,
        return_lse_p: bool = False,
        custom_mask_d: Optional[torch.Tensor] = None,
        packed_custom_mask_d: Optional[torch.Tensor] = None,
        causal_d: bool = False,
        kv_layout_d: str = "NHD",
        pos_encoding_mode_d: str = "NONE",
        sm_scale_d: Optional[float] = None,
        window_left_d: int = -1,
        rope_scale_d: Optional[float] = None,
        rope_theta_d: Optional[float] = None,
        q_scale: GivenScale = None,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: Optional[bool] = None,
        *args: Any,
    ) -> Pair:
        """Attention of one layer: of a sequence that is prefilled, and of the planned batch.

        Args:
            q_p, k_p, v_p: `[qo_len, num_qo_heads, head_dim]` and `[kv_len, num_kv_heads, head_dim]` (NHD) of the
                sequence.
            q_d, paged_kv_cache_d: as of `BatchDecodeWithPagedKVCacheWrapper.run`.
            custom_mask_p, packed_custom_mask_p, causal_p, kv_layout_p: as of `single_prefill_with_kv_cache`.
            pos_encoding_mode_p, sm_scale_p, window_left_p, rope_scale_p, rope_theta_p: as there.
            q_scale, k_scale, v_scale: of decode.
            causal_d, kv_layout_d: accepted: one query sees the same keys under a causal mask, and the constructor has
                the layout.
            pos_encoding_mode_d, sm_scale_d, window_left_d, rope_scale_d, rope_theta_d: their defaults, or what was
                planned.
            custom_mask_d, packed_custom_mask_d: None.
            return_lse_p, return_lse_d: accepted for compatibility; as in upstream, no LSE is returned.
            use_fp16_qk_reduction: accepted for compatibility.
            enable_pdl: of decode.

        Returns:
            (out_p, out_d), of the shapes and dtypes of q_p and q_d.

        Raises:
            ValueError, TypeError: nothing is planned, or a shape, dtype, device or stride does not fit.
            UnsupportedConfig: no kernel for these arguments.
        """
        if args:
            raise TypeError(f"{self._op_name}: run() got {len(args)} arguments more than it has")
        self._require_planned(
            custom_mask=(custom_mask_d, None), packed_custom_mask=(packed_custom_mask_d, None),
            pos_encoding_mode=(pos_encoding_mode_d, "NONE"), sm_scale=(sm_scale_d, None),
            window_left=(window_left_d, -1), rope_scale=(rope_scale_d, None), rope_theta=(rope_theta_d, None),
        )  # fmt: skip
        out_p = single_prefill_with_kv_cache(
            q_p, k_p, v_p, custom_mask_p, packed_custom_mask_p, causal_p, kv_layout_p, pos_encoding_mode_p, False,
            sm_scale_p, window_left_p, None, rope_scale_p, rope_theta_p,
        )  # fmt: skip
        out_d = self._decode.run(
            q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, enable_pdl=enable_pdl
        )
        assert isinstance(out_p, torch.Tensor) and isinstance(out_d, torch.Tensor)
        return out_p, out_d

    def _require_planned(self, **given: tuple[Any, Any]) -> None:
        """Options of decode that a run was given, with their defaults, are what plan() settled."""
        plan = self._decode._plan
        if plan is None:
            raise ValueError(f"{self._op_name}: run() before plan(); call plan() with the batch's lengths first")
        for name, (value, default) in given.items():
            planned = getattr(plan.variant, name, None)
            if value is not default and value != default and value != planned:
                raise UnsupportedConfig(
                    f"{self._op_name}: {name}_d is {value!r:.60}; expected {default!r} or what was "
                    f"planned, {planned!r}. Next step: give it to plan()"
                )


def _one_each(qo_indptr: Any) -> bool:
    """Whether the host sees that request i has row i of q, and no other."""
    if not isinstance(qo_indptr, torch.Tensor) or qo_indptr.dtype not in (torch.int32, torch.int64):
        return False
    return indices.are_visible(qo_indptr) and qo_indptr.dim() == 1 and qo_indptr.tolist() == [*range(len(qo_indptr))]


class _MixedWrapper(BatchPrefillWithPagedKVCacheWrapper):
    _plan_class = MixedPlan


class BatchPODWithPagedKVCacheWrapper(Uncopyable):
    """Prefill of some requests beside decode of others, each over a paged cache.

    On Hopper it is what `BatchAttention` does where the two are slices of one batch: q_d follows q_p in memory, both
    have the same cache, plan() was given qo_indptr_d on the CPU, with one query each, and run() has no mask and no
    scales. Otherwise it is two launches, one behind the other.

    A CUDA graph of run() alone holds for the plan that it was captured under, whose copies the next plan() gives up.

    Args:
        float_workspace_buffer, kv_layout: as of `BatchPrefillWithPagedKVCacheWrapper`.
    """

    _op_name = "batch_pod_with_paged_kv_cache"

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._prefill: PlannedAttention = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._decode: PlannedAttention = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._append: PlannedAttention = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._both: PlannedAttention = _MixedWrapper(float_workspace_buffer, kv_layout)
        self._planned: PlannedAttention = self._decode  # which of the two has the requests to decode
        self._plan_both: Optional[Callable[[int], None]] = None  # after so many rows of q_p
        self._rows_before = -1  # of which that was called last
        self._joins = runs_beside(self._prefill.device)  # elsewhere two calls are faster
        self._replan: Optional[Callable[..., None]] = None  # what is prefilled, with or without a mask
        self._is_causal = self._has_mask = False  # the last run

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return False

    def plan(
        self,
        qo_indptr_p: torch.Tensor,
        kv_indptr_p: torch.Tensor,
        kv_indices_p: torch.Tensor,
        last_page_len_p: torch.Tensor,
        qo_indptr_d: torch.Tensor,
        kv_indptr_d: torch.Tensor,
        kv_indices_d: torch.Tensor,
        last_page_len_d: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: Optional[DataType] = "float16",
        kv_data_type: Optional[DataType] = None,
        data_type: Optional[DataType] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        non_blocking: bool = True,
    ) -> None:
        """Describe the requests that are prefilled (`_p`) and those that are decoded (`_d`). Neither copies from the
        device nor waits for it.

        Args:
            qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p: as of `BatchPrefillWithPagedKVCacheWrapper.plan`.
            qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d: likewise. The kernel is that of decode where
                qo_indptr_d is on the CPU and every request has one query, else that of prefill without a mask.
                Whatever is on the device is copied, in stream order: the caller may write it anew once plan() returned.
            num_qo_heads, num_kv_heads, head_dim, page_size: shapes of both.
            pos_encoding_mode, window_left, sm_scale, rope_scale, rope_theta: options of both, as there.
            q_data_type, kv_data_type, data_type: dtypes of q and of the caches; data_type of both where the first is
                None.
            non_blocking: accepted for compatibility.

        A plan that fails leaves the last one in force.

        Raises:
            ValueError, TypeError, IndexError: a shape, dtype, device or value does not fit.
            UnsupportedConfig: no kernel for these arguments.
        """
        q_type = (data_type or "float16") if q_data_type is None else q_data_type
        kv_type = (data_type or q_type) if kv_data_type is None else kv_data_type
        shapes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        options: dict[str, Any] = {
            "pos_encoding_mode": pos_encoding_mode, "window_left": window_left, "sm_scale": sm_scale,
            "rope_scale": rope_scale, "rope_theta": rope_theta, "q_data_type": q_type, "kv_data_type": kv_type,
        }  # fmt: skip
        given_p = (qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p)
        given_d: tuple[torch.Tensor, ...] = (kv_indptr_d, kv_indices_d, last_page_len_d)
        planned = self._decode
        if _one_each(qo_indptr_d) and len(qo_indptr_d):
            checks.require_tensors(self._op_name, kv_indptr_d=kv_indptr_d)
            checks.require(
                kv_indptr_d.shape == qo_indptr_d.shape, self._op_name,
                f"qo_indptr_d is for {len(qo_indptr_d) - 1} requests; expected as many as kv_indptr_d is for",
            )  # fmt: skip
        else:
            planned, given_d = self._append, (qo_indptr_d, *given_d)
        with all_or_none((self._prefill, planned)):
            self._prefill.plan(*given_p, *shapes, causal=self._is_causal, **options)
            planned.plan(*given_d, *shapes, **options)
            self._copy_what_is_in_place(planned, (*given_p, *given_d))
        self._planned = planned
        assert self._prefill._lengths is not None
        self._plan_both = functools.partial(self._plan_as_one, shapes, options)
        self._rows_before = -1
        self._replan = functools.partial(self._prefill.plan, *self._prefill._lengths.held, *shapes, **options)
        self._has_mask = False

    begin_forward = plan

    def _copy_what_is_in_place(self, planned: PlannedAttention, given: tuple[torch.Tensor, ...]) -> None:
        """Which of two kernels, and whether one for all, reads the index tensors of a plan, the runs decide. So none
        reads those of the caller: what would be used in place is copied, by one launch behind the planners."""
        assert self._prefill._lengths is not None and planned._lengths is not None
        held = (*self._prefill._lengths.held, *planned._lengths.held)
        if any(mine is theirs for mine, theirs in zip(held, given)):
            copies = lengths.side_by_side(*((tensor,) for tensor in held))
            self._prefill._own_indices(copies[:4])
            planned._own_indices(copies[4:])

    def end_forward(self) -> None:
        """Kept for compatibility; there is nothing to release."""

    def run(
        self,
        q_p: torch.Tensor,
        paged_kv_cache_p: PagedCache,
        q_d: torch.Tensor,
        paged_kv_cache_d: PagedCache,
        custom_mask_p: Optional[torch.Tensor] = None,
        packed_custom_mask_p: Optional[torch.Tensor] = None,
        causal_p: bool = False,
        q_scale: GivenScale = None,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        return_lse: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: Optional[bool] = None,
    ) -> Union[Pair, tuple[Pair, Pair]]:
        """Attention of one layer, as planned.

        Args:
            q_p, paged_kv_cache_p, q_d, paged_kv_cache_d: as of `BatchPrefillWithPagedKVCacheWrapper.run`, of what is
                prefilled and of what is decoded.
            custom_mask_p, packed_custom_mask_p, causal_p: as of `BatchPrefillWithPagedKVCacheWrapper.plan`. A mask is
                planned in every run, which torch.compile does not trace.
            q_scale, k_scale, v_scale: of decode, as in upstream.
            return_lse: also return the base-2 logarithms of the sums of exponentials.
            use_fp16_qk_reduction: accepted for compatibility.
            enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).

        Returns:
            (out_p, out_d), or ((out_p, out_d), (lse_p, lse_d)).

        Raises:
            ValueError, TypeError: nothing is planned, or a shape, dtype, device or stride does not fit.
        """
        if self._replan is None:
            raise ValueError(f"{self._op_name}: run() before plan(); call plan() with the batch's lengths first")
        is_causal = checks.boolean(self._op_name, "causal_p", causal_p)
        has_mask = custom_mask_p is not None or packed_custom_mask_p is not None
        if has_mask or self._has_mask:
            self._replan(custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p, causal=is_causal)
        self._is_causal, self._has_mask = is_causal, has_mask
        if not has_mask and q_scale is k_scale is v_scale is None:
            q = self._joined(q_p, paged_kv_cache_p, q_d, paged_kv_cache_d)
            # A planner that is captured has not run: its schedule would be missing in later calls.
            if q is not None and (self._rows_before == len(q_p) or not memo.is_capturing(q_p)):
                return self._run_both(q, len(q_p), paged_kv_cache_p, is_causal, return_lse, enable_pdl)
        first = self._prefill._run(
            q_p, paged_kv_cache_p, None, None, return_lse, (None, None, None), enable_pdl, Overrides(causal=is_causal)
        )
        second = self._planned.run(
            q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse,
            enable_pdl=enable_pdl,
        )  # fmt: skip
        if isinstance(first, tuple) and isinstance(second, tuple):
            return (first[0], second[0]), (first[1], second[1])
        assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        return first, second

    def _joined(
        self, q_p: torch.Tensor, kv_p: PagedCache, q_d: torch.Tensor, kv_d: PagedCache
    ) -> Optional[torch.Tensor]:
        """The queries of both, where one launch computes them: requests of one query see the same keys under a causal
        mask and without one, so that all are one batch, if they are over one cache and one tensor."""
        is_one = self._joins and self._planned is self._decode and not is_dynamo_compiling() and _is_same(kv_p, kv_d)
        q = _following(q_p, q_d) if is_one else None
        found = self._decode._lengths
        return q if found is not None and q is not None and len(q_d) == len(found.held[0]) - 1 else None

    def _plan_as_one(self, shapes: tuple[int, int, int, int], options: dict[str, Any], num_rows: int) -> None:
        """All requests as one batch, those to decode behind num_rows rows of q_p. Between the two there are two of
        nobody: one without queries has the pages that the list of the former holds beyond theirs, and one without keys
        the rows of q_p beyond theirs."""
        assert self._prefill._lengths is not None and self._decode._lengths is not None
        qo_indptr, kv_indptr, pages, last_page_len = self._prefill._lengths.held
        kv_indptr_d, pages_d, last_page_len_d = self._decode._lengths.held
        if indices.are_visible(kv_indptr, pages):  # or they would be looked at
            pages = pages[: int(kv_indptr[-1])]
        begins = kv_indptr_d + len(pages)
        rows = torch.arange(num_rows, num_rows + len(begins), dtype=torch.int32, device=begins.device)
        one = torch.ones_like(begins[:1])
        joined = lengths.side_by_side(
            (qo_indptr, qo_indptr[-1:], rows), (kv_indptr, begins[:1], begins), (pages, pages_d),
            (last_page_len, one, one, last_page_len_d),
        )  # fmt: skip
        self._both.plan(*joined, *shapes, causal=self._is_causal, **options)

    def _run_both(
        self,
        q: torch.Tensor,
        num_rows: int,
        kv: PagedCache,
        is_causal: bool,
        return_lse: bool,
        pdl: Optional[bool],
    ) -> Union[Pair, tuple[Pair, Pair]]:
        """num_rows: of q_p."""
        if self._rows_before != num_rows:
            assert self._plan_both is not None
            self._plan_both(num_rows)
            self._rows_before = num_rows
        overrides = Overrides(causal=is_causal)
        result = self._both._run(q, kv, None, None, return_lse, (None, None, None), pdl, overrides)
        if isinstance(result, tuple):
            out, lse = result
            return (out[:num_rows], out[num_rows:]), (lse[:num_rows], lse[num_rows:])
        return result[:num_rows], result[num_rows:]


def _following(first: torch.Tensor, second: torch.Tensor) -> Optional[torch.Tensor]:
    """Both as one tensor, if the second follows the first in memory."""
    try:
        if first.dim() != 3 or first.shape[1:] != second.shape[1:] or first.stride() != second.stride():
            return None
        follows = first.data_ptr() + len(first) * first.stride(0) * first.element_size() == second.data_ptr()
        is_one = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    except (AttributeError, RuntimeError):
        return None  # of what is no tensor in memory, as the launch will say
    if not (follows and is_one and first.dtype == second.dtype and len(first) and len(second)):
        return None
    return first.as_strided((len(first) + len(second), *first.shape[1:]), first.stride())


def _is_same(first: PagedCache, second: PagedCache) -> bool:
    """Whether both caches are the same tensors."""
    if not (isinstance(first, (tuple, list)) and isinstance(second, (tuple, list))):
        return first is second
    return len(first) == len(second) and all(one is other for one, other in zip(first, second))
