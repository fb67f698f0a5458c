# SPDX-License-Identifier: Apache-2.0
"""Latent attention in which every query has its own list of rows (DeepSeek-V3.2): without a plan by the caller."""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple, Optional

import torch

from flashinfer import target
from flashinfer.attention.mla.paged import BatchMLAPagedAttentionWrapper
from flashinfer.attention.mla.plan import MlaPlan
from flashinfer.attention.plan import BoundLaunch
from flashinfer.attention.planned import Result
from flashinfer.attention.prefill.launch import Extent, Schedule
from flashinfer.families.attention.mla import COMPACT_INDICES
from flashinfer.families.attention.prefill import MAX_SPLITS, PlanCosts
from flashinfer.host import checks, memo, traced
from flashinfer.host import indices as _indices
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch


def sparse_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    head_dim_ckv: int = 512,
    *,
    kv_scale: Optional[float] = None,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
    return_lse: bool = False,
) -> Result:
    """Attention of every token over the rows that its list names: `softmax(sm_scale * q · kv[list]) kv[list, :ckv]`.

    Args:
        q: `[num_tokens, num_heads, head_dim_ckv + head_dim_kpe]`, fp16 or bf16 (fp32 on the CPU).
        kv: `[num_rows, head_dim_ckv + head_dim_kpe]`, or with an axis of one head in between: latent rows, in the dtype
            of q or fp8 e4m3. Rows may lie apart. Or uint8 `[num_rows, 656]`, under bf16 and 512 + 64: as
            DeepSeek-V3.2 stores them (vLLM's fp8_ds_mla), 512 elements of e4m3, float32 scales of each 128 of them, 64
            elements of bf16.
        indices: int32 `[num_tokens, top_k]`, or with an axis of one head in between: rows of kv in any order. A
            negative number, anywhere in the list, is none; a row that is named twice counts twice.
        sm_scale: factor of the logits.
        head_dim_ckv: elements of a row that are values: 512 or 256, of rows that have 64 more or none.
        kv_scale: factor of a quantized cache without scales of its own.
        out: `[num_tokens, num_heads, head_dim_ckv]`, dtype of q; allocated when None.
        lse: fp32 `[num_tokens, num_heads]`; allocated when None and return_lse.
        return_lse: also return the base-2 logarithm of the sum of exponentials.

    Returns:
        out, or (out, lse). A token whose list names no row gives zeros and -inf.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
        IndexError: on the CPU, an index past the rows; a GPU takes it for none.
        UnsupportedConfig: no kernel for this dtype or these dimensions.
    """
    return _call("sparse_mla_prefill", q, kv, indices, sm_scale, head_dim_ckv, kv_scale, out, lse, return_lse)


def sparse_mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    head_dim_ckv: int = 512,
    *,
    kv_scale: Optional[float] = None,
    out: Optional[torch.Tensor] = None,
    lse: Optional[torch.Tensor] = None,
    return_lse: bool = False,
) -> Result:
    """`sparse_mla_prefill` of a batch over a paged cache.

    Args:
        q: `[batch_size, q_len, num_heads, head_dim_ckv + head_dim_kpe]`.
        kv_cache: `[num_pages, page_size, head_dim_ckv + head_dim_kpe]`, or with an axis of one head before the last; or
            uint8 with 656 columns. All rows lie evenly apart, as those of one tensor do.
        indices: int32 `[batch_size, q_len, top_k]`: row `page * page_size + entry`.
        out, lse: `[batch_size, q_len, num_heads, head_dim_ckv]` and `[batch_size, q_len, num_heads]`, dense.
        sm_scale, head_dim_ckv, kv_scale, return_lse: as there.

    Returns, Raises: as there.
    """
    return _call("sparse_mla_decode", q, kv_cache, indices, sm_scale, head_dim_ckv, kv_scale, out, lse, return_lse)


# ------------------------------------------------------------------------------------------------------------- one call


def _call(
    op: str,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    head_dim_ckv: int,
    kv_scale: Optional[float],
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    return_lse: bool,
) -> Result:
    if not traced.is_dynamo_compiling():
        return _run(op, q, kv, indices, sm_scale, head_dim_ckv, kv_scale, out, lse, return_lse)
    if out is None:
        out = q.new_empty((*q.shape[:-1], head_dim_ckv))
    if return_lse and lse is None:
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    _door(op, q, kv, indices, sm_scale, head_dim_ckv, kv_scale, out, lse)
    return (out, lse) if return_lse and lse is not None else out


def _run(
    op: str,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    head_dim_ckv: int,
    kv_scale: Optional[float],
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    return_lse: bool,
) -> Result:
    checks.require_tensors(op, q=q, kv=kv, indices=indices)
    dim = checks.integer(op, "head_dim_ckv", head_dim_ckv, 1)
    is_batch = op == "sparse_mla_decode"
    rows, lists = _rows(op, kv, is_batch), _lists(op, q, indices, is_batch)
    has_scaled_rows = rows.dtype == torch.uint8
    checks.require(
        (has_scaled_rows or q.shape[-1] == rows.shape[1]) and q.shape[-1] >= dim,
        op,
        f"q has rows of {q.shape[-1]}, kv of {rows.shape[1]}; expected equal ones of at least head_dim_ckv {dim}",
    )
    for name, tensor in (("kv", kv), ("indices", indices)):
        checks.require_device(op, name, tensor, q, "q")
    flat_q = q.flatten(0, 1) if is_batch else q
    flat_out, flat_lse = (_flat(op, name, x, q, is_batch) for name, x in (("out", out), ("lse", lse)))
    if _indices.are_visible(lists):
        expected = f"kv's {rows.shape[0]} rows, or below 0 for none"
        _indices.require_within(op, "indices", lists, -(1 << 31), rows.shape[0], expected)

    attention = _attention_here(q.device)
    attention._op_name = op

    def attend(q: torch.Tensor, lists: torch.Tensor, out: _Output, lse: _Output) -> Result:
        num_heads, dim_qk = q.shape[1:]
        sizes, types = (num_heads, dim, dim_qk - dim, 1), (q.dtype, kv.dtype)
        attention.plan_lists(lists, rows.shape[0], (sizes, False, sm_scale, types))
        caches, scales = (rows[:, None, :dim], rows[:, None, dim:]), (None, kv_scale, kv_scale)
        if has_scaled_rows:
            caches = (rows[:, None],) * 2
        return attention._run(q[..., :dim], caches, out, lse, return_lse, scales, None, None, q[..., dim:])

    num_tokens, step = len(flat_q), _tokens_at_once(flat_q.shape[1], lists.shape[1])
    if num_tokens <= step:
        result = attend(flat_q, lists, flat_out, flat_lse)
    else:
        out_of_all = _output(op, "out", flat_out, (*flat_q.shape[:2], dim), q)
        lse_of_all = _output(op, "lse", flat_lse, flat_q.shape[:2], q, torch.float32) if return_lse else None
        for begin in range(0, num_tokens, step):
            some = slice(begin, begin + step)
            attend(flat_q[some], lists[some], out_of_all[some], None if lse_of_all is None else lse_of_all[some])
        result = out_of_all if lse_of_all is None else (out_of_all, lse_of_all)
    if not is_batch:
        return result
    new_out, new_lse = result if isinstance(result, tuple) else (result, None)
    if out is None:
        out = new_out.view(*q.shape[:-1], dim)
    if new_lse is None:
        return out
    return out, new_lse.view(q.shape[:-1]) if lse is None else lse


_Output = Optional[torch.Tensor]
_MAX_ITEMS = 1 << 17  # of a plan: what the int workspace has room for, beside a counter and an offset for each token


def _tokens_at_once(num_heads: int, top_k: int) -> int:
    """As many as one plan is made for: a request each, of tiles of 16 rows at least. Rows in all lists have 32 bits."""
    return max(1, min(_MAX_ITEMS // (-(-num_heads // 16) + 1), ((1 << 31) - 1) // max(top_k, 1)))


def _output(
    op: str, name: str, given: _Output, shape: tuple[int, ...], q: torch.Tensor, dtype: Optional[torch.dtype] = None
) -> torch.Tensor:
    if given is None:
        return q.new_empty(shape, dtype=dtype)
    checks.require(given.shape == shape, op, f"{name} is {list(given.shape)}; expected {list(shape)}")
    return given


def _rows(op: str, kv: torch.Tensor, is_paged: bool) -> torch.Tensor:
    """`[num_rows, dim]`."""
    rank = 3 if is_paged else 2
    if kv.dim() == rank + 1 and kv.shape[-2] == 1:
        kv = kv.squeeze(-2)
    shape = "[num_pages, page_size, dim]" if is_paged else "[num_rows, dim]"
    checks.require(kv.dim() == rank, op, f"kv has shape {list(kv.shape)}; expected {shape}")
    if not is_paged:
        return kv
    num_pages, page_size, _ = kv.shape
    is_even = num_pages <= 1 or page_size == 0 or kv.stride(0) == page_size * kv.stride(1) or page_size == 1
    checks.require(
        is_even,
        op,
        f"the pages of kv_cache lie {kv.stride(0)} elements apart, their {page_size} rows {kv.stride(1)}; expected "
        "rows evenly apart. Next step: BatchMLAPagedAttentionWrapper, or a cache of its own",
    )
    return kv.flatten(0, 1) if page_size != 1 else kv[:, 0]


def _lists(op: str, q: torch.Tensor, given: torch.Tensor, is_batch: bool) -> torch.Tensor:
    """`[num_tokens, top_k]`."""
    rank = 3 if is_batch else 2
    shape = "[batch_size, q_len, num_heads, dim]" if is_batch else "[num_tokens, num_heads, dim]"
    checks.require(q.dim() == rank + 1, op, f"q has shape {list(q.shape)}; expected {shape}")
    if given.dim() == rank + 1 and given.shape[-2] == 1:
        given = given.squeeze(-2)
    checks.require(
        given.dim() == rank and given.shape[:-1] == q.shape[:-2],
        op,
        f"indices has shape {list(given.shape)}; expected {[*q.shape[:-2]]} lists for q of shape {list(q.shape)}",
    )
    checks.require(given.dtype == torch.int32, op, f"indices is {given.dtype}; expected torch.int32")
    checks.require_unit_stride(op, "indices", given)
    return given.flatten(0, 1) if is_batch else given


def _flat(
    op: str, name: str, tensor: Optional[torch.Tensor], q: torch.Tensor, is_batch: bool
) -> Optional[torch.Tensor]:
    """An output without the axis of q_len."""
    if tensor is None or not is_batch:
        return tensor
    checks.require_tensors(op, **{name: tensor})
    checks.require(
        tensor.shape[: 2 if name == "out" else 3] == q.shape[: 2 if name == "out" else 3] and tensor.is_contiguous(),
        op,
        f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}; expected dense "
        f"{[*q.shape[:-1]]}{', head_dim_ckv' if name == 'out' else ''}",
    )
    return tensor.flatten(0, 1)


class _Planned(NamedTuple):
    """What plan() of the wrapper takes, in one piece of memory."""

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_len_arr: torch.Tensor

    @staticmethod
    def of(op: str, lists: torch.Tensor) -> _Planned:
        """Yet to be filled, by `_SparseAttention`."""
        num_lists, max_len = lists.shape
        checks.require(
            num_lists * max_len < 1 << 31, op, f"indices has {num_lists * max_len} entries; expected 32 bits"
        )
        sizes = num_lists + 1, num_lists + 1, num_lists * max_len, num_lists
        starts = [sum(-(-size // 4) * 4 for size in sizes[:i]) for i in range(len(sizes) + 1)]
        memory = torch.empty(starts[-1], dtype=torch.int32, device=lists.device)
        return _Planned(*[memory[start : start + size] for start, size in zip(starts, sizes)])


class _OfLists(NamedTuple):
    """Of the lists, what a launch that packs them depends on."""

    shape: tuple[int, int]
    stride: int
    num_rows: int

    def prepare(self, device: torch.device, schedule: dict[str, int]) -> PreparedLaunch:
        """A launch that makes every list a request, of the rows in it that are any. Takes addresses: of the lists and
        of a `_Planned`. schedule: what a GPU needs to lay out the work of attention over them."""
        launcher = (
            default_resolver()
            .load(COMPACT_INDICES.spec(target.of_device(device)))
            .on(-1 if device.index is None else device.index)
        )
        values = {
            "list_stride": self.stride,
            "num_lists": self.shape[0],
            "max_len": self.shape[1],
            "num_rows": self.num_rows,
            **schedule,
        }
        varying = ("indices", "qo_indptr", "kv_indptr", "compacted", "lengths")
        return launcher.prepare((self.shape[0], 1, 1), values, varying=varying)


class _SparseAttention(BatchMLAPagedAttentionWrapper):
    """On a GPU the kernel that packs lists is the planner: it knows first what lies in them, and lists that are as long
    as each other, as most are, need no more of one."""

    def __init__(self, float_workspace_buffer: torch.Tensor) -> None:
        super().__init__(float_workspace_buffer)
        self._addresses: tuple[int, ...] = ()
        if self.device.type != "cpu":
            self._may_see_indices = False  # they are not there yet; the lists have been looked at

    def plan_lists(self, lists: torch.Tensor, num_rows: int, arguments: tuple[Any, ...]) -> None:
        """arguments: those of `BatchMLAPagedAttentionWrapper._describe`."""
        planned, of_lists = (
            _Planned.of(self._op_name, lists),
            _OfLists((lists.shape[0], lists.shape[1]), lists.stride(0), num_rows),
        )
        addresses = lists.data_ptr(), *(part.data_ptr() for part in planned)
        if len(lists) == 0:
            planned.qo_indptr.zero_()
            planned.kv_indptr.zero_()
        elif lists.device.type == "cpu":
            _launch_on_cpu(of_lists)(*addresses)
        self._addresses = addresses
        self._settle(planned, (*arguments, of_lists))

    def _describe(
        self, batch_size: int, workspaces: tuple[torch.Tensor, torch.Tensor], arguments: tuple[Any, ...]
    ) -> MlaPlan:
        *arguments_of_mla, of_lists = arguments
        plan = super()._describe(batch_size, workspaces, tuple(arguments_of_mla))

        def bind(schedule: Schedule, extent: Extent, costs: PlanCosts) -> BoundLaunch:
            num_heads = plan.shape.num_qo_heads
            num_q_tiles, num_tiles = -(-num_heads // extent.block_m), -(-of_lists.shape[1] // extent.block_n)
            room = min(
                MAX_SPLITS,
                schedule.max_items // (batch_size * num_q_tiles),
                schedule.max_partial_rows // (batch_size * num_heads),
            )
            num_splits = 1
            if batch_size * num_q_tiles <= schedule.max_counters:
                num_splits = _splits_of(batch_size * num_q_tiles, num_tiles, extent, costs, room)
            addresses = {"items": schedule.items, "schedule": schedule.header, "counters": schedule.counters}
            sizes = {
                "num_heads": num_heads, "block_m": extent.block_m, "block_n": extent.block_n, "num_splits": num_splits,
            }  # fmt: skip
            launch = of_lists.prepare(self.device, {**addresses, **sizes})
            return lambda *planner_addresses: launch(*self._addresses)

        plan.own_planner = bind
        return plan


def _splits_of(num_tiles: int, cost: int, extent: Extent, costs: PlanCosts, room: int) -> int:
    """Into how many runs to cut each of so many query tiles, of `cost` KV tiles each: what
    csrc/attention/prefill/plan.cuh decides where all cost the same. room: for so many."""
    best = math.inf, 1
    for limit in range(max(cost, 1), max(costs.min_split, 1) - 1, -1):
        num = -(-max(cost, 1) // limit)
        time = -(-num_tiles * num // extent.num_blocks) * (limit + costs.of_item + costs.of_partial * (num > 1))
        if num <= max(room, 1):
            best = min(best, (time * (0.97 if num == 1 else 1.0), num))
    return best[1]


_on_cpu: memo.Memo[PreparedLaunch] = memo.Memo()


def _launch_on_cpu(of_lists: _OfLists) -> PreparedLaunch:
    launch = _on_cpu.get(of_lists)
    if launch is None:
        schedule = dict.fromkeys(("items", "schedule", "counters", "num_heads", "block_m", "block_n", "num_splits"), 0)
        launch = _on_cpu.remember(of_lists, of_lists.prepare(torch.device("cpu"), schedule))
    return launch


class _OfThread(threading.local):
    """Wrappers of one thread, by device and stream: no other thread's plan comes between a plan and its run."""

    def __init__(self) -> None:
        self.wrappers: dict[tuple[int, int], _SparseAttention] = {}


_of_thread = _OfThread()
_WORKSPACE_BYTES = 64 << 20  # of partial results: two of 128 rows for each block of a large GPU


def _attention_here(device: torch.device) -> _SparseAttention:
    """A wrapper for the current stream. A captured graph has one of its own, so that a replay disturbs no other run."""
    is_cuda = device.type == "cuda"

    def make() -> _SparseAttention:
        workspace = torch.empty(_WORKSPACE_BYTES if is_cuda else 0, dtype=torch.uint8, device=device)
        return _SparseAttention(workspace)

    if is_cuda and torch.cuda.is_current_stream_capturing():
        return make()
    index = device.index if is_cuda else -1
    key = index, memo.current_stream(index)
    return _of_thread.wrappers.get(key) or _of_thread.wrappers.setdefault(key, make())


_door = traced.door(
    "sparse_mla",
    lambda op, q, kv, lists, sm_scale, dim, kv_scale, out, lse: _run(
        op, q, kv, lists, sm_scale, dim, kv_scale, out, lse, lse is not None
    ),
    {
        "op": "str",
        **dict.fromkeys(("q", "kv", "indices"), "Tensor"),
        **{"sm_scale": "float", "head_dim_ckv": "int", "kv_scale": "float?"},
        **{"out": "Tensor(!)", "lse": "Tensor(!)?"},
    },
)
