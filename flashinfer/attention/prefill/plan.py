"""What a plan of prefill settles: kernels, where the schedule lies, and each signature of run() laid out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional, Union

import torch

from flashinfer.attention.plan import BoundRun, Call, Plan, Shape, no_launch
from flashinfer.attention.prefill import launch as launches
from flashinfer.attention.prefill.launch import Extent, PrefillKernel, Schedule
from flashinfer.attention.sequence import row_strides
from flashinfer.attention.variant import Factors, Variant
from flashinfer.families.attention.prefill import SHORT_ROWS
from flashinfer.host import checks
from flashinfer.host.paged_cache import KvStrides, PagedCache, PagedKv
from flashinfer.jit.loader import PreparedLaunch


@dataclass(frozen=True)
class RaggedKv:
    """Keys and values as rows: `[num_rows, num_kv_heads, head_dim]` (NHD), or with the first axes swapped (HND)."""

    layout: str
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int

    def strides_of(self, op: str, kv: PagedCache, device: torch.device) -> KvStrides:
        k, v = kv[0], kv[1]
        strides = row_strides(op, k, v, self.layout)
        heads, dims = k.shape[1 if self.layout == "NHD" else 0], (k.shape[2], v.shape[2])
        if heads != self.num_kv_heads or dims != (self.head_dim_qk, self.head_dim_vo):
            raise ValueError(
                f"{op}: k and v have {heads} heads of {dims[0]} and {dims[1]} elements; planned for "
                f"{self.num_kv_heads} of {self.head_dim_qk} and {self.head_dim_vo}"
            )
        checks.require(k.device == device, op, f"k is on {k.device}, q on {device}")
        return strides

    def num_rows(self, k: torch.Tensor) -> int:
        return k.shape[0 if self.layout == "NHD" else 1]


class PrefillPlan(Plan):
    def __init__(
        self,
        op: str,
        device: torch.device,
        shape: Shape,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        mask: str,
        variant: Variant,
        kv: Union[PagedKv, RaggedKv],
        workspaces: tuple[torch.Tensor, torch.Tensor],
        split_kv: bool,
    ) -> None:
        """workspaces: of integers and of floats."""
        super().__init__(op, device, shape, dtypes, mask, variant)
        self._kv, self._storage = kv, "ragged" if isinstance(kv, RaggedKv) else "paged"
        self._group_size = shape.num_qo_heads // shape.num_kv_heads
        self._schedule: Optional[Schedule] = None
        if device.type == "cuda" and shape.batch_size > 0:
            self._schedule = Schedule.of(
                op, *workspaces, shape.batch_size, shape.num_kv_heads, shape.head_dim_vo, split=split_kv
            )

    def _load(
        self,
        types: tuple[torch.dtype, torch.dtype, torch.dtype],
        mask: str,
        variant: Variant,
        short: bool,
        pdl: Optional[bool],
        device_scales: bool = False,
    ) -> PrefillKernel:
        dims = (self.shape.head_dim_qk, self.shape.head_dim_vo)
        page_size = self.shape.page_size
        return launches.load_kernel(
            self.device, types, dims, self._storage, mask, variant, short, page_size, pdl, device_scales
        )

    def is_short(self, num_tokens: int) -> bool:
        return num_tokens * self._group_size <= SHORT_ROWS * self.shape.batch_size

    def _extent(self, short_queries: bool) -> Extent:
        types = (self.q_dtype, self.kv_dtype, self.o_dtype)
        kernel = self._load(types, self.mask, self.variant, short_queries, None)
        return Extent.of(kernel, self.mask, self.variant)

    def _bind_planner(self, extent: Extent) -> PreparedLaunch:
        if self._schedule is None:
            return no_launch
        shape = self.shape
        return self._schedule.bind_planner(
            self.device, self._storage, extent, shape.page_size, shape.batch_size, shape.num_kv_heads, self._group_size
        )

    def bind(self, call: Call, short_queries: bool) -> BoundRun:
        op, q, shape, kv = self.op, call.q, self.shape, self._kv
        if q.dim() != 3 or q.shape[1:] != (shape.num_qo_heads, shape.head_dim_qk):
            raise ValueError(
                f"{op}: q has shape {list(q.shape)}; planned for [num_tokens, {shape.num_qo_heads}, "
                f"{shape.head_dim_qk}] ([num_tokens, num_qo_heads, head_dim])"
            )
        self.require_tensors(call)
        out, new_out, new_lse = self.outputs(call)
        if isinstance(kv, PagedKv):  # what run() is given decides
            kv = replace(kv, dtype=call.kv_dtype)
        strides = kv.strides_of(op, call.kv, self.device)
        mask, variant = self.mask, self.variant_of(call)
        if call.overrides is not None and call.overrides.causal is not None and mask != "custom":
            mask = "causal" if call.overrides.causal else "none"
        q_scale, k_scale, v_scale = call.scales
        factors = Factors.of(op, (q_scale,), (k_scale,), (v_scale,))
        options = variant.values(shape.num_qo_heads, shape.head_dim_qk, self.device, factors)
        types = (q.dtype, call.kv_dtype, out.dtype)
        kernel = self._load(types, mask, variant, short_queries, call.pdl, factors.device_scales)
        if self._schedule is not None:
            self._schedule.require_items(op, q.shape[0] * self._group_size, kernel, shape.batch_size)
        is_empty = q.shape[0] == 0 or shape.batch_size == 0
        launch = no_launch
        if not is_empty:
            launch = launches.bind_launch(
                kernel, kernel.num_blocks or 1, (q.stride(0), q.stride(1), out.stride(0), out.stride(1)), strides,
                launches.NO_SCHEDULE if self._schedule is None else self._schedule.values, options,
                batch_size=shape.batch_size, num_tokens=q.shape[0], num_heads=(shape.num_qo_heads, shape.num_kv_heads),
                page_size=shape.page_size,
            )  # fmt: skip
        return BoundRun(
            launch,
            launch,
            new_out,
            new_lse,
            Extent.of(kernel, mask, variant),
            call.v_offset,
            q.shape[0],
            call.num_pages if isinstance(kv, PagedKv) else kv.num_rows(call.kv[0]),
            is_empty,
            short_queries,
        )
