# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode of one batch: what a plan of both settles."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from flashinfer.attention import workspace
from flashinfer.attention.decode.plan import MixedDecodePlan
from flashinfer.attention.plan import BoundLaunch, BoundRun, Call, Shape
from flashinfer.attention.prefill.launch import Extent
from flashinfer.attention.prefill.plan import PrefillPlan
from flashinfer.attention.variant import Variant
from flashinfer.families.attention import prefill as families
from flashinfer.host.paged_cache import PagedKv


class MixedPlan(PrefillPlan):
    """Of prompts beside requests to decode: a launch of prefill, and one of decode of the requests of one query. On
    Hopper the second runs beside the first, on the SMs that the planner leaves it."""

    def __init__(
        self,
        op: str,
        device: torch.device,
        shape: Shape,
        types: tuple[torch.dtype, torch.dtype, torch.dtype],
        mask: str,
        variant: Variant,
        kv: PagedKv,
        workspaces: tuple[torch.Tensor, torch.Tensor],
        whole_lengths: bool = False,
        **options: Any,
    ) -> None:
        """As of `PrefillPlan`."""
        ints, floats = map(workspace.two_parts, workspaces)
        super().__init__(
            op, device, shape, types, mask, variant, kv, (ints[0], floats[0]), whole_lengths=whole_lengths, **options
        )
        self._new_decode = functools.partial(
            MixedDecodePlan, op, device, shape, types, variant, kv.layout, (ints[1], floats[1]),
            whole_lengths=whole_lengths,
        )  # fmt: skip

    @functools.cached_property
    def _decode(self) -> MixedDecodePlan:
        return self._new_decode()

    def _has_decode(self, queries: str) -> bool:
        """One launch computes all where no request can have many rows, and on a CPU."""
        return queries != "short" and self.device.type != "cpu"

    def queries_of(self, num_tokens: int) -> str:
        batch_size, group_size = self.shape.batch_size, self._group_size
        most_tokens = num_tokens - batch_size + 1  # of a request, if all have some
        if most_tokens * group_size <= families.SHORT_ROWS:
            return "short"
        # How many are decoded the host does not know: half of them, say.
        queries = families.queries_of(num_tokens * group_size, -(-batch_size // 2), self.shape.num_kv_heads)
        return "long" if queries == "long" else "medium"

    def _extent(self, queries: str) -> Extent:
        extent = super()._extent(queries)
        return extent._replace(decode=self._decode._extent(queries)) if self._has_decode(queries) else extent

    def _bind_planner(self, extent: Extent) -> BoundLaunch:
        of_prefill = super()._bind_planner(extent)
        if extent.decode is None:
            return of_prefill
        of_decode = self._decode.planner(extent.decode)

        def plan(qo_indptr: int, kv_indptr: int, lengths: int) -> None:
            of_decode(kv_indptr, lengths, qo_indptr)  # which lets the next one in at once
            of_prefill(qo_indptr, kv_indptr, lengths)

        return plan

    def bind(self, call: Call, queries: str) -> BoundRun:
        run = super().bind(call, queries)
        if not self._has_decode(queries):
            return run
        decode = self._decode.bind(call, queries)
        first, second = run.launch, decode.launch

        def launch(*addresses: Any) -> None:
            first(*addresses)
            second(*addresses[len(families.ROWS) :])

        assert isinstance(run.extent, Extent)
        extent = run.extent._replace(decode=decode.extent)
        return replace(run, launch=launch, settled_launch=launch, extent=extent)
