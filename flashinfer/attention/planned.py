"""One planned wrapper: what decode and prefill have in common, whatever holds the KV.

`plan` settles what the following runs share and launches a planner on the device, without waiting for it. A run finds
the launch that was bound for its signature, and packs addresses. What fails changes nothing: a plan is checked, copied
and launched before the wrapper takes note of it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, Union

import torch

from flashinfer.attention import lengths, workspace
from flashinfer.attention.compat import EngineNames, require_no_jit_args
from flashinfer.attention.lengths import FixedBuffers, Lengths
from flashinfer.attention.mask import take_mask
from flashinfer.attention.plan import BoundRun, Call, Extent, Plan, Scales
from flashinfer.attention.variant import TRACED_OVERRIDES, Overrides
from flashinfer.host import checks, indices, memo, paged_cache, traced
from flashinfer.host.handles import Uncopyable
from flashinfer.host.paged_cache import PagedCache

DataType = Union[str, torch.dtype]
Result = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
Masks = tuple[Optional[torch.Tensor], Optional[torch.Tensor]]  # custom_mask, packed_custom_mask


_MASK_ROLES = ("mask", "mask_indptr")
_UNKNOWN = (-1, -1)
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

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        buffers: Mapping[str, Optional[torch.Tensor]],
        mask_buffers: Masks,
        backend: str,
        jit_args: object,
    ) -> None:
        op = self._op_name
        require_no_jit_args(op, jit_args)
        paged_cache.require_layout(op, kv_layout)
        workspace.require_workspace(op, float_workspace_buffer)
        super().__init__(backend)
        self.device = float_workspace_buffer.device
        self._extra_entries = tuple(_EXTRA_ENTRIES[role] for role in self._roles)
        self._sizing = -1 if self._roles[-1] == "last_page_len" else 0  # the tensor that fixes the batch size
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
        self._plan: Optional[Plan] = None
        self._lengths: Optional[Lengths] = None
        self._extent: Optional[Extent] = None  # of the schedule on the device
        self._is_settled = False  # a kernel was launched since the planner
        self._last_run: Optional[BoundRun] = None
        self._followed: Optional[BoundRun] = None  # the last run, unless there was a plan since
        self._seen: Optional[Extent] = None  # under use_cuda_graph: what the runs so far needed
        self._handle = next(_handles)  # names the wrapper in a compiled graph
        _wrappers[self._handle] = self

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Use other workspaces from the next plan on."""
        for buffer in (float_workspace_buffer, int_workspace_buffer):
            workspace.require_workspace(self._op_name, buffer)
            checks.require(
                buffer.device == self.device,
                self._op_name,
                f"a workspace is on {buffer.device}; expected {self.device}, the device of the wrapper",
            )
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer
        self._plans.clear()

    def end_forward(self) -> None:
        """Kept for compatibility; there is nothing to release."""

    # ------------------------------------------------------------------------------------------------------------- plan

    def _batch_size(self, *given: torch.Tensor) -> int:
        """Of index tensors whose shapes agree."""
        op, names = self._op_name, self._index_names
        try:
            sizes = [tensor.numel() for tensor in given]  # of one dimension: `check` sees to that
        except AttributeError:
            lengths.check(op, names, given, 1)  # says which
            raise
        extras = self._extra_entries
        batch_size = sizes[self._sizing] - (extras[self._sizing] or 0)
        for name, size, extra in zip(names, sizes, extras):
            if extra is not None and size != batch_size + extra:
                raise ValueError(
                    f"{op}: {name} has shape [{size}], {names[self._sizing]} is for {batch_size} requests; "
                    f"expected [{batch_size + extra}]"
                )
        if batch_size < 0:
            raise ValueError(f"{op}: {names[0]} is empty; expected [batch_size + 1] offsets")
        return batch_size

    def _found(self, held: Sequence[torch.Tensor], known: tuple[int, int]) -> Lengths:
        """What `_roles` lists, as kernels read it."""
        return Lengths(known, *held) if self._roles[0] == "qo_indptr" else Lengths(known, None, *held)

    def _settle(
        self, plan: Plan, given: tuple[torch.Tensor, ...], num_tokens: int = -1, masks: Optional[Masks] = None
    ) -> None:
        """Plan for the lengths in the index tensors, and only then take note of it.

        num_tokens: of all requests, -1 where the host does not know. masks: of a plan with a custom mask.
        """
        op, names, device, page_size = self._op_name, self._index_names, self.device, plan.shape.page_size
        if not (self._may_see_indices and self._sees_indices()) and lengths.are_in_place(given, device):
            known, held = _UNKNOWN, given
        else:
            known = lengths.check(op, names, given, page_size)
            held = lengths.take(op, names, given, device)
        extent = self._choose(plan, known[0] if num_tokens < 0 else num_tokens)
        if self._fixed is not None:
            self._fixed.require_room(names, held)
        found = self._found(held, known)
        if masks is not None:
            buffers = (self._buffers["mask"], self._buffers["mask_indptr"]) if self._use_cuda_graph else None
            on_host = None
            if device.type != "cpu" and all(tensor.is_cpu for tensor in given):
                on_host = given[0], self._found(given, known).kv_lens(page_size)
            taken = take_mask(op, device, *masks, held[0], found.kv_lens(page_size), buffers, on_host)
            found.take_mask(op, *taken, page_size)
        if self._fixed is not None:
            found = self._found(self._fixed.fill(held), known).like(found)
        elif self._buffers:
            self._buffers.clear()  # what an engine assigned since the last plan
        plan.launch_planner(extent, found)
        self._plan, self._lengths = plan, found
        self._note_planner(extent)

    def _settled(self) -> tuple[Optional[Plan], Optional[Lengths], Optional[Extent]]:
        """What `_resettle` goes back to."""
        return self._plan, self._lengths, self._extent

    def _resettle(self, plan: Optional[Plan], found: Optional[Lengths], extent: Optional[Extent]) -> None:
        """Go back to an earlier plan, whose schedule has been overwritten. Not under use_cuda_graph: buffers that have
        been filled since are the caller's."""
        self._plan, self._lengths = plan, found
        self._note_planner(extent)
        if plan is not None and found is not None:
            plan.launch_planner(extent, found)

    def _plan_from_buffers(self) -> None:
        """Plan again what was planned last, for whatever the index buffers hold now."""
        plan, op, names = self._plan, self._op_name, self._index_names
        assert plan is not None
        held, known = tuple(self._buffer(role) for role in self._roles), _UNKNOWN
        if self._sees_indices() or not lengths.are_in_place(held, self.device):
            known = lengths.check(op, names, held, plan.shape.page_size)
            held = lengths.take(op, names, held, self.device)
        extent = self._choose(plan, known[0])
        found = self._found(held, known)
        if plan.mask == "custom":
            found.take_mask(op, self._buffer("mask"), self._buffer("mask_indptr"), plan.shape.page_size)
        plan.launch_planner(extent, found)
        self._lengths = found
        self._note_planner(extent)

    def _sees_indices(self) -> bool:
        return indices.are_visible(self._float_workspace_buffer)

    def _note_planner(self, extent: Optional[Extent]) -> None:
        self._extent, self._is_settled, self._followed = extent, False, None

    def _choose(self, plan: Plan, num_tokens: int) -> Extent:
        """What to plan for: what the options ask for, and under use_cuda_graph what any run so far did, as a captured
        one may be replayed on this schedule."""
        extent = plan.extent(self._expect_short_queries(plan, num_tokens))
        return extent if self._seen is None else extent.joined(self._seen)

    def _expect_short_queries(self, plan: Plan, num_tokens: int) -> bool:
        return False

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
        scales: Scales,
        pdl: Optional[bool],
        overrides: Optional[Overrides],
    ) -> Result:
        if torch.compiler.is_dynamo_compiling():
            return self._run_traced(q, kv, out, lse, return_lse, scales, pdl, overrides)
        plan, found = self._plan, self._lengths
        if plan is None or found is None:
            raise ValueError(f"{self._op_name}: run() before plan(); call plan() with the batch's lengths first")
        try:
            q_ptr, out_ptr, out_key, lse_key = q.data_ptr(), 0, None, None
            if out is not None:
                out_ptr, out_key = out.data_ptr(), memo.signature(out)
            if lse is not None:
                lse_key = memo.signature(lse)
            if kv.__class__ is not tuple and isinstance(kv, torch.Tensor):
                k, v_key = kv, None
                k_ptr = v_ptr = kv.data_ptr()
            else:
                k, v = kv
                k_ptr, v_ptr = k.data_ptr(), v.data_ptr()
                v_key = memo.signature(v)
            key = (
                q.__class__, q.dtype, q.shape, q.stride(), q.device, k.__class__, k.dtype, k.shape, k.stride(),
                k.device, v_key, out_key, lse_key, scales, pdl, overrides, (q_ptr | out_ptr | k_ptr | v_ptr) & 15,
            )  # fmt: skip
            run = plan.runs.get(key)
        except (AttributeError, TypeError, ValueError):
            raise self._not_tensors(q, kv, out, lse, scales, overrides) from None
        if run is None:
            run = plan.runs.remember(key, self._bind(plan, Call(q, kv, out, lse, scales, pdl, overrides)))
        if run is not self._followed:
            self._follow(plan, found, run)
        if out is None:
            out = run.new_out()
        if return_lse and lse is None:
            lse = run.new_lse()
        if not run.is_empty:
            launch = run.settled_launch if self._is_settled else run.launch
            launch(
                *found.row_addresses, q_ptr, out.data_ptr(), 0 if lse is None else lse.data_ptr(), k_ptr,
                v_ptr + run.v_offset, *found.kv_addresses,
            )  # fmt: skip
            self._is_settled = True
        return (out, lse) if return_lse and lse is not None else out

    def _follow(self, plan: Plan, found: Lengths, run: BoundRun) -> None:
        """The first run since the planner, or another than the last: options given at run time may see other keys than
        planned. Then plan again, also without waiting."""
        if found.num_tokens > run.num_tokens or found.num_kv_rows > run.num_kv_rows:
            raise found.out_of_reach(self._op_name, run.num_tokens, run.num_kv_rows)
        if run.is_empty:
            return
        extent, seen = self._extent, self._seen
        assert extent is not None
        if not extent.suits(run.extent, self._use_cuda_graph):
            plan.launch_planner(run.extent, found)
            self._extent, self._is_settled = run.extent, False
        if self._use_cuda_graph and (seen is None or not seen.covers(run.extent)):
            self._seen = run.extent if seen is None else seen.joined(run.extent)
        self._last_run = self._followed = run

    def _bind(self, plan: Plan, call: Call) -> BoundRun:
        return plan.bind(call, short_queries=False)

    def _run_traced(
        self,
        q: torch.Tensor,
        kv: PagedCache,
        out: Optional[torch.Tensor],
        lse: Optional[torch.Tensor],
        return_lse: bool,
        scales: Scales,
        pdl: Optional[bool],
        overrides: Optional[Overrides],
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
        _run_door(self._handle, q, kv, out, lse, *scales, pdl, overrides)
        return (out, lse) if return_lse and lse is not None else out

    def _head_dim_of(self, q: Any) -> int:
        if not isinstance(q, torch.Tensor):
            raise TypeError(f"{self._op_name}: q is {type(q).__name__}; expected a tensor")
        if q.dim() == 0:
            raise ValueError(f"{self._op_name}: q has shape []; expected three dimensions")
        return q.shape[-1]

    def _not_tensors(self, q: Any, kv: Any, out: Any, lse: Any, scales: Scales, overrides: Any) -> Exception:
        """What is wrong with arguments whose signature could not be taken."""
        op, pair = self._op_name, kv if isinstance(kv, (tuple, list)) else (kv,)
        if len(pair) > 2 or not pair or (len(pair) == 1 and pair is kv):
            return ValueError(f"{op}: the KV is a {type(kv).__name__} of {len(pair)}; expected a tensor or (k, v)")
        names = ("k", "v") if len(pair) == 2 else ("the KV cache",)
        for name, value in {"q": q, **dict(zip(names, pair)), "out": out, "lse": lse}.items():
            if not isinstance(value, torch.Tensor) and not (value is None and name in ("out", "lse")):
                return TypeError(f"{op}: {name} is {type(value).__name__}; expected a tensor")
        return TypeError(f"{op}: scales {scales!r:.60} or options {overrides!r:.100} are not numbers")


_handles = itertools.count()
_wrappers: weakref.WeakValueDictionary[int, PlannedAttention] = weakref.WeakValueDictionary()


def _run_by_handle(
    handle: int,
    q: torch.Tensor,
    kv: PagedCache,
    out: torch.Tensor,
    lse: Optional[torch.Tensor],
    q_scale: Optional[float],
    k_scale: Optional[float],
    v_scale: Optional[float],
    pdl: Optional[bool],
    overrides: Optional[Overrides],
) -> None:
    _wrappers[handle]._run(q, kv, out, lse, False, (q_scale, k_scale, v_scale), pdl, overrides)


_run_door = traced.door(
    "run_planned_attention",
    _run_by_handle,
    {
        "handle": "int",
        "q": "Tensor",
        "kv": traced.TENSORS,
        "out": "Tensor(!)",
        "lse": "Tensor(!)?",
        "q_scale": "float?",
        "k_scale": "float?",
        "v_scale": "float?",
        "pdl": "bool?",
        "overrides": TRACED_OVERRIDES,
    },
)
