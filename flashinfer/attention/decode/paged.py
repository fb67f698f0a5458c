"""Decode over a paged cache: attention of one new token per request.

A wrapper is planned once per step, on the device, and run once per layer. What a run needs besides its addresses is
worked out once per plan shape and kept: the hot path is one dictionary lookup, one packed struct and one launch.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any, Optional, Union

import torch

from flashinfer import dtypes
from flashinfer.attention import workspace
from flashinfer.attention.compat import EngineNames, Planned, check_later_arguments, require_no_jit_args
from flashinfer.attention.decode import launch as launching
from flashinfer.attention.decode.plan import BoundDecode, DecodePlan, Options, Scales
from flashinfer.attention.variant import Variant
from flashinfer.host import memo, paged_cache, traced
from flashinfer.host.paged_cache import PagedCache, PagedKv

DataType = Union[str, torch.dtype]
_handles = itertools.count()


class BatchDecodeWithPagedKVCacheWrapper(EngineNames):
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
        super().__init__(backend)
        paged_cache.require_layout(self._op_name, kv_layout)
        require_no_jit_args(self._op_name, jit_args)
        workspace.require_workspace(self._op_name, float_workspace_buffer)
        self._kv_layout = kv_layout
        self._float_workspace_buffer = float_workspace_buffer
        self.device = float_workspace_buffer.device
        int_bytes = workspace.INT_WORKSPACE_BYTES if self.device.type == "cuda" else 0
        self._int_workspace_buffer = torch.empty(int_bytes, dtype=torch.uint8, device=self.device)
        self._use_tensor_cores = use_tensor_cores
        self._use_cuda_graph = use_cuda_graph
        self._paged_kv_indptr_buf = paged_kv_indptr_buffer
        self._paged_kv_indices_buf = paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        self._fixed_batch_size = 0
        if use_cuda_graph:
            self._fixed = workspace.FixedBuffers(
                self._op_name,
                self.device,
                paged_kv_indptr_buffer=paged_kv_indptr_buffer,
                paged_kv_indices_buffer=paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            )
            assert paged_kv_last_page_len_buffer is not None and paged_kv_indptr_buffer is not None
            self._fixed_batch_size = paged_kv_last_page_len_buffer.numel()
            if paged_kv_indptr_buffer.numel() != self._fixed_batch_size + 1:
                raise ValueError(
                    f"{self._op_name}: paged_kv_indptr_buffer holds {paged_kv_indptr_buffer.numel()} entries; expected "
                    f"{self._fixed_batch_size + 1}, one more than paged_kv_last_page_len_buffer"
                )
        # A traced call names its wrapper by number: a custom operator takes tensors and scalars only.
        self._handle = next(_handles)
        _wrappers[self._handle] = self
        self._plans: memo.Memo[DecodePlan] = memo.Memo()
        self._plan: Optional[DecodePlan] = None
        self._index_addresses = (0, 0, 0)  # in the order of KvIndex
        self._planned_window: Optional[int] = None
        self._is_settled = False  # a kernel was launched since the planner

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Use other workspaces from the next plan on."""
        workspace.require_workspace(self._op_name, float_workspace_buffer)
        workspace.require_workspace(self._op_name, int_workspace_buffer)
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer
        self._plans.clear()

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
                the output (default that of q).
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta: as in
                `single_decode_with_kv_cache`.
            non_blocking: accepted for compatibility.
            later: what later releases added, as far as it asks for nothing that is not here (engine_names.py).

        Raises:
            ValueError: a shape, dtype or device does not fit, or a workspace is too small.
            UnsupportedConfig: no kernel for these arguments.
        """
        if later:
            check_later_arguments(self._op_name, later)
        batch_size = last_page_len.shape[0]
        key = (
            batch_size, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode, window_left,
            logits_soft_cap, q_data_type, kv_data_type, data_type, o_data_type, sm_scale, rope_scale, rope_theta,
            self._int_workspace_buffer.data_ptr(),  # clients replace it
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            q_dtype = dtypes.torch_dtype(q_data_type or data_type or "float16")
            kv_dtype = dtypes.torch_dtype(kv_data_type or data_type or q_dtype)
            plan = self._plans.remember(
                key,
                DecodePlan(
                    self._op_name,
                    self.device,
                    batch_size,
                    num_qo_heads,
                    PagedKv(self._kv_layout, page_size, num_kv_heads, head_dim, head_dim, kv_dtype),
                    q_dtype,
                    q_dtype if o_data_type is None else dtypes.torch_dtype(o_data_type),
                    (pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta),
                    self._int_workspace_buffer,
                    self._float_workspace_buffer,
                ),
            )
        self._take_indices(indptr, indices, last_page_len, batch_size)
        self._plan = plan
        self._plan_lengths(plan)

    begin_forward = plan

    def _take_indices(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, batch_size: int
    ) -> None:
        op = self._op_name
        if indptr.shape != (batch_size + 1,):
            raise ValueError(
                f"{op}: indptr has shape {list(indptr.shape)}; expected [{batch_size + 1}], one more than last_page_len"
            )
        if self._use_cuda_graph:
            workspace.require_ascending(op, "indptr", indptr)
            if batch_size != self._fixed_batch_size:
                raise ValueError(
                    f"{op}: this wrapper was made for CUDA graphs of batch size {self._fixed_batch_size}, the plan has "
                    f"{batch_size}; pad with requests that have no pages"
                )
            assert self._paged_kv_indptr_buf is not None and self._paged_kv_indices_buf is not None
            assert self._paged_kv_last_page_len_buf is not None
            fill = self._fixed.fill
            fill("paged_kv_indptr_buffer", self._paged_kv_indptr_buf, indptr)
            fill("paged_kv_indices_buffer", self._paged_kv_indices_buf, indices)
            fill("paged_kv_last_page_len_buffer", self._paged_kv_last_page_len_buf, last_page_len)
            held = (self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf)
        else:
            held = (
                workspace.upload(op, "indptr", indptr, self.device),
                workspace.upload(op, "indices", indices, self.device),
                workspace.upload(op, "last_page_len", last_page_len, self.device),
            )
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = held
        self._index_addresses = (held[0].data_ptr(), held[2].data_ptr(), held[1].data_ptr())

    def _planned_shape(self) -> Optional[Planned]:
        plan = self._plan
        if plan is None:
            return None
        kv = plan.kv
        shape = (
            plan.batch_size, plan.num_qo_heads, kv.num_kv_heads, kv.page_size, self._use_cuda_graph, kv.head_dim_qk,
            kv.head_dim_vo,
        )  # fmt: skip
        return Planned(plan.variant, kv.head_dim_qk, shape)

    def _plan_from_buffers(self) -> None:
        buffers = (self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf)
        indptr, indices, last_page_len = (buffer.data_ptr() for buffer in buffers if buffer is not None)
        self._index_addresses = (indptr, last_page_len, indices)
        assert self._plan is not None
        self._plan_lengths(self._plan)

    def _plan_lengths(self, plan: DecodePlan) -> None:
        """Plan for the lengths in the index tensors: in a CUDA-graph wrapper for the widest window that was planned, as
        a captured run may be replayed on this schedule."""
        window, widest = plan.variant.window_left, self._planned_window
        if self._use_cuda_graph and widest is not None:
            window = -1 if min(window, widest) < 0 else max(window, widest)
        self._plan_window(window)

    def _plan_window(self, window_left: int) -> None:
        assert self._plan is not None
        self._planned_window = window_left
        self._is_settled = False
        self._plan.launch_planner(self._index_addresses, window_left)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        *args: Any,
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
        window_left: Optional[int] = None,
        **later: Any,
    ) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Attention of one layer, as planned.

        Args:
            q: `[batch_size, num_qo_heads, head_dim]`, unit stride in the last axis.
            paged_kv_cache: one tensor `[pages, 2, page_size, num_kv_heads, head_dim]` (NHD; HND has heads before
                page_size) or a tuple (k, v) of such tensors without the axis of 2. Any strides over whole rows. What
                lies in pages or entries no request uses is never read into a result, NaN included.
            q_scale, k_scale, v_scale: factors of quantized q, k and v.
            out: `[batch_size, num_qo_heads, head_dim]`; allocated when None.
            lse: fp32 `[batch_size, num_qo_heads]`; allocated when None and return_lse.
            return_lse: also return the base-2 logarithm of the sum of exponentials.
            enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).
            window_left: overrides the planned one.
            later: as in `plan`.

        Returns:
            out, or (out, lse). A request without KV gives zeros and -inf.

        Raises:
            ValueError: nothing is planned, or a shape, dtype, device or stride differs from the plan.
        """
        if args:
            raise TypeError(f"{self._op_name}: run() takes q and paged_kv_cache; give the rest by keyword")
        if later:
            check_later_arguments(self._op_name, later)
        options = None
        if window_left is not None and self._plan is not None:
            options = (self._plan.options[0], window_left, *self._plan.options[2:])
        return self._run(q, paged_kv_cache, out, lse, return_lse, (q_scale, k_scale, v_scale), enable_pdl, options)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        """The older spelling of `run`, which takes every option from its own arguments: a default here overrides what
        was planned.
        """
        options = (pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        result = self._run(q, paged_kv_cache, None, None, False, (q_scale, k_scale, v_scale), None, options)
        assert isinstance(result, torch.Tensor)
        return result

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedCache,
        pos_encoding_mode: str = "NONE",
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` that also returns the LSE."""
        options = (pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        result = self._run(q, paged_kv_cache, None, None, True, (q_scale, k_scale, v_scale), None, options)
        assert isinstance(result, tuple)
        return result

    def end_forward(self) -> None:
        """Kept for compatibility; there is nothing to release."""

    def _run(
        self,
        q: torch.Tensor,
        cache: PagedCache,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
        scales: Scales,
        pdl: Optional[bool],
        options: Optional[Options],
    ) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        plan = self._plan
        if plan is None:
            raise ValueError(f"{self._op_name}: run() before plan(); call plan() with the batch's page table first")
        if torch.compiler.is_dynamo_compiling():
            return self._run_traced(plan, q, cache, out, lse, return_lse, scales, pdl, options)
        q_ptr, out_ptr, out_key, lse_key = q.data_ptr(), 0, None, None
        if out is not None:
            out_ptr, out_key = out.data_ptr(), (out.dtype, out.shape, out.stride(), out.device)
        if lse is not None:
            lse_key = (lse.dtype, lse.shape, lse.stride(), lse.device)
        if isinstance(cache, torch.Tensor):
            k, v_key = cache, None
            k_ptr = v_ptr = cache.data_ptr()
        else:
            k, v = cache
            k_ptr, v_ptr = k.data_ptr(), v.data_ptr()
            v_key = (v.dtype, v.shape, v.stride(), v.device)
        settled = self._is_settled
        key = (
            q.dtype, q.shape, q.stride(), q.device, k.dtype, k.shape, k.stride(), k.device, v_key, out_key,
            lse_key, scales, pdl, options, settled, (q_ptr | out_ptr | k_ptr | v_ptr) & 15,
        )  # fmt: skip
        bound = plan.bound.get(key)
        if bound is None:
            variant = plan.variant if options is None else Variant.of(self._op_name, plan.kv.head_dim_qk, *options)
            dependent = launching.launches_dependent(self.device) if pdl is None else pdl
            bound = plan.bound.remember(
                key, BoundDecode(plan, q, cache, out, lse, variant, scales, dependent, settled and dependent)
            )
        # A schedule serves every window that is no wider than its own.
        planned = self._planned_window
        assert planned is not None
        if planned >= 0 and not 0 <= bound.window_left <= planned:
            self._plan_window(bound.window_left)
            return self._run(q, cache, out, lse, return_lse, scales, pdl, options)
        if out is None:
            out = plan.new_out()
        if return_lse and lse is None:
            lse = plan.new_lse()
        lse_ptr = 0 if lse is None else lse.data_ptr()
        bound.launch(q_ptr, out.data_ptr(), lse_ptr, k_ptr, v_ptr + bound.v_offset, *self._index_addresses)
        self._is_settled = True
        return (out, lse) if return_lse and lse is not None else out

    def _run_traced(
        self,
        plan: DecodePlan,
        q: torch.Tensor,
        cache: PagedCache,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
        scales: Scales,
        pdl: Optional[bool],
        options: Optional[Options],
    ) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        if out is None:
            out = torch.empty(plan.out_shape, dtype=plan.o_dtype, device=self.device)
        if return_lse and lse is None:
            lse = torch.empty(plan.lse_shape, dtype=torch.float32, device=self.device)
        k, v = (cache, None) if isinstance(cache, torch.Tensor) else cache
        _compiled_run(self._handle, q, k, v, out, lse, *scales, pdl, *((None,) * 6 if options is None else options))
        return (out, lse) if return_lse and lse is not None else out


_wrappers: weakref.WeakValueDictionary[int, BatchDecodeWithPagedKVCacheWrapper] = weakref.WeakValueDictionary()


def _run_by_handle(
    handle: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: Optional[torch.Tensor],
    out: torch.Tensor,
    lse: Optional[torch.Tensor],
    q_scale: Optional[float],
    k_scale: Optional[float],
    v_scale: Optional[float],
    pdl: Optional[bool],
    *given: Any,
) -> None:
    options = None if given == (None,) * 6 else given
    cache = k if v is None else (k, v)
    _wrappers[handle]._run(q, cache, out, lse, False, (q_scale, k_scale, v_scale), pdl, options)


_compiled_run = traced.compiled_op(
    "batch_decode(int handle, Tensor q, Tensor k, Tensor? v, Tensor(a!) out, Tensor(b!)? lse, float? q_scale, "
    "float? k_scale, float? v_scale, bool? pdl, str? pos_encoding_mode, int? window_left, float? logits_soft_cap, "
    "float? sm_scale, float? rope_scale, float? rope_theta) -> ()",
    _run_by_handle,
)


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
