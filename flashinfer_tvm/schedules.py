# SPDX-License-Identifier: Apache-2.0
"""What a plan is to TVM, and what it is here.

TVM plans a step with index arrays of the host, gets an array of integers, and passes it to the runs of every layer with
index arrays of the device. Here planners read those of the device. So a plan function takes note of the batch and
checks it, and the first run after it launches the planner ahead of its kernel, on the stream of that run. The schedule
lies in the int workspace, whose address therefore names a plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch

from flashinfer.attention.plan import Shape
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks, indices
from flashinfer_tvm.tensors import address, borrowed, environment_stream, tensor

_MOST_WORKSPACES = 256  # that are planned for at a time; a cache of TVM has seven
_MOST_WRAPPERS = 16  # of a workspace: one for each operator and float workspace
_LAYOUTS = ("NHD", "HND")
_numbers = itertools.count(1)


class Batch(NamedTuple):
    """What a plan function was told."""

    number: int
    plan: str
    shape: Shape
    options: dict[str, Any]  # arguments of plan() of a wrapper besides
    num_tokens: int  # that the queries have at least
    num_entries: int  # of page numbers, or rows of keys
    lengths: tuple[torch.Tensor, ...] = ()  # copies of the index arrays of the host, where runs bring none


class Described(NamedTuple):
    """What a run is planned with: a class of wrappers, its layout if it has one, what its plan() takes."""

    wrapper_class: Callable[..., Any]
    layout: Optional[str]
    places: tuple[torch.Tensor, ...]  # the index tensors
    arguments: dict[str, Any]


# Of the name of the function, the batch, operands and out, index arrays, and what else the caller chose.
Describe = Callable[[str, Batch, list[torch.Tensor], dict[str, Any], tuple[Any, ...]], Described]


class Workspace:
    """An int workspace: the batch that it was planned for last, and what was launched for that."""

    def __init__(self, batch: Batch, wrappers: dict[Any, Any]) -> None:
        self.batch = batch
        self.wrappers = wrappers
        self.asked: Any = None  # what the schedule that lies there was made for
        self.wrapper: Any = None  # by which

    def settle(self, described: Described, floats: torch.Tensor, ints: torch.Tensor, asked: Any) -> None:
        """Launch the planner. floats, ints: the workspaces."""
        wrapper_class, layout, places, arguments = described
        kind = (wrapper_class, layout, floats.device, floats.data_ptr(), floats.nbytes, ints.nbytes)
        self.asked, self.wrapper = None, self.wrappers.get(kind)
        if self.wrapper is None:
            memory = borrowed(floats)
            self.wrapper = wrapper_class(memory) if layout is None else wrapper_class(memory, layout)
            if memory.is_cuda:
                self.wrapper.reset_workspace_buffer(memory, borrowed(ints))
            if len(self.wrappers) >= _MOST_WRAPPERS:
                self.wrappers.clear()
            self.wrappers[kind] = self.wrapper
        self.wrapper.plan(*places, **arguments)
        self.asked = asked


_workspaces: dict[int, Workspace] = {}  # by address, that which was planned for last at the end


def note(int_workspace: torch.Tensor, plan: str, shape: Shape, options: dict[str, Any], *others: Any) -> list[int]:
    """Take note of a batch. others: fields of `Batch` from num_tokens on. Returns what its runs have to bring."""
    place, batch = int_workspace.data_ptr(), Batch(next(_numbers), plan, shape, options, *others)
    before = _workspaces.pop(place, None)
    _workspaces[place] = Workspace(batch, {} if before is None else before.wrappers)
    if len(_workspaces) > _MOST_WORKSPACES:
        _workspaces.pop(next(iter(_workspaces)), None)
    return [batch.number]


def _planned(op: str, plan: str, int_workspace: Any, plan_info: Any) -> Workspace:
    workspace = _workspaces.get(address(op, "int_workspace", int_workspace))
    try:
        number = plan_info[0] if len(plan_info) == 1 else None
    except TypeError:
        raise TypeError(f"{op}: plan_info is {type(plan_info).__name__}; expected what {plan} returned") from None
    if workspace is None or number != workspace.batch.number or workspace.batch.plan != plan:
        raise ValueError(
            f"{op}: plan_info has {len(plan_info)} entries, first {list(plan_info)[:1]}; expected what the last {plan} "
            f"for this int workspace returned. Next step: call {plan} again"
        )
    return workspace


def run(
    op: str,
    plan: str,
    describe: Describe,
    workspaces: tuple[Any, Any],
    plan_info: Any,
    operands: dict[str, Any],
    out: Any,
    lse: Any,
    index: dict[str, Any],
    options: tuple[Any, ...],
    enable_pdl: Any = None,
    *,
    kv_is_pair: bool = True,
) -> Optional[torch.Tensor]:
    """A run of the batch that the function named `plan` took note of, on the stream of the FFI: plan, unless that was
    done for just this, and run. Calls after the first of a plan look at addresses alone, but for the operands.

    Args:
        workspaces: of floats and of integers.
        operands: arguments of the wrapper's run(), queries first.
        index: index arrays; options: numbers that a plan depends on.
        kv_is_pair: it takes those behind as one pair.

    Returns:
        lse, in torch.

    Raises:
        TypeError, ValueError: an argument is something else than was planned.
    """
    workspace = _planned(op, plan, workspaces[1], plan_info)
    taken = [tensor(op, name, given) for name, given in (*operands.items(), ("out", out))]
    taken_lse = None if lse is None else tensor(op, "lse", lse)
    pdl = None if enable_pdl is None else checks.boolean(op, "enable_pdl", enable_pdl)
    addresses = [address(op, name, given) for name, given in (("float_workspace", workspaces[0]), *index.items())]
    asked = (addresses, options, [(given.dtype, given.shape) for given in taken])
    with environment_stream(taken[0].device):
        if asked != workspace.asked:
            described = describe(op, workspace.batch, taken, index, options)
            workspace.settle(described, *take_workspaces(op, *workspaces), asked)
        q, *kv, result = taken
        given = (q, tuple(kv)) if kv_is_pair else (q, *kv)
        workspace.wrapper.run(*given, out=result, lse=taken_lse, return_lse=lse is not None, enable_pdl=pdl)
    return taken_lse


# ------------------------------------------------------------------------------------------------------ what is checked


def take_workspaces(op: str, floats: Any, ints: Any) -> tuple[torch.Tensor, torch.Tensor]:
    float_workspace, int_workspace = tensor(op, "float_workspace", floats), tensor(op, "int_workspace", ints)
    checks.require_device(op, "int_workspace", int_workspace, float_workspace, "float_workspace")
    for name, workspace in (("float_workspace", float_workspace), ("int_workspace", int_workspace)):
        checks.require(workspace.is_contiguous(), op, f"{name} is not contiguous; expected dense memory")
    checks.require(int_workspace.numel() > 0, op, "int_workspace is empty; expected 8 MB, whose address names a plan")
    return float_workspace, int_workspace


def take_index(op: str, name: str, given: Any, length: int, device: Optional[torch.device] = None) -> torch.Tensor:
    """int32 of at least so many entries, cut to that, on a device; None: on the host."""
    values, where = tensor(op, name, given), torch.device("cpu") if device is None else device
    checks.require(
        values.dtype == torch.int32 and values.dim() == 1 and values.device == where and values.is_contiguous(), op,
        f"{name} is {values.dtype} {list(values.shape)} on {values.device}; expected contiguous int32 of one dimension "
        f"on {where}",
    )  # fmt: skip
    checks.require(
        len(values) >= length, op, f"{name} has {len(values)} entries; expected {length} for this batch, at least"
    )
    return values[:length]


def take_offsets(op: str, name: str, given: Any, batch_size: int) -> torch.Tensor:
    """Of the host."""
    values = take_index(op, name, given, batch_size + 1)
    indices.require_offsets(op, name, values)
    return values


def require_lengths(op: str, name: str, lengths: torch.Tensor, offsets: torch.Tensor, page_size: int) -> None:
    """Each request has as many keys as its pages hold, at most, and none below 0."""
    room = (offsets[1:].long() - offsets[:-1]) * page_size
    wrong = torch.nonzero((lengths < 0) | (lengths > room)).flatten()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"{op}: {name}[{i}] is {int(lengths[i])}; expected 0 to {int(room[i])}, what its pages hold")


def require_reach(op: str, batch: Batch, name: str, values: torch.Tensor, planned_length: int, axis: int = 0) -> None:
    """Of queries or keys: as many rows as the offsets of the plan say, at least."""
    checks.require(values.dim() == 3, op, f"{name} has shape {list(values.shape)}; expected three dimensions")
    checks.require(
        values.shape[axis] >= planned_length, op,
        f"{name} has {values.shape[axis]} rows; {batch.plan} was given offsets that end at {planned_length}",
    )  # fmt: skip


def layout_of(op: str, code: Any) -> str:
    return _LAYOUTS[checks.integer(op, "kv_layout_code", code, 0, 1)]


def is_causal(op: str, mask_mode_code: Any) -> bool:
    code = checks.integer(op, "mask_mode_code", mask_mode_code, 0)
    if code > 1:
        raise UnsupportedConfig(
            f"{op}: mask_mode_code is {code}; expected 0 (no mask) or 1 (causal). Next step: for a mask of bits, use "
            "BatchPrefillWithPagedKVCacheWrapper of flashinfer"
        )
    return code == 1


def require_no_graph(op: str, enable_cuda_graph: Any) -> None:
    if checks.boolean(op, "enable_cuda_graph", enable_cuda_graph):
        raise UnsupportedConfig(
            f"{op}: enable_cuda_graph is True; expected False, which TVM passes. Next step: capture the wrappers of "
            "flashinfer, whose plan() may be in the graph"
        )
