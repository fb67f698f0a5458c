# SPDX-License-Identifier: Apache-2.0
"""What a plan of prefill settles: kernels, where the schedule lies, and each signature of run() laid out."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import torch

from flashinfer.attention.plan import BoundLaunch, BoundRun, Call, Plan, Shape, no_launch
from flashinfer.attention.prefill import launch as launches
from flashinfer.attention.prefill.launch import Extent, PrefillKernel, Schedule
from flashinfer.attention.sequence import row_strides
from flashinfer.attention.variant import Factors, Variant
from flashinfer.attention.workspace import Memory
from flashinfer.families.attention import prefill as families
from flashinfer.families.attention.params import MASKS_OF_BITS
from flashinfer.host import checks
from flashinfer.host.paged_cache import KvStrides, PagedCache, PagedKv


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


def fixed_split(op: str, page_size: int, splitting: tuple[Any, Any]) -> Optional[int]:
    """As in `PrefillPlan`. splitting: fixed_split_size, in pages, and disable_split_kv of plan()."""
    size, is_disabled = splitting
    num_pages = -1 if size is None else checks.integer(op, "fixed_split_size", size, -1)
    if checks.boolean(op, "disable_split_kv", is_disabled):
        return 0
    return min(num_pages * page_size, 1 << 30) if num_pages > 0 else None


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
        workspaces: tuple[Memory, Memory],
        split_kv: bool,
        lengths: tuple[int, int] = (0, 0),
        fixed_split: Optional[int] = None,
        whole_lengths: bool = False,
    ) -> None:
        """workspaces: of integers and of floats. lengths: queries of every request, where there is no qo_indptr, and
        entries of a row of the block table, where there is no kv_indptr. fixed_split: None; or a row's result is the
        same, bit by bit, whatever shares the batch, and a split has so many keys, 0 for no splits. whole_lengths: index
        tensors have the lengths of requests and not of their last pages; on a GPU the planner alone reads them."""
        super().__init__(op, device, shape, dtypes, mask, variant)
        self._lengths, self._fixed_split = lengths, fixed_split
        self._kv, self._storage = kv, "ragged" if isinstance(kv, RaggedKv) else "paged"
        self._planner_storage = "paged_lens" if whole_lengths else self._storage
        if device.type == "cpu":
            self._storage = self._planner_storage
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
        queries: str,
        pdl: Optional[bool],
        device_scales: bool = False,
    ) -> PrefillKernel:
        dims = (self.shape.head_dim_qk, self.shape.head_dim_vo)
        page_size = self.shape.page_size
        return launches.load_kernel(
            self.device, types, dims, self._storage, mask, variant, queries, page_size, pdl, device_scales,
            self._group_size, self._has_decode(queries), self._planner_storage,
        )  # fmt: skip

    def _has_decode(self, queries: str) -> bool:
        """Whether the kernel of a class leaves requests of one query to one of decode."""
        return False

    def queries_of(self, num_tokens: int) -> str:
        shape, length = self.shape, self._lengths[0]
        if self._fixed_split is None:
            return families.queries_of(num_tokens * self._group_size, shape.batch_size, shape.num_kv_heads)
        # Of a tile that other requests do not choose.
        return families.queries_of(length * self._group_size, 1, shape.num_kv_heads) if length > 0 else "medium"

    def _extent(self, queries: str) -> Extent:
        types = (self.q_dtype, self.kv_dtype, self.o_dtype)
        kernel = self._load(types, self.mask, self.variant, queries, None)
        return Extent.of(kernel, self.mask, self.variant)

    def _bind_planner(self, extent: Extent) -> BoundLaunch:
        if self._schedule is None:
            return no_launch
        shape = self.shape
        return self._schedule.bind_planner(
            self.device, self._planner_storage, extent, shape.page_size, shape.batch_size, shape.num_kv_heads,
            self._group_size, self._lengths, fixed_split=self._fixed_split or 0,
        )  # fmt: skip

    def bind(self, call: Call, queries: str) -> BoundRun:
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
        if call.overrides is not None and call.overrides.causal is not None and mask not in MASKS_OF_BITS:
            mask = "causal" if call.overrides.causal else "none"
        q_scale, k_scale, v_scale = call.scales
        factors = Factors.of(op, (q_scale,), (k_scale,), (v_scale,))
        options = variant.values(shape.num_qo_heads, shape.head_dim_qk, self.device, factors)
        types = (q.dtype, call.kv_dtype, out.dtype)
        kernel = self._load(types, mask, variant, queries, call.pdl, factors.device_scales)
        if self._schedule is not None:
            num_rows = q.shape[0] * self._group_size
            self._schedule.require_items(op, num_rows, kernel, shape.batch_size)
            if self._fixed_split:
                self._schedule.require_fixed_splits(
                    op, num_rows, kernel, shape.batch_size, shape.num_kv_heads, shape.head_dim_vo
                )
        is_empty = q.shape[0] == 0 or shape.batch_size == 0
        launch = no_launch
        if not is_empty:
            launch = launches.bind_launch(
                kernel, kernel.num_blocks or 1, (q.stride(0), q.stride(1), out.stride(0), out.stride(1)), strides,
                self._schedule, options,
                batch_size=shape.batch_size, num_tokens=q.shape[0], num_heads=(shape.num_qo_heads, shape.num_kv_heads),
                page_size=shape.page_size, lengths=self._lengths,
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
            queries,
        )


class UniformPlan(PrefillPlan):
    """Of as many queries in every request, for the wrapper of decode, whose index tensors are those of the KV alone."""

    def queries_of(self, num_tokens: int) -> str:
        return families.queries_of(self._lengths[0] * self._group_size, 1, self.shape.num_kv_heads)

    def tile(self, queries: str) -> tuple[Any, BoundLaunch]:
        return super().tile(self.queries_of(0))

    def _bind_planner(self, extent: Extent) -> BoundLaunch:
        return functools.partial(super()._bind_planner(extent), 0)

    def bind(self, call: Call, queries: str) -> BoundRun:
        q, num_tokens = call.q, self.shape.batch_size * self._lengths[0]
        if q.dim() == 3 and q.shape[0] != num_tokens:
            raise ValueError(
                f"{self.op}: q has {q.shape[0]} tokens; planned for {num_tokens}, {self._lengths[0]} of each of "
                f"{self.shape.batch_size} requests"
            )
        run = super().bind(call, self.queries_of(0))
        launch = functools.partial(run.launch, 0, 0, 0)  # no offsets of queries, no mask
        return replace(run, launch=launch, settled_launch=launch)
