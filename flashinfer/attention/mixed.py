"""Prefill and decode in one call, under the names and signatures of upstream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional, Union

import torch

from flashinfer.attention.compat import require_no_jit_args
from flashinfer.attention.decode.paged import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.attention.plan import NO_FUNCTIONS, Shape
from flashinfer.attention.planned import DataType, PlannedAttention, Result
from flashinfer.attention.prefill.paged import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.attention.prefill.plan import MixedPlan, RaggedKv, WholeLengthsPlan
from flashinfer.attention.prefill.single import single_prefill_with_kv_cache
from flashinfer.attention.prefill.wrapper import PrefillWrapper
from flashinfer.attention.variant import GivenScale, Overrides
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks, indices, memo
from flashinfer.host.handles import Uncopyable
from flashinfer.host.paged_cache import PagedCache, PagedKv
from flashinfer.host.traced import is_dynamo_compiling

_FLOAT_WORKSPACE_BYTES = 128 << 20
Pair = tuple[torch.Tensor, torch.Tensor]


class BatchAttention(PrefillWrapper):
    """Attention of a batch over a paged cache in which some requests are prefilled and others decoded: one plan and one
    launch, of the kernels of `BatchPrefillWithPagedKVCacheWrapper`, which compute for the former while they read for
    the latter.

    Plan and run may be captured in one CUDA graph, and replayed for other lengths in the same index tensors.

    Args:
        kv_layout: "NHD" (pages of `[page_size, num_kv_heads, head_dim]`) or "HND" (the two middle axes swapped).
        device: where to run; the workspaces are allocated there.
    """

    _op_name = "batch_attention"
    _index_names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
    _roles = ("qo_indptr", "kv_indptr", "kv_indices", "last_page_len")
    _whole_lengths = True
    _plan_class = WholeLengthsPlan

    def __init__(self, kv_layout: str = "NHD", device: Union[str, torch.device] = "cuda") -> None:
        where = torch.device(device)
        num_bytes = _FLOAT_WORKSPACE_BYTES if where.type == "cuda" else 8
        float_workspace = torch.empty(num_bytes, dtype=torch.uint8, device=where)
        buffers = dict.fromkeys(self._index_names)
        super().__init__(float_workspace, kv_layout, False, buffers, (None, None), "auto", None)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: Optional[float] = None,
        logits_soft_cap: Optional[float] = None,
        q_data_type: DataType = torch.bfloat16,
        kv_data_type: DataType = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """Describe the batch that the following runs work on. Neither copies from the device nor waits for it.

        Args:
            qo_indptr: int32 `[batch_size + 1]`; request i owns tokens `[qo_indptr[i], qo_indptr[i + 1])` of q: one to
                decode, several to prefill. On the device (used in place) or the CPU (uploaded asynchronously), as the
                three below.
            kv_indptr: int32 `[batch_size + 1]`; request i owns `kv_indices[kv_indptr[i]:kv_indptr[i + 1]]`.
            kv_indices: int32 page numbers; may be longer than needed.
            kv_len_arr: int32 `[batch_size]`, tokens of each request in the cache.
            num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size: shapes.
            causal: query i of a request sees keys up to its own position, `kv_len - qo_len + i`.
            sm_scale: factor of q·k; default `1 / sqrt(head_dim_qk)`.
            logits_soft_cap: logits become `cap * tanh(logits / cap)`; None or 0 for none.
            q_data_type, kv_data_type: dtypes of q and of the cache. What run() is given decides.
            use_profiler: must be False; the kernels record no profile.

        Raises:
            ValueError, TypeError, IndexError: a shape, dtype, device or value does not fit.
            UnsupportedConfig: no kernel for these arguments.
        """
        if use_profiler:
            raise UnsupportedConfig(
                f"{self._op_name}: use_profiler is {use_profiler!r:.60}; expected False, these kernels record no "
                "profile. Next step: torch.profiler, or Nsight"
            )
        arguments = (
            "causal" if checks.boolean(self._op_name, "causal", causal) else "none", num_qo_heads, num_kv_heads,
            page_size, head_dim_qk, checks.integer(self._op_name, "head_dim_vo", head_dim_vo, 1), q_data_type,
            kv_data_type, None, (None, False), NO_FUNCTIONS,
            "NONE", -1, logits_soft_cap, sm_scale, None, None,
        )  # fmt: skip
        self._settle((qo_indptr, kv_indptr, kv_indices, kv_len_arr), arguments)

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Kept for compatibility: one kernel takes K and V of any strides, and plan() has loaded it."""
        checks.require(variant == "independent", self._op_name, f"variant is {variant!r:.60}; expected 'independent'")
        checks.require(self._plan is not None, self._op_name, "nothing is planned; call plan() first")

    def _kv(self, shape: Shape, kv_dtype: torch.dtype) -> Union[PagedKv, RaggedKv]:
        return PagedKv(
            self._kv_layout, shape.page_size, shape.num_kv_heads, shape.head_dim_qk, shape.head_dim_vo, kv_dtype
        )

    def run(
        self,
        q: torch.Tensor,
        kv_cache: PagedCache,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: Optional[torch.Tensor] = None,
        kv_cache_sf: Union[torch.Tensor, Pair, None] = None,
    ) -> Result:
        """Attention of one layer, as planned.

        Args:
            q: `[num_tokens, num_qo_heads, head_dim_qk]`, unit stride in the last axis.
            kv_cache: one tensor `[pages, 2, page_size, num_kv_heads, head_dim]` (NHD; HND swaps the axes of page_size
                and heads) or a tuple (k, v) of such tensors without the axis of 2; dtype of q, or fp8.
            out: `[num_tokens, num_qo_heads, head_dim_vo]`, dtype of q; allocated when None.
            lse: fp32 `[num_tokens, num_qo_heads]`; allocated when None.
            k_scale, v_scale: factors of quantized k and v, numbers or one float32 on the device.
            logits_soft_cap: 0 for the planned one.
            profiler_buffer, kv_cache_sf: None.

        Returns:
            (out, lse), lse base 2. A query that sees no key gives zeros and -inf.

        Raises:
            ValueError, TypeError: nothing is planned, or a shape, dtype, device or stride does not fit.
        """
        if profiler_buffer is not None or kv_cache_sf is not None:
            name = "kv_cache_sf" if profiler_buffer is None else "profiler_buffer"
            raise UnsupportedConfig(
                f"{self._op_name}: {name} is given; expected None. Next step: an fp8 cache, and torch.profiler"
            )
        overrides = Overrides(logits_soft_cap=logits_soft_cap) if logits_soft_cap else None
        return self._run(q, kv_cache, out, lse, True, (None, k_scale, v_scale), None, overrides)


class PODWithPagedKVCacheWrapper(Uncopyable):
    """Prefill of one sequence beside decode of a batch over a paged cache (POD-Attention, Kamath et al. 2024,
    arXiv:2410.18038).

    The two have caches of their own, and are two launches, one behind the other. For one launch, put the sequence into
    the paged cache and use `BatchAttention`.

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
            custom_mask_p, packed_custom_mask_p, causal_p, kv_layout_p, pos_encoding_mode_p, sm_scale_p, window_left_p,
            rope_scale_p, rope_theta_p: as of `single_prefill_with_kv_cache`.
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

    On a GPU it is one launch, as of `BatchAttention`, where the two are slices of one batch: q_d follows q_p in memory,
    both have the same cache, plan() was given qo_indptr_d on the CPU, with one query each, and run() has no mask and no
    scales. Otherwise it is two launches, one behind the other.

    Args:
        float_workspace_buffer, kv_layout: as of `BatchPrefillWithPagedKVCacheWrapper`.
    """

    _op_name = "batch_pod_with_paged_kv_cache"

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._decode = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._append = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._both = _MixedWrapper(float_workspace_buffer, kv_layout)
        self._planned: PlannedAttention = self._decode  # which of the two has the requests to decode
        self._plan_both: Optional[Callable[[int], None]] = None  # after so many rows of q_p
        self._rows_before = -1  # of which that was called last
        self._joins = self._prefill.device.type == "cuda"  # on a CPU two calls are faster
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
                qo_indptr_d is on the CPU and every request has one query, else that of prefill without a mask. One
                launch for all plans again at the first run: till then index tensors on the device must not change.
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
        before = self._prefill._settled()
        self._prefill.plan(
            qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p, *shapes, causal=self._is_causal, **options
        )
        try:
            pages = (kv_indptr_d, kv_indices_d, last_page_len_d)
            if _one_each(qo_indptr_d):
                checks.require(
                    isinstance(kv_indptr_d, torch.Tensor) and kv_indptr_d.shape == qo_indptr_d.shape, self._op_name,
                    f"qo_indptr_d is for {len(qo_indptr_d) - 1} requests; expected as many as kv_indptr_d is for",
                )  # fmt: skip
                self._decode.plan(*pages, *shapes, **options)
                self._planned = self._decode
            else:
                self._append.plan(qo_indptr_d, *pages, *shapes, **options)
                self._planned = self._append
        except BaseException:
            self._prefill._resettle(*before)
            raise
        assert self._prefill._lengths is not None
        self._plan_both = functools.partial(self._plan_as_one, shapes, options)
        self._rows_before = -1
        replan: Callable[..., None] = self._prefill.plan
        self._replan = functools.partial(replan, *self._prefill._lengths.held, *shapes, **options)
        self._has_mask = False

    begin_forward = plan

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
        lengths = self._decode._lengths
        return q if lengths is not None and q is not None and len(q_d) == len(lengths.held[0]) - 1 else None

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
        self._both.plan(
            torch.cat([qo_indptr, qo_indptr[-1:], rows]),
            torch.cat([kv_indptr, begins[:1], begins]),
            torch.cat([pages, pages_d]),
            torch.cat([last_page_len, torch.ones_like(begins[:1]).expand(2), last_page_len_d]),
            *shapes,
            causal=self._is_causal,
            **options,
        )

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
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return first is second
    return len(first) == len(second) and all(one is other for one, other in zip(first, second))
