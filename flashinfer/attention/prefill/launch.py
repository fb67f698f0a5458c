# SPDX-License-Identifier: Apache-2.0
"""What single and planned prefill share: the kernel for a device, the schedule a plan leaves there, a bound launch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch

from flashinfer import target
from flashinfer.attention import workspace
from flashinfer.attention.plan import BoundLaunch, short_names
from flashinfer.attention.prefill import sm90
from flashinfer.attention.served import beside_prefill
from flashinfer.attention.variant import Variant
from flashinfer.attention.workspace import Memory
from flashinfer.families.attention import prefill as families
from flashinfer.families.attention.params import ADDRESSES, MASKS, QUERIES
from flashinfer.families.layout import fast_divisor, inside
from flashinfer.host import checks, memo
from flashinfer.host.paged_cache import KvStrides
from flashinfer.jit import KernelSpec, default_resolver
from flashinfer.jit.loader import Launcher, PreparedLaunch
from flashinfer.variants import NO_RANGES


@dataclass(frozen=True)
class PrefillKernel:
    """A prefill kernel on a device; the sizes are 0 on the CPU, which plans nothing."""

    launcher: Launcher
    block_m: int
    block_n: int
    num_blocks: int  # that the device holds at a time: the grid of a planned launch


def load_kernel(
    device: torch.device,
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    head_dims: tuple[int, int],
    kv_storage: str,
    mask: str,
    variant: Variant,
    queries: str,
    page_size: int = 1,
    pdl: Optional[bool] = None,
    device_scales: bool = False,
    group_size: int = 1,
    mixed: bool = False,
    planner_storage: str = "",
) -> PrefillKernel:
    """types: of q, KV and output; head_dims: of queries and keys, and of values; queries: of the family's axis; mixed:
    beside decode of other requests; planner_storage: of `PrefillPlan`. Raises UnsupportedConfig where there is
    no kernel, or what `Resolver.load` does."""
    q_dtype, kv_dtype, o_dtype = short_names("prefill", types)
    machine = target.of_device(device)
    axes = {
        "q_dtype": q_dtype, "kv_dtype": kv_dtype, "o_dtype": o_dtype,
        "head_dim": head_dims[0], "head_dim_vo": head_dims[1], **variant.spec_args,
    }  # fmt: skip
    request = functools.partial(
        families.prefill, machine, kv_storage=kv_storage, page_size=page_size, mask=mask, device_scales=device_scales,
        mixed=mixed, **axes,
    )  # fmt: skip
    spec = request(queries=queries)
    if kv_storage != "single" and device.type == "cuda" and not default_resolver().holds(spec):
        planner = families.PREFILL_PLAN.spec(
            machine, kv_storage=planner_storage or kv_storage, variant=variant.ranges[0], mixed=mixed
        )
        others = dict.fromkeys(request(queries=other) for other in QUERIES)
        served = beside_prefill(machine, group_size, axes, mixed) if (kv_storage, mask) == ("paged", "causal") else []
        default_resolver().expect([planner, *served, *(other for other in others if other != spec)])
    return load_spec(device, spec, pdl)


@functools.cache
def load_spec(device: torch.device, spec: KernelSpec, pdl: Optional[bool]) -> PrefillKernel:
    """Of a kernel that takes its work from a plan of prefill."""
    kernel = default_resolver().load(spec)
    if device.type == "cpu":
        return PrefillKernel(kernel.on(-1), 0, 0, 0)
    launcher = kernel.on(device.index, pdl=pdl)
    constants = launcher.config.constants
    num_blocks = memo.num_sms(device.index) * launcher.max_blocks_per_sm()
    return PrefillKernel(launcher, int(constants["kBlockM"]), int(constants["kBlockN"]), num_blocks)


@functools.cache
def load_planner(device: torch.device, kv_storage: str, ranges: str = "none", mixed: bool = False) -> Launcher:
    """ranges: canonical text of functions with a range of keys."""
    spec = families.PREFILL_PLAN.spec(target.of_device(device), kv_storage=kv_storage, variant=ranges, mixed=mixed)
    return default_resolver().load(spec).on(device.index)


def runs_beside(device: torch.device) -> bool:
    """Whether the two launches of a mixed batch run beside each other there."""
    if device.type == "cpu" or target.of_device(device) != "sm_90a":
        return False
    return memo.num_sms(device.index) >= families.MIN_SHARED_BLOCKS


# ------------------------------------------------------------------------------------------------------------- schedule


class Extent(NamedTuple):
    """The KV tiles that a schedule brings to a query tile, and their sizes."""

    mask: int  # MaskKind, of families.attention.params.MASKS
    window_left: int
    block_m: int
    block_n: int
    num_blocks: int
    ranges: tuple[str, bytes] = NO_RANGES  # of functions
    time_to_read: float = 0.0  # of a mixed batch, as of PrefillPlanParams
    decode: Any = None  # of a mixed batch, the extent of its decode

    @staticmethod
    def of(kernel: PrefillKernel, mask: str, variant: Variant) -> Extent:
        sizes = (kernel.block_m, kernel.block_n, kernel.num_blocks)
        constants = kernel.launcher.config.constants
        overlaps = bool(constants.get("kIsMixed")) and kernel.launcher.is_dependent
        time_to_read = families.time_to_read(constants, kernel.num_blocks) if overlaps else 0.0
        return Extent(MASKS[mask], variant.window_left, *sizes, variant.ranges, time_to_read)

    def covers(self, other: Extent) -> bool:
        mask = self.mask in (MASKS["none"], other.mask)
        window = self.window_left < 0 or 0 <= other.window_left <= self.window_left
        ranges = self.ranges in (NO_RANGES, other.ranges)
        launches = self[2:5] == other[2:5] and self[6:] == other[6:]
        return mask and window and ranges and launches

    def suits(self, other: Extent, is_captured: bool) -> bool:
        """Needless tiles cost more than planning again, but for a capture, which keeps its schedule."""
        return self == other or (is_captured and self.covers(other))

    def joined(self, other: Extent) -> Extent:
        window = -1 if min(self.window_left, other.window_left) < 0 else max(self.window_left, other.window_left)
        mask = self.mask if self.mask == other.mask else MASKS["none"]
        ranges = self.ranges if self.ranges == other.ranges else NO_RANGES
        return other._replace(mask=mask, window_left=window, ranges=ranges)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Where in the workspaces a plan writes, and how much fits. Depends on shapes alone: a captured run stays valid."""

    header: int
    tile_indptr: int
    counters: int
    items: int
    partial_out: int
    partial_lse: int
    max_items: int
    max_counters: int
    max_partial_rows: int
    workspaces: tuple[Memory, ...]  # kept alive as long as the addresses are in use

    @staticmethod
    def of(
        op: str,
        int_workspace: Memory,
        float_workspace: Memory,
        batch_size: int,
        num_kv_heads: int,
        head_dim_vo: int,
        split: bool = True,
        with_lse: bool = True,
        min_items: int = 64,
    ) -> Schedule:
        """with_lse: False of kernels whose rows of partial results hold it. min_items: that there is room for at least,
        whatever a plan needs."""
        max_counters = max(1, families.MAX_COUNTERS // num_kv_heads)
        fixed = (families.SCHEDULE_BYTES, (batch_size + 1) * 4, max_counters * num_kv_heads * 4)
        header, tile_indptr, counters, items = workspace.carve(
            op, "the int workspace", int_workspace, (*fixed, min_items * families.ITEM_BYTES)
        )
        int_end = int_workspace.data_ptr() + int_workspace.numel() * int_workspace.element_size()
        # The float workspace holds partial results: rows of every KV head, an output and an LSE each.
        float_bytes = float_workspace.numel() * float_workspace.element_size() - 512
        row_bytes = [num_kv_heads * num_floats * 4 for num_floats in (head_dim_vo, int(with_lse))]
        rows = max(0, float_bytes // sum(row_bytes)) if split else 0
        sizes = [rows * size for size in row_bytes]
        partial_out, partial_lse = (
            workspace.carve(op, "float_workspace_buffer", float_workspace, sizes) if rows else (0, 0)
        )
        max_items = min((int_end - items) // families.ITEM_BYTES, families.MAX_ITEMS)
        return Schedule(
            header, tile_indptr, counters, items, partial_out, partial_lse, max_items, max_counters, min(rows, 1 << 30),
            (int_workspace, float_workspace),
        )  # fmt: skip

    def bind_planner(
        self,
        device: torch.device,
        kv_storage: str,
        extent: Extent,
        page_size: int,
        batch_size: int,
        num_kv_heads: int,
        group_size: int,
        lengths: tuple[int, int] = (0, 0),
        costs: families.PlanCosts = families.COSTS,
        fixed_split: int = 0,
    ) -> PreparedLaunch:
        """The planner, which takes the addresses of qo_indptr, kv_indptr and last_page_len. `lengths`: qo_len and
        kv_len of one sequence, or as in `PrefillPlan`; fixed_split: keys of a split whatever shares the batch, or 0."""
        values = {
            "kv.indices": 0,
            "kv.len": lengths[1],
            **fast_divisor("kv.page_size", page_size),
            "schedule": self.header,
            "items": self.items,
            "tile_indptr": self.tile_indptr,
            "counters": self.counters,
            "batch_size": batch_size,
            "qo_len": lengths[0],
            "num_kv_heads": num_kv_heads,
            "group_size": group_size,
            "max_items": self.max_items,
            "max_counters": self.max_counters,
            "max_partial_rows": self.max_partial_rows,
            **{name: getattr(extent, name) for name in ("mask", "window_left", "block_m", "block_n", "num_blocks")},
            "time_to_read": extent.time_to_read,
            "extras": extent.ranges[1],
            "fixed_split": -(-fixed_split // extent.block_n),
            **inside("costs", costs._asdict()),
        }
        launcher = load_planner(device, kv_storage, extent.ranges[0], extent.decode is not None)
        return launcher.prepare((1, 1, 1), values, varying=("qo_indptr", "kv.indptr", "kv.last_page_len"))

    def require_items(self, op: str, num_rows: int, kernel: PrefillKernel, batch_size: int) -> None:
        """Room for a batch of so many query rows of each KV head."""
        needed = -(-num_rows // kernel.block_m) + batch_size
        checks.require(
            needed <= self.max_items,
            op,
            f"the int workspace holds {self.max_items} work items, {num_rows} query rows may need {needed}; pass a "
            "larger one to reset_workspace_buffer()",
        )

    def require_fixed_splits(
        self, op: str, num_rows: int, kernel: PrefillKernel, batch_size: int, num_kv_heads: int, head_dim_vo: int
    ) -> None:
        """Room for as many splits as requests may have where they do not depend on the batch."""
        rows = families.FIXED_SLOTS * min(num_rows, batch_size * kernel.block_m)
        needed, held = (count * num_kv_heads * (head_dim_vo + 1) * 4 for count in (rows, self.max_partial_rows))
        checks.require(
            rows <= self.max_partial_rows, op,
            f"float_workspace_buffer holds {held} bytes of partial results; with fixed_split_size this batch may need "
            f"{needed}. Next step: a larger one, or disable_split_kv=True",
        )  # fmt: skip
        counters = families.FIXED_COUNTERS * batch_size
        checks.require(
            counters <= self.max_counters, op,
            f"{batch_size} requests may need {counters} counters with fixed_split_size; there are {self.max_counters}. "
            "Next step: a smaller batch, or disable_split_kv=True",
        )  # fmt: skip
        self.require_items(op, num_rows, kernel, batch_size * families.MAX_FIXED_SPLITS)


def scratch(schedule: Optional[Schedule]) -> dict[str, int]:
    """The fields of PrefillScratch: null without a schedule."""
    if schedule is None:
        return dict.fromkeys((name for name, _ in families.SCRATCH), 0)
    return {
        "items": schedule.items,
        "schedule": schedule.header,
        "counters": schedule.counters,
        "partial_out": schedule.partial_out,
    }


def bind_launch(
    kernel: PrefillKernel,
    grid_size: int,
    row_strides: tuple[int, int, int, int],
    kv_strides: KvStrides,
    schedule: Optional[Schedule],
    options: dict[str, Any],
    *,
    batch_size: int,
    num_tokens: int,
    num_heads: tuple[int, int],
    page_size: int = 1,
    lengths: tuple[int, int] = (0, 0),
) -> BoundLaunch:
    """A launch with everything but the addresses laid out.

    row_strides: of q's tokens and heads, of those of the output; num_tokens: rows of both; num_heads: of queries and
    KV; options: `Variant.values`; lengths: qo_len and kv_len of a single sequence, or as in `PrefillPlan`.
    """
    names = ("q_token_stride", "q_head_stride", "out_token_stride", "out_head_stride")
    values = {
        "kv.index.len": lengths[1],
        **fast_divisor("kv.index.page_size", page_size),
        **kv_strides.values,
        **dict(zip(names, row_strides)),
        "batch_size": batch_size,
        "num_qo_heads": num_heads[0],
        "num_kv_heads": num_heads[1],
        **options,
        **scratch(schedule),
        "partial_lse": 0 if schedule is None else schedule.partial_lse,
        "qo_len": lengths[0],
        "num_tokens": num_tokens,
    }
    if kernel.launcher.params is families.Sm90PrefillParams:
        return sm90.bind_launch(kernel.launcher, min(grid_size, kernel.num_blocks), values, page_size)
    return kernel.launcher.prepare((grid_size, 1, 1), values, varying=(*families.ROWS, *ADDRESSES))
