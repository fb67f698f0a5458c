"""What a planned batch decode keeps: the kernels and workspaces of the plan, and each signature of `run`, prepared."""

from __future__ import annotations

from typing import Optional

import torch

from flashinfer.attention.decode import launch as launching
from flashinfer.attention.variant import Variant
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention.params import ADDRESSES, fast_divisor
from flashinfer.host import checks, memo, paged_cache
from flashinfer.host.paged_cache import PagedCache, PagedKv
from flashinfer.host.rows import require_rows
from flashinfer.jit.loader import PreparedLaunch

# Arguments of Variant.of after head_dim: pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale,
# rope_theta.
Options = tuple[str, int, Optional[float], Optional[float], Optional[float], Optional[float]]
Scales = tuple[Optional[float], Optional[float], Optional[float]]  # of q, k and v


class DecodePlan:
    """What a plan means for kernels and workspaces: all that does not depend on where the index tensors are."""

    def __init__(
        self,
        op: str,
        device: torch.device,
        batch_size: int,
        num_qo_heads: int,
        kv: PagedKv,
        q_dtype: torch.dtype,
        o_dtype: torch.dtype,
        options: Options,
        int_workspace: torch.Tensor,
        float_workspace: torch.Tensor,
    ) -> None:
        paged_cache.require_heads(op, num_qo_heads, kv.num_kv_heads)
        checks.require(kv.page_size >= 1, op, f"page_size is {kv.page_size}; expected at least 1")
        self.op, self.device, self.batch_size, self.num_qo_heads = op, device, batch_size, num_qo_heads
        self.kv, self.q_dtype, self.o_dtype, self.options = kv, q_dtype, o_dtype, options
        self.variant = Variant.of(op, kv.head_dim_qk, *options)
        self.out_shape = (batch_size, num_qo_heads, kv.head_dim_vo)
        self.lse_shape = (batch_size, num_qo_heads)
        self.new_out = memo.allocator(self.out_shape, o_dtype, device)
        self.new_lse = memo.allocator(self.lse_shape, torch.float32, device)
        self.bound: memo.Memo[BoundDecode] = memo.Memo()
        self._workspaces = (int_workspace, float_workspace)  # alive as long as their addresses are in use
        self.schedule = launching.DecodeSchedule()
        self.num_chunks = 0
        self._planners: dict[int, PreparedLaunch] = {}
        kernel = self.kernel(self.variant, launching.launches_dependent(device))
        if device.type == "cuda" and batch_size > 0:
            self.num_chunks = kernel.num_chunks
            self.tile_len = kernel.tile_len
            self.schedule = launching.decode_schedule(
                op, int_workspace, float_workspace, batch_size, kernel.num_chunks, kernel.num_head_blocks, num_qo_heads,
                kv.head_dim_vo,
            )  # fmt: skip
            schedule = self.schedule
            self._planner_values = {
                "chunks": schedule.chunks,
                "requests": schedule.requests,
                "empty": schedule.empty,
                "tile_indptr": schedule.tile_indptr,
                "counters": schedule.counters,
                "batch_size": batch_size,
                "num_chunks": kernel.num_chunks,
                "num_head_blocks": kernel.num_head_blocks,
                "page_size": kv.page_size,
                "tile_len": kernel.tile_len,
            }

    def kernel(self, variant: Variant, pdl: bool) -> launching.DecodeKernel:
        kv = self.kv
        return launching.load_kernel(
            self.device, self.q_dtype, kv.dtype, self.o_dtype, kv.head_dim_qk, kv.head_dim_vo, self.num_qo_heads,
            kv.num_kv_heads, "paged", tuple(variant.spec_args.items()), pdl,
        )  # fmt: skip

    def launch_planner(self, index_addresses: tuple[int, int, int], window_left: int) -> None:
        if self.num_chunks == 0:
            return
        launch = self._planners.get(window_left)
        if launch is None:
            launch = launching.load_planner(self.device).prepare(
                (1, 1, 1),
                {**self._planner_values, "window_left": window_left},
                varying=("kv_indptr", "last_page_len"),
            )
            self._planners[window_left] = launch
        launch(index_addresses[0], index_addresses[1])


class BoundDecode:
    """One signature of `run` under one plan shape: checked, its parameters laid out but for the addresses."""

    def __init__(
        self,
        shape: DecodePlan,
        q: torch.Tensor,
        cache: PagedCache,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        variant: Variant,
        scales: Scales,
        pdl: bool,
        plan_is_settled: bool,
    ) -> None:
        op, device, kv = shape.op, shape.device, shape.kv
        expected = (shape.batch_size, shape.num_qo_heads, kv.head_dim_qk)
        if q.shape != expected:
            raise ValueError(
                f"{op}: q has shape {list(q.shape)}; planned for {list(expected)}, [batch_size, num_qo_heads, head_dim]"
            )
        checks.require(q.dtype == shape.q_dtype, op, f"q is {q.dtype}; planned with q_data_type {shape.q_dtype}")
        checks.require(
            q.device == device, op, f"q is on {q.device}, the workspace on {device}; move them to one device"
        )
        require_rows(op, "q", q)
        out = shape.new_out() if out is None else out
        launching.require_output(op, "out", out, shape.out_shape, shape.o_dtype, device)
        require_rows(op, "out", out)
        if lse is not None:
            launching.require_output(op, "lse", lse, shape.lse_shape, torch.float32, device)
            checks.require(lse.is_contiguous(), op, "lse is not contiguous; call .contiguous()")
        strides = kv.strides_of(op, cache, device)
        self.v_offset = cache.stride(1) * cache.element_size() if isinstance(cache, torch.Tensor) else 0
        self.window_left = variant.window_left
        kernel = shape.kernel(variant, pdl)
        if shape.num_chunks and kernel.tile_len != shape.tile_len:
            raise UnsupportedConfig(
                f"{op}: this variant needs another schedule than the planned one; pass it to plan()"
            )
        values = {
            "kv.index.len": 0,
            **fast_divisor("kv.index.page_size", kv.page_size),
            **strides.values,
            "q_token_stride": q.stride(0),
            "q_head_stride": q.stride(1),
            "out_token_stride": out.stride(0),
            "out_head_stride": out.stride(1),
            "batch_size": shape.batch_size,
            "num_qo_heads": shape.num_qo_heads,
            "num_kv_heads": kv.num_kv_heads,
            **variant.values(shape.num_qo_heads, device, *launching.qk_and_v_scale(op, *scales)),
            **shape.schedule.values,
            "plan_is_settled": plan_is_settled,
        }
        grid = (kernel.num_head_blocks, shape.num_chunks, 1)
        idle = shape.batch_size == 0
        self.launch = _no_launch if idle else kernel.launcher.prepare(grid, values, varying=ADDRESSES)


def _no_launch(*addresses: int) -> None:
    """An empty batch."""
