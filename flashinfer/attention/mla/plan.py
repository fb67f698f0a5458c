# SPDX-License-Identifier: Apache-2.0
"""What a plan of latent attention settles: the kernel, where the schedule lies, each signature of run() laid out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch

from flashinfer.attention.mla import launch as launches
from flashinfer.attention.plan import BoundLaunch, BoundRun, Call, Plan, Shape, no_launch
from flashinfer.attention.prefill.launch import Extent, PrefillKernel, Schedule
from flashinfer.attention.variant import Factors, Variant
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention.mla import MAX_BLOCKS, SCALED_ROW_BYTES, SHORT_ROWS, STORAGE, costs
from flashinfer.families.attention.prefill import PlanCosts
from flashinfer.host import checks, paged_cache
from flashinfer.host.rows import alignment_of, require_rows


class MlaPlan(Plan):
    names = ("q_nope", "ckv_cache", "kpe_cache")

    def __init__(
        self,
        op: str,
        device: torch.device,
        shape: Shape,
        types: tuple[torch.dtype, torch.dtype],
        mask: str,
        variant: Variant,
        workspaces: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """shape: of one KV head, with head dimensions of whole rows and of ckv. types: of q and of the cache.
        workspaces: of integers and of floats."""
        super().__init__(op, device, shape, (*types, types[0]), mask, variant)
        self.has_scaled_rows = types[1] == torch.uint8  # of bytes that hold everything
        self._head_dims = shape.head_dim_vo, shape.head_dim_qk - shape.head_dim_vo
        self._schedule: Optional[Schedule] = None
        # In place of that of prefill.
        self.own_planner: Optional[Callable[[Schedule, Extent, PlanCosts], BoundLaunch]] = None
        if device.type == "cuda" and shape.batch_size > 0:
            self._schedule = Schedule.of(
                op, *workspaces, shape.batch_size, 1, shape.head_dim_vo, with_lse=False, min_items=MAX_BLOCKS
            )

    def _load(self, queries: str, pdl: Optional[bool]) -> PrefillKernel:
        types, page_size = (self.q_dtype, self.kv_dtype), self.shape.page_size
        is_short = queries == "short"
        return launches.load_kernel(self.device, types, self._head_dims, is_short, page_size, self.mask, pdl)

    def queries_of(self, num_tokens: int) -> str:
        return "short" if num_tokens * self.shape.num_qo_heads <= SHORT_ROWS * self.shape.batch_size else "medium"

    def _extent(self, queries: str) -> Extent:
        return Extent.of(self._load(queries, None), self.mask, self.variant)

    def _bind_planner(self, extent: Extent) -> BoundLaunch:
        if self._schedule is None:
            return no_launch
        kernel = self._load("short" if extent.block_m <= SHORT_ROWS else "medium", None)
        of_kernel = costs(extent.block_m, kernel.launcher.params)
        if self.own_planner is not None:
            return self.own_planner(self._schedule, extent, of_kernel)
        shape = self.shape
        return self._schedule.bind_planner(
            self.device, STORAGE, extent, shape.page_size, shape.batch_size, 1, shape.num_qo_heads,
            costs=of_kernel,
        )  # fmt: skip

    def bind(self, call: Call, queries: str) -> BoundRun:
        q_pe, batch_size, num_tokens = self._require_queries(call), self.shape.batch_size, len(call.q)
        self.require_tensors(call)
        caches = self._caches(call)
        out, new_out, new_lse = self.outputs(call)
        q_scale, k_scale, v_scale = call.scales
        factors = Factors.of(self.op, (q_scale,), (k_scale,), (v_scale,))
        factors.require_known(self.op)
        if self.has_scaled_rows and (factors.qk, factors.v) != (1.0, 1.0):
            raise UnsupportedConfig(
                f"{self.op}: a scale of a cache whose rows have their own; expected none. Next step: leave it out"
            )
        kernel = self._load(queries, call.pdl)
        if self._schedule is not None:
            self._schedule.require_items(self.op, num_tokens * self.shape.num_qo_heads, kernel, batch_size)
        is_empty = num_tokens == 0 or batch_size == 0
        launch = no_launch
        if not is_empty:
            launch = launches.bind_launch(
                kernel,
                {"q_nope": call.q, "q_pe": q_pe, "out": out},
                caches,
                self._schedule,
                {"sm_scale": self.variant.sm_scale * factors.qk, "v_scale": factors.v},
                batch_size=batch_size,
                page_size=self.shape.page_size,
            )
        extent = Extent.of(kernel, self.mask, self.variant)
        return BoundRun(launch, launch, new_out, new_lse, extent, 0, num_tokens, call.num_pages, is_empty, queries)

    def _require_queries(self, call: Call) -> torch.Tensor:
        """q_pe."""
        op, q_nope, q_pe, num_heads = self.op, call.q, call.q_pe, self.shape.num_qo_heads
        if q_pe is None:
            raise TypeError(f"{op}: q_pe is NoneType; expected a tensor, of no columns where head_dim_kpe is 0")
        for name, q, dim in (("q_nope", q_nope, self._head_dims[0]), ("q_pe", q_pe, self._head_dims[1])):
            if q.dim() != 3 or q.shape[1:] != (num_heads, dim):
                raise ValueError(
                    f"{op}: {name} has shape {list(q.shape)}; planned for [num_tokens, {num_heads}, {dim}] "
                    "([num_tokens, num_heads, head_dim])"
                )
            checks.require(q.dtype == self.q_dtype, op, f"{name} is {q.dtype}; planned with q_data_type {self.q_dtype}")
        checks.require(
            len(q_nope) == len(q_pe), op, f"q_nope has {len(q_nope)} tokens, q_pe {len(q_pe)}; they must be equal"
        )
        require_rows(op, "q_pe", q_pe)
        return q_pe

    def _caches(self, call: Call) -> dict[str, torch.Tensor]:
        """ckv and kpe, `[num_pages, page_size, head_dim]` in any strides over dense rows; rows with scales as ckv."""
        op, axes = self.op, ("pages", "page_size", "head_dim")
        ckv, kpe = call.kv
        sizes: dict[str, tuple[int, str]] = {"page_size": (self.shape.page_size, "the plan says")}
        parts = [("ckv_cache", ckv, self._head_dims[0]), ("kpe_cache", kpe, self._head_dims[1])]
        if self.has_scaled_rows:
            checks.require(
                kpe.data_ptr() == ckv.data_ptr() and kpe.stride() == ckv.stride(),
                op,
                f"kpe_cache is a tensor beside rows of {SCALED_ROW_BYTES} bytes; expected None, they hold it",
            )
            parts = [("ckv_cache", ckv, SCALED_ROW_BYTES)]
        for name, cache, dim in parts:
            of_row = {**sizes, "head_dim": (dim, "the plan says")}
            paged_cache.require_sizes(
                op, name, cache, axes, of_row, "pass a cache that matches the plan, or plan again"
            )
            sizes["pages"] = (cache.shape[0], "ckv_cache has")
            checks.require(
                cache.dtype == self.kv_dtype, op, f"{name} is {cache.dtype}; planned with kv_data_type {self.kv_dtype}"
            )
            require_rows(op, name, cache)
        if self.has_scaled_rows:
            checks.require(alignment_of(ckv) == 0, op, "rows of ckv_cache do not start at multiples of 16 bytes")
            return {"ckv": ckv}
        return {"ckv": ckv, "kpe": kpe}
