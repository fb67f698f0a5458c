"""What the prefill operators share: loaded kernels, the schedule a plan leaves on the device, one checked launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.attention import workspace
from flashinfer.attention.variant import Variant, require_positive
from flashinfer.families.attention import prefill as families
from flashinfer.families.attention.params import ADDRESSES, MASKS, fast_divisor
from flashinfer.host import checks, memo
from flashinfer.host.paged_cache import KvStrides
from flashinfer.host.rows import require_rows
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import Launcher, PreparedLaunch
from flashinfer.jit.spec import KernelSpec


@dataclass(frozen=True)
class PrefillKernel:
    """A prefill kernel on a device; the sizes are 0 on the CPU, which plans nothing."""

    launcher: Launcher
    block_m: int
    block_n: int
    num_ctas: int  # that the device holds at a time: the grid of a planned launch


def kernel_spec(
    device: torch.device,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    kv_storage: str,
    mask: str,
    variant_args: tuple[tuple[str, str | bool], ...],
    short_queries: bool = False,
) -> KernelSpec:
    """The kernel for these arguments. Raises UnsupportedConfig, without compiling, where there is none."""
    spec = families.prefill(
        target.of_device(device),
        q_dtype=dtypes.short_name(q_dtype),
        kv_dtype=dtypes.short_name(kv_dtype),
        head_dim=head_dim_qk,
        head_dim_vo=head_dim_vo,
        kv_storage=kv_storage,
        short_queries=short_queries,
        mask=mask,
        **dict(variant_args),  # type: ignore[arg-type]
    )
    families.PREFILL.config(spec)
    return spec


@functools.cache
def load_kernel(
    device: torch.device,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    kv_storage: str,
    mask: str,
    variant_args: tuple[tuple[str, str | bool], ...],
    short_queries: bool = False,
    pdl: Optional[bool] = None,
) -> PrefillKernel:
    kernel = default_resolver().load(
        kernel_spec(device, q_dtype, kv_dtype, head_dim_qk, head_dim_vo, kv_storage, mask, variant_args, short_queries)
    )
    if device.type == "cpu":
        return PrefillKernel(kernel.on(-1), 0, 0, 0)
    launcher = kernel.on(device.index, pdl=pdl)
    constants = launcher.config.constants
    num_ctas = memo.num_sms(device.index) * launcher.max_blocks_per_sm()
    return PrefillKernel(launcher, int(constants["kBlockM"]), int(constants["kBlockN"]), num_ctas)


@functools.cache
def load_planner(device: torch.device, kv_storage: str) -> Launcher:
    return (
        default_resolver()
        .load(families.PREFILL_PLAN.spec(target.of_device(device), kv_storage=kv_storage))
        .on(device.index)
    )


def row_strides(op: str, k: torch.Tensor, v: torch.Tensor, layout: str) -> KvStrides:
    """Strides of K and V given as rows: `[kv_len, num_kv_heads, head_dim]` (NHD) or with the first axes swapped
    (HND).
    """
    for name, tensor in (("k", k), ("v", v)):
        checks.require(
            tensor.dim() == 3, op, f"{name} has shape {list(tensor.shape)}; expected three dimensions ({layout})"
        )
        require_rows(op, name, tensor)
    checks.require(
        k.shape[:2] == v.shape[:2], op, f"k has shape {list(k.shape)}, v {list(v.shape)}; lengths and heads must agree"
    )
    checks.require(k.dtype == v.dtype, op, f"k is {k.dtype}, v {v.dtype}; expected one dtype")
    checks.require_device(op, "v", v, k, "k")
    row, head = (0, 1) if layout == "NHD" else (1, 0)
    return KvStrides(k.stride(row), 0, k.stride(head), v.stride(row), 0, v.stride(head))


def require_output(op: str, q: torch.Tensor, out: torch.Tensor, lse: Optional[torch.Tensor], head_dim_vo: int) -> None:
    shape = (*q.shape[:2], head_dim_vo)
    if out.shape != shape or out.dtype != q.dtype or out.device != q.device:
        raise ValueError(
            f"{op}: out is {out.dtype} {list(out.shape)} on {out.device}; "
            f"expected {q.dtype} {list(shape)} on {q.device}"
        )
    require_rows(op, "out", out)
    if lse is None:
        return
    fits = lse.shape == q.shape[:2] and lse.dtype == torch.float32 and lse.device == q.device
    if not fits or not lse.is_contiguous():
        raise ValueError(
            f"{op}: lse is {lse.dtype} {list(lse.shape)}, strides {list(lse.stride())}, on {lse.device}; "
            f"expected contiguous float32 {list(q.shape[:2])} on {q.device}"
        )


# ------------------------------------------------------------------------------------------------------------- schedule


class Extent(NamedTuple):
    """Which KV tiles a schedule brings to a query tile, and in what sizes: what a plan and a run must agree on."""

    mask: int  # MaskKind, of families.attention.params.MASKS
    window_left: int
    block_m: int
    block_n: int
    num_ctas: int

    def covers(self, other: Extent) -> bool:
        """Whether a schedule of this extent gives right results for the other (if perhaps with needless tiles)."""
        mask = self.mask in (MASKS["none"], other.mask)
        window = self.window_left < 0 or 0 <= other.window_left <= self.window_left
        return mask and window and self[2:] == other[2:]

    def joined(self, other: Extent) -> Extent:
        """The smallest extent that covers both."""
        window = -1 if min(self.window_left, other.window_left) < 0 else max(self.window_left, other.window_left)
        mask = self.mask if self.mask == other.mask else MASKS["none"]
        return other._replace(mask=mask, window_left=window)


PlannerLaunch = Callable[[Extent, int, int, int], None]  # addresses of qo_indptr, kv_indptr, last_page_len
_MAX_COUNTERS = 1 << 15  # query tiles times KV heads that may be split


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
    workspaces: tuple[torch.Tensor, ...]  # kept alive as long as the addresses are in use

    @staticmethod
    def of(
        op: str,
        int_workspace: torch.Tensor,
        float_workspace: torch.Tensor,
        batch_size: int,
        num_kv_heads: int,
        head_dim_vo: int,
        split: bool = True,
    ) -> Schedule:
        max_counters = max(1, _MAX_COUNTERS // num_kv_heads)
        fixed = (families.SCHEDULE_BYTES, (batch_size + 1) * 4, max_counters * num_kv_heads * 4)
        header, tile_indptr, counters, items = workspace.carve(
            op, "the int workspace", int_workspace, (*fixed, 64 * families.ITEM_BYTES)
        )
        int_end = int_workspace.data_ptr() + int_workspace.numel() * int_workspace.element_size()
        # What is left of the float workspace holds partial results: rows of every KV head, an output and an LSE each.
        float_bytes = float_workspace.numel() * float_workspace.element_size() - 512
        rows = max(0, float_bytes // (num_kv_heads * (head_dim_vo + 1) * 4)) if split else 0
        sizes = (rows * num_kv_heads * head_dim_vo * 4, rows * num_kv_heads * 4)
        partial_out, partial_lse = (
            workspace.carve(op, "float_workspace_buffer", float_workspace, sizes) if rows else (0, 0)
        )
        max_items = (int_end - items) // families.ITEM_BYTES
        return Schedule(
            header, tile_indptr, counters, items, partial_out, partial_lse, max_items, max_counters, min(rows, 1 << 30),
            (int_workspace, float_workspace),
        )  # fmt: skip

    def bind_planner(
        self,
        device: torch.device,
        kv_storage: str,
        page_size: int,
        batch_size: int,
        num_kv_heads: int,
        group_size: int,
        lengths: tuple[int, int] = (0, 0),
    ) -> PlannerLaunch:
        """The planner with everything but extent and addresses laid out. `lengths`: qo_len and kv_len of one
        sequence.
        """
        launcher = load_planner(device, kv_storage)
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
        }

        @functools.cache
        def prepared(extent: Extent) -> PreparedLaunch:
            return launcher.prepare(
                (1, 1, 1), {**values, **extent._asdict()}, varying=("qo_indptr", "kv.indptr", "kv.last_page_len")
            )

        def launch(extent: Extent, qo_indptr: int, kv_indptr: int, last_page_len: int) -> None:
            prepared(extent)(qo_indptr, kv_indptr, last_page_len)

        return launch

    @property
    def values(self) -> dict[str, int]:
        """The fields of PrefillParams."""
        return {
            "items": self.items,
            "schedule": self.header,
            "counters": self.counters,
            "partial_out": self.partial_out,
            "partial_lse": self.partial_lse,
        }


NO_SCHEDULE = dict.fromkeys(("items", "schedule", "counters", "partial_out", "partial_lse"), 0)
# Called with the addresses of qo_indptr, mask and mask_indptr; of q, out, lse, k and v; of KV indptr, last_page_len and
# indices.
Launch = Callable[..., None]


def bind_launch(
    kernel: PrefillKernel,
    device: torch.device,
    grid_size: int,
    row_strides: tuple[int, ...],
    kv_strides: KvStrides,
    page_size: int,
    schedule: dict[str, int],
    batch_size: int,
    num_heads: tuple[int, int],
    lengths: tuple[int, int],
    variant: Variant,
    scales: tuple[float, float],
) -> Launch:
    """A launch with everything but the addresses laid out.

    row_strides: of q's tokens and heads, of those of the output; num_heads: of queries and KV; lengths: qo_len and
    kv_len of a single sequence.
    """
    require_positive("prefill", "q_scale * k_scale", scales[0])
    q_token, q_head, out_token, out_head = row_strides
    values = {
        "kv.index.len": lengths[1],
        **fast_divisor("kv.index.page_size", page_size),
        **kv_strides.values,
        "q_token_stride": q_token,
        "q_head_stride": q_head,
        "out_token_stride": out_token,
        "out_head_stride": out_head,
        "batch_size": batch_size,
        "num_qo_heads": num_heads[0],
        "num_kv_heads": num_heads[1],
        **variant.values(num_heads[0], device, *scales),
        **schedule,
        "qo_len": lengths[0],
    }
    return kernel.launcher.prepare((grid_size, 1, 1), values, varying=(*families.ROWS, *ADDRESSES))


def no_launch(*addresses: Any) -> None:
    """Of no query."""
