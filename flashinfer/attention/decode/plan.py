# SPDX-License-Identifier: Apache-2.0
"""What a plan of decode settles: kernels, where the schedule lies, and each signature of run() laid out."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch

from flashinfer.attention.decode import launch as launches
from flashinfer.attention.decode.launch import DecodeKernel, Schedule
from flashinfer.attention.plan import BoundRun, Call, Plan, Shape, no_launch
from flashinfer.attention.variant import Factors, Variant
from flashinfer.attention.workspace import Memory
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention.params import ADDRESSES
from flashinfer.families.layout import fast_divisor
from flashinfer.host import checks
from flashinfer.jit.loader import PreparedLaunch
from flashinfer.variants import NO_RANGES


class Extent(NamedTuple):
    """The keys that a schedule brings to the blocks: those a window shows, which is what it leaves out."""

    window_left: int  # -1: all
    ranges: tuple[str, bytes] = NO_RANGES  # of functions

    def covers(self, other: Extent) -> bool:
        window = self.window_left < 0 or 0 <= other.window_left <= self.window_left
        return window and self.ranges in (NO_RANGES, other.ranges)

    def suits(self, other: Extent, is_captured: bool) -> bool:
        return self.covers(other)

    def joined(self, other: Extent) -> Extent:
        return self if self.covers(other) else other if other.covers(self) else Extent(-1)


class DecodePlan(Plan):
    _is_mixed = _has_lengths = False  # of a batch whose other requests are prefilled; as of `Schedule.bind_planner`

    def __init__(
        self,
        op: str,
        device: torch.device,
        shape: Shape,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        variant: Variant,
        kv_layout: str,
        workspaces: tuple[Memory, Memory],
        table_len: int = 0,
    ) -> None:
        """workspaces: of integers and of floats. table_len: entries of a row of the block table, if there is one."""
        super().__init__(op, device, shape, dtypes, "none", variant)
        self._kv = shape.pages(kv_layout, self.kv_dtype)
        self._table_len = table_len
        self._workspaces = workspaces  # alive as long as their addresses are in use
        self._kernel = self._load(variant, None)
        self._schedule: Optional[Schedule] = None
        if device.type == "cuda" and shape.batch_size > 0:
            self._schedule = Schedule.of(
                op, *workspaces, shape.batch_size, self._kernel, shape.num_qo_heads, shape.head_dim_vo
            )

    def _load(self, variant: Variant, pdl: Optional[bool], device_scales: bool = False) -> DecodeKernel:
        shape = self.shape
        return launches.load_kernel(
            self.device, (self.q_dtype, self.kv_dtype, self.o_dtype), (shape.head_dim_qk, shape.head_dim_vo),
            (shape.num_qo_heads, shape.num_kv_heads), "paged", variant, pdl, device_scales, shape.page_size,
            self._is_mixed,
        )  # fmt: skip

    def _extent(self, queries: str) -> Extent:
        return Extent(self.variant.window_left, self.variant.ranges)

    def _bind_planner(self, extent: Extent) -> PreparedLaunch:
        if self._schedule is None:
            return no_launch
        return self._schedule.bind_planner(
            self.device, self.shape.batch_size, self._kernel, self.shape.page_size, extent.window_left, self._table_len,
            extent.ranges, self._is_mixed, self._has_lengths,
        )  # fmt: skip

    def bind(self, call: Call, queries: str) -> BoundRun:
        op, q, shape, schedule = self.op, call.q, self.shape, self._schedule or Schedule()
        num_tokens = q.shape[0] if self._is_mixed else shape.batch_size
        expected = (num_tokens, shape.num_qo_heads, shape.head_dim_qk)
        if q.shape != expected:
            raise ValueError(
                f"{op}: q has shape {list(q.shape)}; planned for {list(expected)}, [batch_size, num_qo_heads, head_dim]"
            )
        checks.require(q.dtype == self.q_dtype, op, f"q is {q.dtype}; planned with q_data_type {self.q_dtype}")
        self.require_tensors(call)
        out, new_out, new_lse = self.outputs(call)
        variant = self.variant_of(call)
        q_scale, k_scale, v_scale = call.scales
        factors = Factors.of(op, (q_scale,), (k_scale,), (v_scale,))
        kernel = self._load(variant, call.pdl, factors.device_scales)
        if self._schedule is not None and kernel.tile_len != self._kernel.tile_len:
            raise UnsupportedConfig(
                f"{op}: this variant needs another schedule than the planned one; pass it to plan()"
            )
        values = {
            "kv.index.len": self._table_len,
            **fast_divisor("kv.index.page_size", shape.page_size),
            **self._kv.strides_of(op, call.kv, self.device).values,
            "q_token_stride": q.stride(0),
            "q_head_stride": q.stride(1),
            "out_token_stride": out.stride(0),
            "out_head_stride": out.stride(1),
            "batch_size": shape.batch_size,
            "num_qo_heads": shape.num_qo_heads,
            "num_kv_heads": shape.num_kv_heads,
            **variant.values(shape.num_qo_heads, shape.head_dim_qk, self.device, factors),
            **schedule.values,
            "num_tokens": num_tokens if self._is_mixed else 0,
        }
        grid = (kernel.num_head_blocks, self._kernel.num_chunks, 1)

        def prepared(is_settled: bool) -> PreparedLaunch:
            if shape.batch_size == 0 or num_tokens == 0:
                return no_launch
            return kernel.launcher.prepare(grid, {**values, "plan_is_settled": is_settled}, varying=ADDRESSES)

        launch = prepared(False)
        return BoundRun(
            launch,
            prepared(True) if kernel.launcher.is_dependent and not self._is_mixed else launch,
            new_out,
            new_lse,
            Extent(variant.window_left, variant.ranges),
            call.v_offset,
            shape.batch_size,
            call.num_pages,
            shape.batch_size == 0,
        )


class MixedDecodePlan(DecodePlan):
    """Of the requests of one query in a batch whose others are prefilled: behind their launch, which it does not wait
    for where launches overlap."""

    _is_mixed = True

    def __init__(self, *given: Any, whole_lengths: bool) -> None:
        """given: as of `DecodePlan`. whole_lengths: as of `PrefillPlan`."""
        self._has_lengths = whole_lengths
        super().__init__(*given)
