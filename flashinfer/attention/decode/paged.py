# SPDX-License-Identifier: Apache-2.0
"""Decode over a paged cache: attention of one new token per request."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer.attention.compat import IndexBuffer, causal_by_window, check_later_arguments
from flashinfer.attention.decode.plan import DecodePlan
from flashinfer.attention.plan import Shape, dtype_of, planned_functions
from flashinfer.attention.planned import NO_SCALES, DataType, GivenScales, PlannedAttention, Result
from flashinfer.attention.prefill.plan import UniformPlan, fixed_split
from flashinfer.attention.variant import Functional, GivenScale, Overrides, Variant
from flashinfer.host import checks
from flashinfer.host.paged_cache import PagedCache

# Arguments of Variant.of after head_dim.
_Options = tuple[str, int, Optional[float], Optional[float], Optional[float], Optional[float]]


class _DecodeArguments(NamedTuple):
    """What plan() hands on, in this order; as a plain tuple, which is faster to make."""

    num_qo_heads: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    q_data_type: Optional[DataType]
    kv_data_type: Optional[DataType]
    data_type: Optional[DataType]  # of both
    o_data_type: Optional[DataType]
    splitting: tuple[Optional[int], bool]  # fixed_split_size, disable_split_kv
    q_len_per_req: int
    functions: tuple[Any, Any]  # variant, mask
    pos_encoding_mode: str
    window_left: int
    logits_soft_cap: Optional[float]
    sm_scale: Optional[float]
    rope_scale: Optional[float]
    rope_theta: Optional[float]


class BatchDecodeWithPagedKVCacheWrapper(PlannedAttention):
    """Decode attention of a batch over a paged KV cache (vLLM's PagedAttention, Kwon et al. 2023, arXiv:2309.06180).

    `plan` cuts the KV of the batch into equal shares for the device, by one small kernel and without waiting for the
    device; `run` computes one layer. With use_cuda_graph both may be captured, and a captured run may be replayed after
    planning other lengths for the same batch size: give padding requests no pages.

    Args:
        float_workspace_buffer: scratch memory on the device to run on; 128 MB suffice for every common shape. Wrappers
            that run on one stream may share it. A CPU tensor of any size makes this a wrapper for the CPU.
        kv_layout: "NHD" (pages of `[page_size, num_kv_heads, head_dim]`) or "HND" (the two middle axes swapped).
        use_cuda_graph: keep index tensors in the three buffers below, whose addresses a graph may hold.
        use_tensor_cores, backend: accepted for compatibility; one kernel serves every group size.
        jit_args: None; upstream's C++ of an attention variant does not compile against these kernels. A string here is
            the backend, which later releases have in this place.
        paged_kv_indptr_buffer: int32 `[batch_size + 1]`. Fixes the batch size.
        paged_kv_indices_buffer: int32, as long as the longest list of pages.
        paged_kv_last_page_len_buffer: int32 `[batch_size]`.
    """

    _op_name = "batch_decode"
    _index_names = ("indptr", "indices", "last_page_len")
    _roles = ("kv_indptr", "kv_indices", "last_page_len")
    _paged_kv_indptr_buf = IndexBuffer("kv_indptr")
    _paged_kv_indices_buf = IndexBuffer("kv_indices")
    _paged_kv_last_page_len_buf = IndexBuffer("last_page_len")

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Optional[torch.Tensor] = None,
        paged_kv_indices_buffer: Optional[torch.Tensor] = None,
        paged_kv_last_page_len_buffer: Optional[torch.Tensor] = None,
        jit_args: Union[list[Any], str, None] = None,
        backend: str = "auto",
    ) -> None:
        if isinstance(jit_args, str):
            backend, jit_args = jit_args, None  # where later releases have it
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers, backend=backend, jit_args=jit_args)
        self._use_tensor_cores = use_tensor_cores

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

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
        logits_soft_cap: Optional[float] = None,
        q_data_type: Optional[DataType] = None,
        kv_data_type: Optional[DataType] = None,
        data_type: Optional[DataType] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        non_blocking: bool = True,
        *,
        o_data_type: Optional[DataType] = None,
        fixed_split_size: Optional[int] = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        variant: Optional[Functional] = None,
        mask: Optional[Functional] = None,
        **later: Any,
    ) -> None:
        """Describe the batch that the following runs work on. Neither copies from the device nor waits for it.

        Plan again after changing an index tensor: a run may read it before the kernel ahead of it has finished.

        Args:
            indptr: int32 `[batch_size + 1]`; request i owns `indices[indptr[i]:indptr[i + 1]]`. On the device (used in
                place) or the CPU (uploaded asynchronously).
            indices: int32 page numbers; may be longer than needed.
            last_page_len: int32 `[batch_size]`, entries in use of each request's last page, 1 to page_size.
            num_qo_heads, num_kv_heads, head_dim, page_size: shapes; any page size, any multiple of num_kv_heads.
            q_data_type, kv_data_type, o_data_type: dtypes of q (default data_type, else float16), of the cache and of
                the output (default that of q). q may be fp8 e4m3 over a cache of it, the output then is 16 bits wide
                and has to be named.
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta: as in
                `single_decode_with_kv_cache`.
            fixed_split_size, disable_split_kv: as in `BatchPrefillWithPagedKVCacheWrapper.plan`: a request's result is
                the same, bit by bit, whatever shares the batch.
            q_len_per_req: queries of every request, as in speculative decoding: q is `[batch_size * q_len_per_req, …]`,
                and they see each other causally. With it, or either of the two above, the kernels are those of prefill,
                whose output has the dtype of q, or fp16 or bf16 where q is fp8.
            variant, mask: as in `BatchPrefillWithPagedKVCacheWrapper.plan`.
            non_blocking: accepted for compatibility.
            later: what later releases added, as far as it asks for nothing that is not here (compat.py).
                window_right: anything, as no key is behind a query.

        Raises:
            ValueError: a shape, dtype or device does not fit, or a workspace is too small.
            UnsupportedConfig: no kernel for these arguments.
        """
        if later:
            causal_by_window(self._op_name, later, True)
            check_later_arguments(self._op_name, later)
        arguments = (
            num_qo_heads, num_kv_heads, page_size, head_dim, q_data_type, kv_data_type, data_type, o_data_type,
            (fixed_split_size, disable_split_kv), q_len_per_req, (variant, mask),
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta,
        )  # fmt: skip
        self._settle((indptr, indices, last_page_len), arguments)

    begin_forward = plan

    def _describe(
        self, batch_size: int, workspaces: tuple[torch.Tensor, torch.Tensor], arguments: tuple[Any, ...]
    ) -> Union[DecodePlan, UniformPlan]:
        op, given = self._op_name, _DecodeArguments(*arguments)
        q_type, kv_type, o_type = given.q_data_type, given.kv_data_type, given.o_data_type
        of_both = None if given.data_type is None else dtype_of(op, "data_type", given.data_type)
        q_dtype = of_both or torch.float16 if q_type is None else dtype_of(op, "q_data_type", q_type)
        kv_dtype = of_both or q_dtype if kv_type is None else dtype_of(op, "kv_data_type", kv_type)
        o_dtype = q_dtype if o_type is None else dtype_of(op, "o_data_type", o_type)
        head_dim, types = given.head_dim, (q_dtype, kv_dtype, o_dtype)
        shape = Shape.of(op, batch_size, given.num_qo_heads, given.num_kv_heads, given.page_size, head_dim, head_dim)
        variant = Variant.of(
            op, head_dim, given.pos_encoding_mode, given.window_left, given.logits_soft_cap, given.sm_scale,
            given.rope_scale, given.rope_theta, has_sinks=self._has_sinks,
            functions=planned_functions(op, given.functions, shape, self.device),
        )  # fmt: skip
        fixed = fixed_split(op, shape.page_size, given.splitting)
        q_len = checks.integer(op, "q_len_per_req", given.q_len_per_req, 1)
        if fixed is None and q_len == 1:
            return DecodePlan(op, self.device, shape, types, variant, self._kv_layout, workspaces)
        plan = UniformPlan(
            op, self.device, shape, types, "causal", variant, shape.pages(self._kv_layout, kv_dtype), workspaces,
            split_kv=fixed != 0, lengths=(q_len, 0), fixed_split=fixed,
        )  # fmt: skip
        split_size, is_unsplit = given.splitting
        plan.splitting = (-1 if split_size is None else split_size, bool(is_unsplit))
        return plan

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
            q: `[batch_size, num_qo_heads, head_dim]`, or as many tokens as planned of each request, side by side; unit
                stride in the last axis.
            paged_kv_cache: one tensor `[pages, 2, page_size, num_kv_heads, head_dim]` (NHD; HND has heads before
                page_size) or a tuple (k, v) of such tensors without the axis of 2. Any strides over whole rows. What
                lies in pages or entries no request uses is never read into a result, NaN included.
            q_scale, k_scale, v_scale: factors of quantized q, k and v, numbers or one float32 on the device, which the
                kernel alone reads; those of q and k are positive.
            out: of the shape of q, dtype of q or o_data_type; allocated when None.
            lse: fp32 `[len(q), num_qo_heads]`; allocated when None and return_lse.
            return_lse: also return the base-2 logarithm of the sum of exponentials, that of the sink included.
            enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).
            window_left: overrides the planned one.
            sinks: fp32 `[num_qo_heads]`, a logit for each query head that takes part in the softmax as a key without a
                value would (GPT-OSS): one more term exp(sinks[h]) of the denominator, on which no scale and no soft cap
                has an effect. -inf for none.
            later: as in `plan`.

        Returns:
            out, or (out, lse). A request without KV gives zeros and -inf, or the LSE of the sink alone.

        Raises:
            ValueError: nothing is planned, or a shape, dtype, device or stride differs from the plan.
        """
        if args:
            raise TypeError(f"{self._op_name}: run() takes q and paged_kv_cache; give the rest by keyword")
        if later:
            check_later_arguments(self._op_name, later)
        overrides = None if window_left is None else Overrides(window_left=window_left)
        scales = NO_SCALES if q_scale is k_scale is v_scale is None else (q_scale, k_scale, v_scale)
        return self._run(q, paged_kv_cache, out, lse, return_lse, scales, enable_pdl, overrides, None, sinks)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: GivenScale = None,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Result:
        """The older spelling of `run`, which takes every option from its own arguments: a default here overrides what
        was planned.
        """
        options = (pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self._forward(q, paged_kv_cache, (q_scale, k_scale, v_scale), options, return_lse=False)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: GivenScale = None,
        k_scale: GivenScale = None,
        v_scale: GivenScale = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Result:
        """`forward` that also returns the LSE."""
        options = (pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self._forward(q, paged_kv_cache, (q_scale, k_scale, v_scale), options, return_lse=True)

    def _forward(
        self, q: torch.Tensor, paged_kv_cache: PagedCache, scales: GivenScales, options: _Options, return_lse: bool
    ) -> Result:
        overrides = Overrides.of_forward(None, *options, self._head_dim_of(q))
        return self._run(q, paged_kv_cache, None, None, return_lse, scales, None, overrides)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` with use_cuda_graph=True and the buffers as required arguments."""

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer,
            kv_layout,
            use_cuda_graph=True,
            use_tensor_cores=use_tensor_cores,
            paged_kv_indptr_buffer=indptr_buffer,
            paged_kv_indices_buffer=indices_buffer,
            paged_kv_last_page_len_buffer=last_page_len_buffer,
        )


def fast_decode_plan(
    wrapper: BatchDecodeWithPagedKVCacheWrapper,
    *args: Any,
    global_override_indptr_cpu: Optional[torch.Tensor] = None,
    **kwargs: Any,
) -> None:
    """`wrapper.plan(...)`, which is as fast: planning never waits for the device. Callers may put this in its place.

    Args:
        global_override_indptr_cpu: a host-side copy of indptr, which is not needed.
        o_data_type: that of the plan before, which callers of this function do not repeat.
    """
    plan = wrapper._plan
    if plan is not None and plan.o_dtype != plan.q_dtype:
        kwargs.setdefault("o_data_type", plan.o_dtype)
    BatchDecodeWithPagedKVCacheWrapper.plan(wrapper, *args, **kwargs)
