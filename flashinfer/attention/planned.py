# SPDX-License-Identifier: Apache-2.0
"""One planned wrapper: what decode and prefill have in common, whatever holds the KV.

`plan` settles what the following runs share and launches a planner on the device, without waiting for it. A run finds
the launch that was bound for its signature, and packs addresses. What fails changes nothing: a plan is checked, copied
and launched before the wrapper takes note of it.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Optional, Union

import torch

from flashinfer.attention import lengths, workspace
from flashinfer.attention.compat import EngineNames, require_no_jit_args
from flashinfer.attention.items import Items
from flashinfer.attention.lengths import FixedBuffers, Lengths
from flashinfer.attention.mask import take_mask
from flashinfer.attention.plan import BoundLaunch, BoundRun, Call, Extent, Plan
from flashinfer.attention.variant import (
    TRACED_OVERRIDES,
    GivenScale,
    Overrides,
    are_plain,
    read_scales,
    signature_of_sinks,
)
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention.params import QUERIES
from flashinfer.host import checks, indices, memo, paged_cache, traced
from flashinfer.host.checks import LOWEST_ADDRESS
from flashinfer.host.handles import Uncopyable
from flashinfer.host.paged_cache import PagedCache
from flashinfer.host.traced import is_dynamo_compiling

DataType = Union[str, torch.dtype]
Result = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
GivenScales = tuple[GivenScale, GivenScale, GivenScale]  # of q, k and v
Masks = tuple[Optional[torch.Tensor], Optional[torch.Tensor]]  # custom_mask, packed_custom_mask


_SCALES = ("q_scale", "k_scale", "v_scale")
NO_SCALES = (None, None, None)  # what most calls give, by identity
_MASK_ROLES = ("mask", "mask_indptr")
_NO_BUFFERS: Mapping[str, Optional[torch.Tensor]] = MappingProxyType({})
_NO_RUN: Any = (None, None)
_NO_PLAN = (None, None)
# Entries that an index tensor has beyond one for each request.
_EXTRA_ENTRIES = {"qo_indptr": 1, "kv_indptr": 1, "kv_indices": None, "last_page_len": 0}


class PlannedAttention(Uncopyable, EngineNames):
    """The wrapper but for its arguments.

    Index tensors come in one order: qo_indptr where a request has several queries, then those of the KV. Under
    use_cuda_graph they are kept in the caller's buffers.
    """

    _op_name: str
    _index_names: tuple[str, ...]  # as plan() calls them
    _roles: tuple[str, ...]  # what they are: attributes of Lengths
    _whole_lengths = False  # the last of them are lengths of requests, not of their last pages
    _operands = ("q", "k", "v")  # as run() calls them
    _has_sinks = False  # every run() brings some: plan() then loads the kernels that take them

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        buffers: Mapping[str, Optional[torch.Tensor]] = _NO_BUFFERS,
        mask_buffers: Masks = (None, None),
        backend: str = "auto",
        jit_args: object = None,
    ) -> None:
        op = self._op_name
        require_no_jit_args(op, jit_args)
        paged_cache.require_layout(op, kv_layout)
        workspace.require_workspace(op, float_workspace_buffer)
        super().__init__(backend)
        self.device, self._device_index = float_workspace_buffer.device, float_workspace_buffer.get_device()
        counted = [i for i, role in enumerate(self._roles) if _EXTRA_ENTRIES[role] is not None]
        self._counted = operator.itemgetter(*counted)  # of the index tensors, those that the batch size gives a size
        self._may_see_indices = indices.may_be_visible(float_workspace_buffer)
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._fixed: Optional[FixedBuffers] = None
        if use_cuda_graph:
            self._fixed = FixedBuffers(op, self.device, buffers)
            self._buffers = {**dict(zip(self._roles, buffers.values())), **dict(zip(_MASK_ROLES, mask_buffers))}
        self._float_workspace_buffer = float_workspace_buffer
        int_bytes = workspace.INT_WORKSPACE_BYTES if self.device.type == "cuda" else 0
        self._int_workspace_buffer = torch.empty(int_bytes, dtype=torch.uint8, device=self.device)
        self._plans: memo.Memo[Plan] = memo.Memo()
        self._described: tuple[Any, Any] = _NO_PLAN  # the last of them, and its key
        self._plan: Optional[Plan] = None
        self._lengths: Optional[Lengths] = None
        # Of the schedule on the device; None while one is written, so that whatever interrupts it, the next run has its
        # own written.
        self._extent: Optional[Extent] = None
        self._is_settled = False  # a kernel was launched since the planner
        self._queries = "medium"  # the class of the last run
        self._followed: tuple[Any, BoundRun] = _NO_RUN  # the last run and its signature, unless there was a plan since
        self._seen: Optional[Extent] = None  # under use_cuda_graph: what the runs so far needed
        self._handle = next(_handles)  # names the wrapper in a compiled graph
        _wrappers[self._handle] = self

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Use other workspaces from the next plan on."""
        for buffer in (float_workspace_buffer, int_workspace_buffer):
            workspace.require_workspace(self._op_name, buffer, self.device)
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer
        self._plans.clear()
        self._described = _NO_PLAN

    def end_forward(self) -> None:
        """Kept for compatibility; there is nothing to release."""

    # ------------------------------------------------------------------------------------------------------------- plan

    plan: Callable[..., None]

    def _batch_size(self, sizes: tuple[int, ...]) -> int:
        """Of index tensors, by the numbers of entries of those that are counted, which must agree."""
        op, names = self._op_name, self._counted(self._index_names)
        extras = [_EXTRA_ENTRIES[role] or 0 for role in self._counted(self._roles)]
        sizing = -1 if self._roles[-1] == "last_page_len" else 0
        batch_size = sizes[sizing] - extras[sizing]
        for name, size, extra in zip(names, sizes, extras):
            if size != batch_size + extra:
                raise ValueError(
                    f"{op}: {name} has shape [{size}], {names[sizing]} is for {batch_size} requests; "
                    f"expected [{batch_size + extra}]"
                )
        if batch_size < 0:
            raise ValueError(f"{op}: {names[0]} is empty; expected [batch_size + 1] offsets")
        return batch_size

    def _describe(
        self, batch_size: int, workspaces: tuple[torch.Tensor, torch.Tensor], arguments: tuple[Any, ...]
    ) -> Plan:
        """The plan of these arguments, as plan() hands them on. Raises ValueError, TypeError or UnsupportedConfig."""
        raise NotImplementedError

    def _settle(
        self,
        given: tuple[torch.Tensor, ...],
        arguments: tuple[Any, ...],
        masks: Union[Masks, Items, None] = None,
        longest: Optional[int] = None,
    ) -> None:
        """Plan for the lengths in the index tensors, and only then take note of it.

        arguments: of `_describe`. masks: of a plan whose mask has bits. longest: no request has more queries.
        """
        try:
            found = Lengths(given, self._device_index)
        except (AttributeError, RuntimeError, TypeError):
            self._require_tensors(given)
            raise
        key = (arguments, found.sizes, self._int_workspace_buffer.data_ptr())  # clients replace the buffer
        last, plan = self._described  # compared, which takes half as long as to look it up
        try:
            is_described = key == last
        except (OverflowError, RuntimeError, ValueError):
            is_described = False  # of arguments that do not compare, which `_describe` refuses
        if not is_described:
            plan = self._find_plan(key, found.sizes, arguments)
            self._described = key, plan
        if not found.are_in_place or (self._may_see_indices and self._sees_indices()):
            self._require_tensors(given)
            goes_on = self._fixed is not None and masks is None
            found = lengths.take(
                self._op_name, self._index_names, given, self.device, plan.shape.page_size, self._whole_lengths, goes_on
            )
            self._followed = _NO_RUN  # which may not have what these lengths need
        num_tokens = found.num_tokens
        if longest is not None:
            num_tokens = checks.integer(self._op_name, "max_token_per_sequence", longest, 0) * plan.shape.batch_size
        extent, planner = self._choose(plan, num_tokens)
        if self._fixed is not None:
            self._fixed.require_room(self._index_names, found.held)
        if masks is not None:
            self._take_mask(found, masks, given, plan.shape.page_size)
        if self._fixed is not None:
            found = Lengths(self._fixed.fill(found.held), self._device_index).like(found)
        elif self._buffers:
            self._buffers.clear()  # what an engine assigned since the last plan
        followed = self._followed if plan is self._plan and extent is self._extent else _NO_RUN
        self._extent, self._followed = None, _NO_RUN
        planner(*found.planner_addresses)
        self._plan, self._lengths, self._is_settled = plan, found, False
        self._extent, self._followed = extent, followed

    def _take_mask(
        self, found: Lengths, masks: Union[Masks, Items], given: tuple[torch.Tensor, ...], page_size: int
    ) -> None:
        if isinstance(masks, Items):
            kv_lens = found.kv_lens(page_size)
            found.note_mask(*masks.take(self._op_name, self.device, len(kv_lens), kv_lens))
            return
        buffers = (self._buffers["mask"], self._buffers["mask_indptr"]) if self._use_cuda_graph else None
        on_host = None
        if self.device.type != "cpu" and all(tensor.is_cpu for tensor in given):
            on_host = given[0], Lengths(given, given[0].get_device()).kv_lens(page_size)
        kv_lens = found.kv_lens(page_size)
        taken = take_mask(self._op_name, self.device, *masks, found.held[0], kv_lens, buffers, on_host)
        found.take_mask(self._op_name, *taken, page_size)

    def _require_tensors(self, given: tuple[torch.Tensor, ...]) -> None:
        checks.require_addresses(self._op_name, **dict(zip(self._index_names, given)))

    def _find_plan(self, key: Any, sizes: tuple[int, ...], arguments: tuple[Any, ...]) -> Plan:
        """For a key other than that of the last call."""
        try:
            plan = self._plans.get(key)
        except TypeError:
            plan = None  # of arguments without a hash, which `_describe` refuses
        if plan is None:
            workspaces = (self._int_workspace_buffer, self._float_workspace_buffer)
            plan = self._describe(self._batch_size(sizes), workspaces, arguments)
            functions = plan.variant.functions
            keep = self._plans.remember if functions is None or not functions.holds_tensors else self._plans.hold
            keep(key, plan)
        return plan

    def _settled(self) -> tuple[Optional[Plan], Optional[Lengths], Optional[Extent]]:
        """What `_resettle` goes back to."""
        return self._plan, self._lengths, self._extent

    def _resettle(self, plan: Optional[Plan], found: Optional[Lengths], extent: Optional[Extent]) -> None:
        """Go back to an earlier plan, whose schedule has been overwritten. Not under use_cuda_graph: buffers that have
        been filled since are the caller's."""
        self._plan, self._lengths, self._extent, self._followed = plan, found, None, _NO_RUN
        if plan is not None and found is not None and extent is not None:
            plan.planner(extent)(*found.planner_addresses)
            self._extent, self._is_settled = extent, False

    def _own_indices(self, copies: tuple[torch.Tensor, ...]) -> None:
        """Have runs read copies of what was planned for, whatever becomes of the originals."""
        assert self._lengths is not None
        self._lengths = Lengths(copies, self._device_index).like(self._lengths)

    def _plan_from_buffers(self) -> None:
        """Plan again what was planned last, for whatever the index buffers hold now."""
        plan, op, names = self._plan, self._op_name, self._index_names
        assert plan is not None
        held = tuple(self._buffer(role) for role in self._roles)
        checks.require_addresses(op, **dict(zip(names, held)))
        found = Lengths(held, self._device_index)
        if not found.are_in_place or self._sees_indices():
            found = lengths.take(op, names, held, self.device, plan.shape.page_size, self._whole_lengths)
        extent, planner = self._choose(plan, found.num_tokens)
        if plan.mask == "custom":
            found.take_mask(op, self._buffer("mask"), self._buffer("mask_indptr"), plan.shape.page_size)
        elif plan.mask == "items" and self._lengths is not None:
            found.keep_mask(self._lengths)
        self._extent, self._followed = None, _NO_RUN
        planner(*found.planner_addresses)
        self._lengths, self._extent, self._is_settled = found, extent, False

    def _sees_indices(self) -> bool:
        return indices.are_visible(self._float_workspace_buffer)

    def _choose(self, plan: Plan, num_tokens: int) -> tuple[Any, BoundLaunch]:
        """What to plan for, and its planner: what the options ask for, and the tile for so many tokens. Where that is
        unknown (-1), the guess is what the last run had; a run that finds it wrong plans again."""
        queries = self._queries if num_tokens < 0 else plan.queries_of(num_tokens)
        if not self._use_cuda_graph:
            return plan.tiles.get(queries) or plan.tile(queries)
        # Any run so far may have been captured, and be replayed on this schedule: the first decides for all, since a
        # plan cannot know which of them, of more or fewer tokens, that will be.
        if self._seen is not None:
            extent, _ = plan.tile(self._queries)
            extent = extent.joined(self._seen)
            return extent, plan.planner(extent)
        if num_tokens < 0 and self.device.type == "cuda":
            for other in QUERIES:  # a capture that plans again needs its kernel loaded
                plan.tile(other)
        return plan.tile(queries)

    # -------------------------------------------------------------------------------------------------------------- run

    run: Callable[..., Result]

    def run_return_lse(self, *args: Any, **kwargs: Any) -> Result:
        """`run(..., return_lse=True)`."""
        return self.run(*args, return_lse=True, **kwargs)

    def _run(
        self,
        q: torch.Tensor,
        kv: PagedCache,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
        scales: GivenScales,
        pdl: Optional[bool],
        overrides: Optional[Overrides],
        q_pe: Optional[torch.Tensor] = None,
        sinks: Optional[torch.Tensor] = None,
    ) -> Result:
        if is_dynamo_compiling():
            return self._run_traced(q, kv, out, lse, return_lse, scales, pdl, overrides, q_pe, sinks)
        plan, found = self._plan, self._lengths
        if plan is None or found is None:
            raise ValueError(f"{self._op_name}: run() before plan(); call plan() with the batch's lengths first")
        if scales is not NO_SCALES and not are_plain(scales):
            scales = read_scales(self._op_name, dict(zip(_SCALES, scales)), self.device)  # type: ignore[assignment]
        try:
            out_ptr, lse_ptr, pe_key, sinks_key, out_key, lse_key = 0, 0, None, None, None, None
            q_ptr = q.data_ptr()
            if q_ptr < LOWEST_ADDRESS:
                q_ptr = self._low_address(self._operands[0], q)
            if out is not None:
                out_ptr = out.data_ptr()
                if out_ptr < LOWEST_ADDRESS:
                    out_ptr = self._low_address("out", out)
                out_key = (out.dtype, out.shape, out.stride(), out.get_device())
            if lse is not None:
                lse_ptr = lse.data_ptr()
                if lse_ptr < LOWEST_ADDRESS:
                    lse_ptr = self._low_address("lse", lse)
                lse_key = (lse.dtype, lse.shape, lse.stride(), lse.get_device())
            if kv.__class__ is not tuple and isinstance(kv, torch.Tensor):
                k, v_key = kv, None
                k_ptr = v_ptr = kv.data_ptr()
                if k_ptr < LOWEST_ADDRESS:
                    k_ptr = v_ptr = self._low_address("the KV cache", kv)
            else:
                k, v = kv
                k_ptr, v_ptr = k.data_ptr(), v.data_ptr()
                if k_ptr < LOWEST_ADDRESS or v_ptr < LOWEST_ADDRESS:
                    k_ptr, v_ptr = (self._low_address(*named) for named in zip(self._operands[1:], (k, v)))
                v_key = (v.dtype, v.shape, v.stride(), v.get_device())
            rows, alignment = found.row_addresses, q_ptr | out_ptr | k_ptr | v_ptr
            if q_pe is not None:
                pe_ptr = q_pe.data_ptr()
                if pe_ptr < LOWEST_ADDRESS:
                    pe_ptr = self._low_address("q_pe", q_pe)
                pe_key = (q_pe.dtype, q_pe.shape, q_pe.stride(), q_pe.get_device())
                rows, alignment = (*rows[:-1], pe_ptr), alignment | pe_ptr
            if sinks is not None:
                sinks_ptr, sinks_key = signature_of_sinks(self._op_name, sinks)
                rows = (*rows[:-1], sinks_ptr)
            key = (
                q.dtype, q.shape, q.stride(), q.device, k.dtype, k.shape, k.stride(), k.get_device(), v_key,
                pe_key, sinks_key, out_key, lse_key, scales, pdl, overrides, alignment & 15,
            )  # fmt: skip
            followed, run = self._followed
            is_followed = key == followed
        except UnsupportedConfig:
            raise
        except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError):
            raise self._not_tensors(q, kv, out, lse, overrides, q_pe, sinks) from None
        if not is_followed:
            run = self._find(plan, found, key, (q, kv, out, lse, scales, pdl, overrides, q_pe, sinks))
        if out is None:
            out = run.new_out()
            out_ptr = out.data_ptr()
        if return_lse and lse is None:
            lse = run.new_lse()
            lse_ptr = lse.data_ptr()
        if self._is_settled:
            run.settled_launch(*rows, q_ptr, out_ptr, lse_ptr, k_ptr, v_ptr + run.v_offset, *found.kv_addresses)
        else:
            run.launch(*rows, q_ptr, out_ptr, lse_ptr, k_ptr, v_ptr + run.v_offset, *found.kv_addresses)
            self._is_settled = not run.is_empty
        return (out, lse) if return_lse and lse is not None else out

    def _low_address(self, name: str, tensor: torch.Tensor) -> int:
        return checks.low_address(self._op_name, name, tensor)

    def _find(self, plan: Plan, found: Lengths, key: Any, given: tuple[Any, ...]) -> BoundRun:
        """The launch for a signature other than that of the last run since the plan. given: fields of `Call`."""
        try:
            run = plan.runs.get(key)
        except TypeError:
            q, kv, out, lse, _, _, overrides, q_pe, sinks = given
            raise self._not_tensors(q, kv, out, lse, overrides, q_pe, sinks) from None
        if run is None:
            call = Call(*given)
            num_tokens = len(call.q) if call.q.dim() else 0
            queries = self._queries if self._seen is not None else plan.queries_of(num_tokens)
            run = plan.runs.remember(key, plan.bind(call, queries))
        self._follow(plan, found, run)
        self._followed = key, run
        return run

    def _follow(self, plan: Plan, found: Lengths, run: BoundRun) -> None:
        """Options given at run time may see other keys than planned. Then plan again, also without waiting."""
        if found.num_tokens > run.num_tokens or found.num_kv_rows > run.num_kv_rows:
            raise found.out_of_reach(self._op_name, run.num_tokens, run.num_kv_rows)
        if run.is_empty:
            return
        extent, seen = self._extent, self._seen
        if extent is None or not extent.suits(run.extent, self._use_cuda_graph):
            self._extent, self._followed = None, _NO_RUN
            plan.planner(run.extent)(*found.planner_addresses)
            self._extent, self._is_settled = run.extent, False
        if self._use_cuda_graph and (seen is None or not seen.covers(run.extent)):
            self._seen = run.extent if seen is None else seen.joined(run.extent)
        self._queries = run.queries

    def _run_traced(
        self,
        q: torch.Tensor,
        kv: PagedCache,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
        scales: GivenScales,
        pdl: Optional[bool],
        overrides: Optional[Overrides],
        q_pe: Optional[torch.Tensor],
        sinks: Optional[torch.Tensor],
    ) -> Result:
        plan = self._plan
        if out is None:  # without a plan of any shape: the operator raises what an eager call does
            out = (
                torch.empty_like(q)
                if plan is None
                else q.new_empty((*q.shape[:-1], plan.shape.head_dim_vo), dtype=plan.out_dtype(q.dtype))
            )
        if return_lse and lse is None:
            lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        _run_door(self._handle, q, kv, out, lse, *scales, pdl, overrides, q_pe, sinks)
        return (out, lse) if return_lse and lse is not None else out

    def _head_dim_of(self, q: Any) -> int:
        if not isinstance(q, torch.Tensor):
            raise TypeError(f"{self._op_name}: q is {type(q).__name__}; expected a tensor")
        if q.dim() == 0:
            raise ValueError(f"{self._op_name}: q has shape []; expected three dimensions")
        return q.shape[-1]

    def _not_tensors(self, q: Any, kv: Any, out: Any, lse: Any, overrides: Any, q_pe: Any, sinks: Any) -> Exception:
        """What is wrong with arguments whose signature could not be taken."""
        op, pair = self._op_name, kv if isinstance(kv, (tuple, list)) else (kv,)
        if len(pair) > 2 or not pair or (len(pair) == 1 and pair is kv):
            return ValueError(f"{op}: the KV is a {type(kv).__name__} of {len(pair)}; expected a tensor or (k, v)")
        names = self._operands[1:] if len(pair) == 2 else ("the KV cache",)
        optional = {"q_pe": q_pe, "out": out, "lse": lse, "sinks": sinks}
        for name, value in {self._operands[0]: q, **dict(zip(names, pair)), **optional}.items():
            if not isinstance(value, torch.Tensor) and not (value is None and name in optional):
                return TypeError(f"{op}: {name} is {type(value).__name__}; expected a tensor")
        return TypeError(f"{op}: options {overrides!r:.100} are not numbers")


_handles = itertools.count()
_wrappers: weakref.WeakValueDictionary[int, PlannedAttention] = weakref.WeakValueDictionary()


def _run_by_handle(
    handle: int,
    q: torch.Tensor,
    kv: PagedCache,
    out: torch.Tensor,
    lse: Optional[torch.Tensor],
    q_scale: GivenScale,
    k_scale: GivenScale,
    v_scale: GivenScale,
    pdl: Optional[bool],
    overrides: Optional[Overrides],
    q_pe: Optional[torch.Tensor],
    sinks: Optional[torch.Tensor],
) -> None:
    _wrappers[handle]._run(q, kv, out, lse, False, (q_scale, k_scale, v_scale), pdl, overrides, q_pe, sinks)


_run_door = traced.door(
    "run_planned_attention",
    _run_by_handle,
    {
        "handle": "int",
        "q": "Tensor",
        "kv": traced.TENSORS,
        "out": "Tensor(!)",
        "lse": "Tensor(!)?",
        **dict.fromkeys(_SCALES, traced.REAL),
        "pdl": "bool?",
        "overrides": TRACED_OVERRIDES,
        "q_pe": "Tensor?",
        "sinks": "Tensor?",
    },
)


@contextlib.contextmanager
def all_or_none(wrappers: Sequence[PlannedAttention]) -> Iterator[None]:
    """Plans of several wrappers, all of which go back to the last where one fails; not under use_cuda_graph."""
    before = [(wrapper, wrapper._settled()) for wrapper in wrappers]
    try:
        yield
    except BaseException:
        with contextlib.ExitStack() as back:  # which goes on where one of them fails
            for wrapper, settled in before:
                back.callback(wrapper._resettle, *settled)
        raise
