"""What the wrappers of batch prefill share: planning once per step, running once per layer, whatever holds the KV.

A plan is one small kernel and never waits for the device.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Optional, Union

import torch

from flashinfer import dtypes
from flashinfer.attention import workspace
from flashinfer.attention.compat import EngineNames, Planned, require_no_jit_args, require_number_scales
from flashinfer.attention.mask import take_mask
from flashinfer.attention.prefill import launch as launches
from flashinfer.attention.prefill.launch import Extent, Schedule
from flashinfer.attention.prefill.plan import Problem, Run, extent_of
from flashinfer.attention.variant import Variant
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks, memo, paged_cache, traced
from flashinfer.host.paged_cache import KvStrides, PagedCache
from flashinfer.host.rows import require_rows

DataType = Union[str, torch.dtype]
Result = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


class BatchPrefill(EngineNames):
    """The part of the two wrappers that does not care where the KV is.

    An index tensor `x` is in `_x_buf`: of the last plan, or under use_cuda_graph the caller's buffer that plans fill.
    """

    _op_name = "batch_prefill"
    _kv_storage = "paged"
    _index_names: tuple[str, ...] = ()  # qo_indptr, then where the KV is

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        index_buffers: tuple[Optional[torch.Tensor], ...],
        mask_buffers: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
        backend: str,
        jit_args: Optional[list[Any]],
    ) -> None:
        require_no_jit_args(self._op_name, jit_args)
        super().__init__(backend)
        paged_cache.require_layout(self._op_name, kv_layout)
        workspace.require_workspace(self._op_name, float_workspace_buffer)
        self._kv_layout = kv_layout
        self._float_workspace_buffer = float_workspace_buffer
        self.device = float_workspace_buffer.device
        int_bytes = workspace.INT_WORKSPACE_BYTES if self.device.type == "cuda" else 0
        self._int_workspace_buffer = torch.empty(int_bytes, dtype=torch.uint8, device=self.device)
        self._use_cuda_graph = use_cuda_graph
        self._fixed: Optional[workspace.FixedBuffers] = None
        buffers = {f"{name}_buf": buffer for name, buffer in zip(self._index_names, index_buffers)}
        if use_cuda_graph:
            self._fixed = workspace.FixedBuffers(self._op_name, self.device, **buffers)
        self._buffer_names = [f"_{name}" for name in buffers]
        vars(self).update(zip(self._buffer_names, index_buffers))
        # Of the last custom mask, or the caller's buffers.
        self._custom_mask_buf, self._mask_indptr_buf = mask_buffers if use_cuda_graph else (None, None)
        self._problems: memo.Memo[Problem] = memo.Memo()
        self._problem: Optional[Problem] = None
        self._kv_index = (0, 0, 0)  # addresses, in the order of KvIndex
        self._qo_index = (0, 0, 0)  # in the order of PrefillRows
        self._planned = Extent(0, -1, 0, 0, 0)
        self._seen: Optional[Extent] = None  # under use_cuda_graph: what the runs so far needed
        self._short_queries = False
        self._handle = next(_handles)  # names the wrapper in a compiled graph
        _wrappers[self._handle] = self

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Use other workspaces from the next plan on."""
        workspace.require_workspace(self._op_name, float_workspace_buffer)
        workspace.require_workspace(self._op_name, int_workspace_buffer)
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer
        self._problems.clear()

    def end_forward(self) -> None:
        """Kept for compatibility; there is nothing to release."""

    # ------------------------------------------------------------------------------------------------------------- plan

    def _plan(self, arguments: tuple[Any, ...], num_tokens: int) -> None:
        """Find the problem that `_describe` makes of these arguments, and launch the planner; the index tensors have
        been taken already."""
        problem = self._problems.get(arguments)
        if problem is None:
            problem = self._problems.remember(arguments, self._describe(*arguments))
        self._problem = problem
        self._schedule(problem, num_tokens)

    def _schedule(self, problem: Problem, num_tokens: int) -> None:
        """Launch the planner on the index tensors."""
        if problem.schedule is None:
            return
        if not self._tile_is_fixed:
            # A guess where qo_indptr is on the device: what the last run was. A run that finds it wrong plans again,
            # for which a capture needs the other kernel loaded already.
            self._short_queries = problem.is_short(num_tokens, self._short_queries)
            if self._use_cuda_graph and num_tokens < 0:
                self._planned_extent(problem, not self._short_queries)
        extent = self._planned_extent(problem, self._short_queries)
        if self._seen is not None:
            extent = extent.joined(self._seen)  # a captured run may be replayed on this schedule
        self._launch_planner(problem, extent)

    @property
    def _tile_is_fixed(self) -> bool:
        """Under use_cuda_graph the first run decides which tile serves all: a plan cannot know which of the captured
        runs, of more or fewer tokens, will be replayed on it."""
        return self._seen is not None

    def _planned_shape(self) -> Optional[Planned]:
        problem = self._problem
        if problem is None:
            return None
        shape = (
            problem.batch_size, problem.num_qo_heads, problem.num_kv_heads, problem.page_size, self._use_cuda_graph,
            problem.head_dim_qk, problem.head_dim_vo,
        )  # fmt: skip
        return Planned(problem.variant, problem.head_dim_qk, shape)

    def _plan_from_buffers(self) -> None:
        assert self._problem is not None
        self._read_addresses(self._problem.mask == "custom")
        self._schedule(self._problem, num_tokens=-1)

    @property
    def _causal(self) -> bool:
        if self._problem is None:
            raise AttributeError(f"{self._op_name}: _causal is known after plan()")
        return self._problem.mask == "causal"

    def _planned_extent(self, problem: Problem, short_queries: bool) -> Extent:
        extent = problem.extents.get(short_queries)
        if extent is None:
            kernel = self._kernel(
                problem, problem.q_dtype, problem.kv_dtype, problem.mask, problem.variant, short_queries
            )
            extent = problem.extents[short_queries] = extent_of(kernel, problem.mask, problem.variant)
        return extent

    def _describe(
        self,
        batch_size: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: Optional[int],
        page_size: int,
        mask: str,
        q_data_type: DataType,
        kv_data_type: Optional[DataType],
        o_data_type: Optional[DataType],
        disable_split_kv: bool,
        *variant: Any,
    ) -> Problem:
        """variant: arguments of `Variant.of` after head_dim."""
        op = self._op_name
        paged_cache.require_heads(op, num_qo_heads, num_kv_heads)
        checks.require(page_size >= 1, op, f"page_size is {page_size}; expected at least 1")
        head_dim_vo = head_dim_vo or head_dim_qk
        q_dtype = dtypes.torch_dtype(q_data_type)
        kv_dtype = q_dtype if kv_data_type is None else dtypes.torch_dtype(kv_data_type)
        if o_data_type is not None and dtypes.torch_dtype(o_data_type) != q_dtype:
            raise UnsupportedConfig(
                f"{op}: o_data_type is {o_data_type}; expected that of q, {q_dtype}. Next step: convert the output"
            )
        options = Variant.of(op, head_dim_qk, *variant)
        launches.kernel_spec(
            self.device, q_dtype, kv_dtype, head_dim_qk, head_dim_vo, self._kv_storage, mask,
            tuple(options.spec_args.items()),
        )  # fmt: skip
        schedule = planner = None
        if self.device.type == "cuda" and batch_size > 0:
            schedule = Schedule.of(
                op, self._int_workspace_buffer, self._float_workspace_buffer, batch_size, num_kv_heads, head_dim_vo,
                split=not disable_split_kv,
            )  # fmt: skip
            planner = schedule.bind_planner(
                self.device, self._kv_storage, page_size, batch_size, num_kv_heads, num_qo_heads // num_kv_heads
            )
        return Problem(
            batch_size, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, q_dtype, kv_dtype, mask,
            options, schedule, planner,
        )  # fmt: skip

    def _kernel(
        self,
        problem: Problem,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
        mask: str,
        variant: Variant,
        short_queries: bool,
        pdl: Optional[bool] = None,
    ) -> launches.PrefillKernel:
        return launches.load_kernel(
            self.device, q_dtype, kv_dtype, problem.head_dim_qk, problem.head_dim_vo, self._kv_storage, mask,
            tuple(variant.spec_args.items()), short_queries, pdl,
        )  # fmt: skip

    def _launch_planner(self, problem: Problem, extent: Extent) -> None:
        assert problem.planner is not None
        self._planned = extent
        problem.planner(extent, self._qo_index[0], self._kv_index[0], self._kv_index[1])

    def _take(self, *given: torch.Tensor) -> list[torch.Tensor]:
        """The index tensors on the device: the given ones, or in a CUDA-graph wrapper its buffers filled from them."""
        op = self._op_name
        if self._fixed is not None:
            return [self._fill(self._fixed, name, tensor) for name, tensor in zip(self._index_names, given)]
        taken = [workspace.upload(op, name, tensor, self.device) for name, tensor in zip(self._index_names, given)]
        vars(self).update(zip(self._buffer_names, taken))
        return taken

    def _fill(self, fixed: workspace.FixedBuffers, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer: torch.Tensor = getattr(self, f"_{name}_buf")
        if name.endswith("indptr"):
            workspace.require_ascending(self._op_name, name, tensor)
            if tensor.numel() != buffer.numel():
                raise ValueError(
                    f"{self._op_name}: this wrapper was made for CUDA graphs of batch size {buffer.numel() - 1}, "
                    f"{name} is for {tensor.numel() - 1} requests; pad with requests that have no tokens"
                )
        return fixed.fill(f"{name}_buf", buffer, tensor)

    def _take_mask(
        self,
        custom_mask: Optional[torch.Tensor],
        packed_custom_mask: Optional[torch.Tensor],
        qo_indptr: torch.Tensor,
        kv_lens: Callable[[], torch.Tensor],
    ) -> bool:
        """Whether there is one. The last of what a plan takes: notes where the kernels find all of it."""
        is_custom = custom_mask is not None or packed_custom_mask is not None
        if is_custom:
            buffers = (self._custom_mask_buf, self._mask_indptr_buf) if self._use_cuda_graph else None
            self._custom_mask_buf, self._mask_indptr_buf = take_mask(
                self._op_name, self.device, custom_mask, packed_custom_mask, qo_indptr, kv_lens(), buffers
            )
        elif not self._use_cuda_graph:
            self._custom_mask_buf = self._mask_indptr_buf = None
        self._read_addresses(is_custom)
        return is_custom

    def _read_addresses(self, is_custom: bool) -> None:
        qo_indptr, *kv = [getattr(self, name).data_ptr() for name in self._buffer_names]
        self._kv_index = (kv[0], kv[2], kv[1]) if len(kv) == 3 else (kv[0], 0, 0)
        self._qo_index = (qo_indptr, 0, 0)
        if is_custom:
            assert self._custom_mask_buf is not None and self._mask_indptr_buf is not None
            self._qo_index = (qo_indptr, self._custom_mask_buf.data_ptr(), self._mask_indptr_buf.data_ptr())

    # -------------------------------------------------------------------------------------------------------------- run

    def _run(
        self,
        q: torch.Tensor,
        kv: PagedCache,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
        scales: tuple[Optional[float], Optional[float], Optional[float]],
        pdl: Optional[bool],
        overrides: Optional[tuple[Any, ...]],
    ) -> Result:
        if torch.compiler.is_dynamo_compiling():
            return self._run_traced(q, kv, out, lse, return_lse, scales, pdl, overrides)
        problem = self._problem
        if problem is None:
            raise ValueError(f"{self._op_name}: run() before plan(); call plan() with the batch's lengths first")
        q_ptr, out_ptr, out_key, lse_key = q.data_ptr(), 0, None, None
        if out is not None:
            out_ptr, out_key = out.data_ptr(), (out.dtype, out.shape, out.stride(), out.device)
        if lse is not None:
            lse_key = (lse.dtype, lse.shape, lse.stride(), lse.device)
        if isinstance(kv, torch.Tensor):
            k, v_key = kv, None
            k_ptr = v_ptr = kv.data_ptr()
        else:
            k, v = kv
            k_ptr, v_ptr = k.data_ptr(), v.data_ptr()
            v_key = (v.dtype, v.shape, v.stride(), v.device)
        key = (
            q.dtype, q.shape, q.stride(), q.device, k.dtype, k.shape, k.stride(), k.device, v_key, out_key,
            lse_key, scales, pdl, overrides, (q_ptr | out_ptr | k_ptr | v_ptr) & 15,
        )  # fmt: skip
        run = problem.runs.get(key)
        if run is None:
            run = problem.runs.remember(key, self._bind(problem, q, kv, out, lse, scales, pdl, overrides))
        if out is None:
            out = run.new_out()
        if return_lse and lse is None:
            lse = run.new_lse()
        if not run.is_empty:
            # Options given at run time may see other KV tiles than planned: then plan again, also without waiting.
            if (
                problem.schedule is not None
                and run.extent != self._planned
                and not (self._use_cuda_graph and self._planned.covers(run.extent))
            ):
                self._launch_planner(problem, run.extent)
            self._short_queries = run.short_queries
            seen = self._seen
            if self._use_cuda_graph and (seen is None or not seen.covers(run.extent)):
                self._seen = seen.joined(run.extent) if seen and seen[2:] == run.extent[2:] else run.extent
            lse_ptr = 0 if lse is None else lse.data_ptr()
            run.launch(*self._qo_index, q_ptr, out.data_ptr(), lse_ptr, k_ptr, v_ptr + run.v_offset, *self._kv_index)
        return (out, lse) if return_lse and lse is not None else out

    def _run_traced(
        self,
        q: torch.Tensor,
        kv: PagedCache,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
        scales: tuple[Optional[float], Optional[float], Optional[float]],
        pdl: Optional[bool],
        overrides: Optional[tuple[Any, ...]],
    ) -> Result:
        problem = self._problem
        assert problem is not None, "run() before plan()"
        if out is None:
            out = q.new_empty((*q.shape[:-1], problem.head_dim_vo))
        if return_lse and lse is None:
            lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        k, v = (kv, None) if isinstance(kv, torch.Tensor) else kv
        _compiled_run(self._handle, q, k, v, out, lse, *scales, pdl, *(_NOTHING if overrides is None else overrides))
        return (out, lse) if return_lse and lse is not None else out

    def _bind(
        self,
        problem: Problem,
        q: torch.Tensor,
        kv: PagedCache,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        scales: tuple[Optional[float], Optional[float], Optional[float]],
        pdl: Optional[bool],
        overrides: Optional[tuple[Any, ...]],
    ) -> Run:
        op = self._op_name
        if q.dim() != 3 or q.shape[1:] != (problem.num_qo_heads, problem.head_dim_qk):
            raise ValueError(
                f"{op}: q has shape {list(q.shape)}; planned for [num_tokens, {problem.num_qo_heads}, "
                f"{problem.head_dim_qk}] ([num_tokens, num_qo_heads, head_dim])"
            )
        checks.require(q.device == self.device, op, f"q is on {q.device}, the workspace on {self.device}")
        require_number_scales(op, *scales)
        require_rows(op, "q", q)
        new_out = memo.allocator((*q.shape[:2], problem.head_dim_vo), q.dtype, self.device)
        out = new_out() if out is None else out
        launches.require_output(op, q, out, lse, problem.head_dim_vo)
        strides = self._strides(problem, kv)
        mask, variant = problem.mask, problem.variant
        if overrides is not None:
            causal, *rest = overrides
            if causal is not None and mask != "custom":
                mask = "causal" if causal else "none"
            variant = variant.updated(op, problem.head_dim_qk, *rest)
        k = kv if isinstance(kv, torch.Tensor) else kv[0]
        short = self._short_queries if self._tile_is_fixed else problem.is_short(q.shape[0])
        kernel = self._kernel(problem, q.dtype, k.dtype, mask, variant, short, pdl)
        if problem.schedule is not None:
            rows = q.shape[0] * (problem.num_qo_heads // problem.num_kv_heads)
            needed = -(-rows // kernel.block_m) + problem.batch_size
            checks.require(
                needed <= problem.schedule.max_items, op,
                f"the int workspace holds {problem.schedule.max_items} work items, {q.shape[0]} tokens may need "
                f"{needed}; pass a larger one to reset_workspace_buffer()",
            )  # fmt: skip
        q_scale, k_scale, v_scale = scales
        launch = launches.bind_launch(
            kernel, self.device, kernel.num_ctas or 1, (*q.stride()[:2], *out.stride()[:2]), strides,
            problem.page_size, problem.schedule.values if problem.schedule else launches.NO_SCHEDULE,
            problem.batch_size, (problem.num_qo_heads, problem.num_kv_heads), (0, 0), variant,
            ((1.0 if q_scale is None else q_scale) * (1.0 if k_scale is None else k_scale),
             1.0 if v_scale is None else float(v_scale)),
        )  # fmt: skip
        v_offset = kv.stride(1) * kv.element_size() if isinstance(kv, torch.Tensor) else 0
        is_empty = q.shape[0] == 0 or problem.batch_size == 0
        new_lse = memo.allocator(q.shape[:2], torch.float32, self.device)
        return Run(launch, new_out, new_lse, extent_of(kernel, mask, variant), short, v_offset, is_empty)

    def _strides(self, problem: Problem, kv: PagedCache) -> KvStrides:
        raise NotImplementedError


_handles = itertools.count()
_wrappers: weakref.WeakValueDictionary[int, BatchPrefill] = weakref.WeakValueDictionary()
_NOTHING = (None,) * 7  # no overrides


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
    kv = k if v is None else (k, v)
    overrides = None if given == _NOTHING else given
    _wrappers[handle]._run(q, kv, out, lse, False, (q_scale, k_scale, v_scale), pdl, overrides)


_compiled_run = traced.compiled_op(
    "batch_prefill(int handle, Tensor q, Tensor k, Tensor? v, Tensor(a!) out, Tensor(b!)? lse, float? q_scale, "
    "float? k_scale, float? v_scale, bool? pdl, bool? causal, str? pos_encoding_mode, int? window_left, "
    "float? logits_soft_cap, float? sm_scale, float? rope_scale, float? rope_theta) -> ()",
    _run_by_handle,
)
