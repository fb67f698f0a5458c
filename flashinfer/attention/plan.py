# SPDX-License-Identifier: Apache-2.0
"""What planned attention settles ahead of its runs, decode and prefill alike: shapes, kernels, the schedule, and each
signature of run() bound to a launch."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional, Protocol

import torch

from flashinfer import dtypes
from flashinfer.attention.variant import Overrides, Scales, Variant, require_sinks
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.layout import FP8_DTYPES
from flashinfer.host import checks, memo, paged_cache
from flashinfer.host.paged_cache import PagedCache, PagedKv
from flashinfer.host.rows import require_distinct, require_rows
from flashinfer.variants import LaunchFunctions, launch_functions


class Extent(Protocol):
    """Which KV a schedule brings to a block, and in what sizes: what a plan and a run must agree on."""

    def covers(self, other: Any) -> bool:
        """Whether a schedule of this extent gives right results for the other, if perhaps with needless tiles."""

    def suits(self, other: Any, is_captured: bool) -> bool:
        """Whether a run of the other extent keeps to this schedule, rather than plan again."""

    def joined(self, other: Any) -> Extent:
        """The smallest extent that covers both."""


class Shape(NamedTuple):
    """Of a planned batch."""

    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    page_size: int  # 1 without pages
    head_dim_qk: int
    head_dim_vo: int

    @staticmethod
    def of(op: str, *sizes: object) -> Shape:
        """Of sizes that a caller gave. Raises TypeError or ValueError."""
        lowest = [int(name != "batch_size") for name in Shape._fields]
        return Shape(*map(functools.partial(checks.integer, op), Shape._fields, sizes, lowest))

    def pages(self, layout: str, dtype: torch.dtype) -> PagedKv:
        """The cache that a batch of this shape is over."""
        return PagedKv(layout, self.page_size, self.num_kv_heads, self.head_dim_qk, self.head_dim_vo, dtype)


NO_FUNCTIONS = (None, None)  # variant and mask


def planned_functions(
    op: str, functions: tuple[Any, Any], shape: Shape, device: torch.device
) -> Optional[LaunchFunctions]:
    """Of the arguments variant and mask of plan(). Raises TypeError, ValueError or UnsupportedConfig."""
    batch_size, num_qo_heads, num_kv_heads = shape[:3]
    return launch_functions(
        op, *functions, device, batch_size=batch_size, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads
    )


def dtype_of(op: str, name: str, given: object) -> torch.dtype:
    """A dtype that a caller gave. Raises TypeError or ValueError."""
    try:
        return dtypes.torch_dtype(given)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {name}: {error}") from None


def short_names(op: str, types: tuple[torch.dtype, ...]) -> tuple[str, ...]:
    """Of the dtypes of q, KV and output. Raises UnsupportedConfig for an output of 8 bits, which q alone would have."""
    names = tuple(map(dtypes.short_name, types))
    if names[2] in FP8_DTYPES:
        raise UnsupportedConfig(
            f"{op}: the output would be {types[2]} as q is; expected 16 bits. Next step: name its dtype, as "
            f"o_data_type of plan() or o_dtype of single_{op}_with_kv_cache()"
        )
    return names


class Call(NamedTuple):
    """What run() was given."""

    q: torch.Tensor
    kv: PagedCache
    out: Optional[torch.Tensor]
    lse: Optional[torch.Tensor]
    scales: Scales
    pdl: Optional[bool]
    overrides: Optional[Overrides]
    q_pe: Optional[torch.Tensor] = None  # where a query has a second part
    sinks: Optional[torch.Tensor] = None

    @property
    def _k(self) -> torch.Tensor:
        return self.kv if isinstance(self.kv, torch.Tensor) else self.kv[0]

    @property
    def kv_dtype(self) -> torch.dtype:
        return self._k.dtype

    @property
    def num_pages(self) -> int:
        return self._k.shape[0]

    @property
    def v_offset(self) -> int:
        return paged_cache.v_offset(self.kv)


# Takes Lengths.row_addresses, the last of which is that of q_pe or sinks, addresses of q, out, lse, k, v, and
# Lengths.kv_addresses.
BoundLaunch = Callable[..., None]


@dataclass(frozen=True)
class BoundRun:
    """One signature of run() under one plan: checked, laid out but for the addresses."""

    launch: BoundLaunch
    settled_launch: BoundLaunch  # once a kernel was launched since the planner
    new_out: memo.Allocate
    new_lse: memo.Allocate
    extent: Extent
    v_offset: int  # bytes of V after K in a cache of one tensor
    num_tokens: int
    num_kv_rows: int  # or pages
    is_empty: bool
    queries: str = "medium"  # the class of batches that its tile is for


class Plan(ABC):
    """What a plan settled, but for where the index tensors are, and the runs seen under it."""

    names = ("q", "the K cache", "the V cache")  # in messages
    splitting: tuple[int, bool] = (-1, False)  # fixed_split_size and disable_split_kv of plan()

    def __init__(
        self,
        op: str,
        device: torch.device,
        shape: Shape,
        types: tuple[torch.dtype, torch.dtype, torch.dtype],
        mask: str,
        variant: Variant,
    ) -> None:
        self.op, self.device, self.shape, self.mask, self.variant = op, device, shape, mask, variant
        self.q_dtype, self.kv_dtype, self.o_dtype = types
        self.runs: memo.Memo[BoundRun] = memo.Memo()
        self.tiles: dict[str, tuple[Any, BoundLaunch]] = {}  # class of queries -> what `tile` returned
        self._planners: dict[Extent, BoundLaunch] = {}
        paged_cache.require_heads(op, shape.num_qo_heads, shape.num_kv_heads)

    def queries_of(self, num_tokens: int) -> str:
        """The class, of QUERIES, whose tile serves this many tokens best."""
        return "medium"

    def tile(self, queries: str) -> tuple[Any, BoundLaunch]:
        """The extent of the planned options under the tile of a class, and its planner. Loads the kernel; raises where
        there is none."""
        if queries not in self.tiles:
            extent = self._extent(queries)
            self.tiles[queries] = extent, self.planner(extent)
        return self.tiles[queries]

    def planner(self, extent: Any) -> BoundLaunch:
        """Has the schedule of that extent written on the device, nothing on the CPU; takes
        `Lengths.planner_addresses`."""
        if extent not in self._planners:
            self._planners[extent] = self._bind_planner(extent)
        return self._planners[extent]

    @abstractmethod
    def _extent(self, queries: str) -> Extent: ...

    @abstractmethod
    def _bind_planner(self, extent: Any) -> BoundLaunch: ...

    @abstractmethod
    def bind(self, call: Call, queries: str) -> BoundRun:
        """Check a call against the plan, and lay its launch out. Raises ValueError, TypeError or UnsupportedConfig."""

    def require_tensors(self, call: Call) -> None:
        """What every call must bring: tensors of dense rows on the wrapper's device."""
        pair = (call.kv,) if isinstance(call.kv, torch.Tensor) else call.kv
        q_name, *kv_names = self.names
        given = {q_name: call.q, "q_pe": call.q_pe, "out": call.out, "lse": call.lse, **dict(zip(kv_names, pair))}
        for name, tensor in given.items():
            if tensor is not None:
                checks.require_memory(self.op, **{name: tensor})
            if tensor is not None and tensor.device != self.device:
                raise ValueError(
                    f"{self.op}: {name} is on {tensor.device}, the workspace on {self.device}; move them to one device"
                )
        require_rows(self.op, q_name, call.q)
        checks.require_flag(self.op, "enable_pdl", call.pdl)
        if call.sinks is not None:
            require_sinks(self.op, call.sinks, self.shape.num_qo_heads, self.device)

    def variant_of(self, call: Call) -> Variant:
        """The planned one, with what the call gave besides."""
        variant, has_sinks = self.variant, call.sinks is not None
        if variant.has_sinks and not has_sinks:
            raise TypeError(f"{self.op}: sinks is missing or None; expected a tensor, which this wrapper is for")
        if call.overrides is not None:
            variant = variant.updated(self.op, self.shape.head_dim_qk, call.overrides)
        return variant if variant.has_sinks == has_sinks else replace(variant, has_sinks=has_sinks)

    def out_dtype(self, q_dtype: torch.dtype) -> torch.dtype:
        return self.o_dtype if self.o_dtype != self.q_dtype else q_dtype

    def outputs(self, call: Call) -> tuple[torch.Tensor, memo.Allocate, memo.Allocate]:
        """The output, or one like it, and what makes outputs and LSE for a call that brings none."""
        op, (num_tokens, num_heads) = self.op, call.q.shape[:2]
        o_dtype = self.out_dtype(call.q.dtype)
        out_shape = (num_tokens, num_heads, self.shape.head_dim_vo)
        new_out = memo.allocator(out_shape, o_dtype, self.device)
        new_lse = memo.allocator((num_tokens, num_heads), torch.float32, self.device)
        out = new_out() if call.out is None else call.out
        require_output(op, "out", out, out_shape, o_dtype)
        require_rows(op, "out", out)
        if call.lse is not None:
            require_output(op, "lse", call.lse, out_shape[:2], torch.float32)
            checks.require(call.lse.is_contiguous(), op, "lse is not contiguous; call .contiguous()")
        return out, new_out, new_lse


def require_output(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{op}: {name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}")
    require_distinct(op, name, tensor)


def no_launch(*addresses: Any) -> None:
    """The launch of an empty batch."""
