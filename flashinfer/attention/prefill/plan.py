"""What a plan of prefill settles, and what is read from the arguments of plan() and forward()."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from flashinfer.attention.prefill import launch as launches
from flashinfer.attention.prefill.launch import Extent, Launch, PlannerLaunch, Schedule
from flashinfer.attention.variant import Variant
from flashinfer.families.attention.params import MASKS
from flashinfer.families.attention.prefill import SHORT_ROWS
from flashinfer.host import memo


@dataclass(frozen=True)
class Run:
    """One signature of run() under one problem: checked, laid out but for the addresses."""

    launch: Launch
    new_out: memo.Allocate
    new_lse: memo.Allocate
    extent: Extent
    short_queries: bool
    v_offset: int  # of V after K in a cache of one tensor
    is_empty: bool


@dataclass(frozen=True, eq=False)
class Problem:
    """What a plan fixed, but for where the index tensors are, and the runs seen under it."""

    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    mask: str
    variant: Variant
    schedule: Optional[Schedule]
    planner: Optional[PlannerLaunch]
    runs: memo.Memo[Run] = field(default_factory=memo.Memo)
    extents: dict[bool, Extent] = field(default_factory=dict)  # of the planned options, for long and short queries

    def is_short(self, num_tokens: int, otherwise: bool = False) -> bool:
        """Whether the tile for short queries serves this many tokens best; `otherwise` where the number is negative."""
        if num_tokens < 0:
            return otherwise
        return num_tokens * (self.num_qo_heads // self.num_kv_heads) <= SHORT_ROWS * self.batch_size


def num_tokens_of(qo_indptr: torch.Tensor, later: dict[str, Any]) -> int:
    """As far as the host knows without asking the device; -1 if not at all."""
    if qo_indptr.device.type == "cpu":
        return int(qo_indptr[-1])
    longest = later.get("max_token_per_sequence")
    return int(longest) * (qo_indptr.shape[0] - 1) if longest is not None else -1


def extent_of(kernel: launches.PrefillKernel, mask: str, variant: Variant) -> Extent:
    return Extent(MASKS[mask], variant.window_left, kernel.block_m, kernel.block_n, kernel.num_ctas)


def forward_overrides(
    q: torch.Tensor,
    causal: bool,
    pos_encoding_mode: str,
    window_left: int,
    logits_soft_cap: Optional[float],
    sm_scale: Optional[float],
    rope_scale: Optional[float],
    rope_theta: Optional[float],
) -> tuple[Any, ...]:
    """forward() takes every option from its own arguments, defaults included, whatever was planned."""
    return (
        causal,
        pos_encoding_mode,
        window_left,
        0.0 if logits_soft_cap is None else logits_soft_cap,
        1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale,
        1.0 if rope_scale is None else rope_scale,
        1e4 if rope_theta is None else rope_theta,
    )
