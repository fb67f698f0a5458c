# SPDX-License-Identifier: Apache-2.0
"""Merging of attention states: results of attention over disjoint parts of a KV become the result over all of it.

A state is an output and the base-2 logarithm of its sum of exponentials; merging is the online softmax of Milakov &
Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.families.attention import merge as families
from flashinfer.host import checks, indices, memo, traced
from flashinfer.host.checks import LOWEST_ADDRESS
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states over disjoint parts of a KV.

    Args:
        v_a, v_b: outputs, `[seq_len, num_heads, head_dim]`, fp16, bf16 or fp32.
        s_a, s_b: base-2 logarithms of the sums of exponentials, fp32 `[seq_len, num_heads]`. A state with -inf has seen
            no key and weighs nothing, whatever its output holds.

    Returns:
        v, s: shaped like the operands.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        TypeError: an argument is no tensor.
        UnsupportedConfig: no kernel for this dtype, device or head_dim.
    """
    if is_dynamo_compiling():
        out = _new_state(v_a.shape[:-1], v_a)
        _pair_door("merge_state", v_a, s_a, v_b, s_b, None, out)
        return out
    return _merge_pair("merge_state", v_a, s_a, v_b, s_b)


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: Optional[torch.Tensor] = None,
) -> None:
    """`merge_state` of (v, s) with (v_other, s_other), written over v and s.

    Args:
        v, v_other: `[seq_len, num_heads, head_dim]`; v is contiguous and starts at a multiple of 16 bytes. v_other may
            be v itself, but not overlap it otherwise.
        s, s_other: fp32 `[seq_len, num_heads]`; s is contiguous.
        mask: bool `[seq_len]`; rows with False keep their v and s. None merges all.

    Raises: as `merge_state`.
    """
    if is_dynamo_compiling():
        _in_place_door(v, s, v_other, s_other, mask)
    else:
        _merge_in_place(v, s, v_other, s_other, mask)


def _merge_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: Optional[torch.Tensor]
) -> None:
    op = "merge_state_in_place"
    if mask is not None:
        mask = _row_mask(op, v, mask)
    _merge_pair(op, v, s, v_other, s_other, mask, (v, s))


def _row_mask(op: str, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or not isinstance(v, torch.Tensor) or mask.data_ptr() < LOWEST_ADDRESS:
        checks.require_addresses(op, v=v, mask=mask)
    if mask.shape != v.shape[:1] or mask.device != v.device:
        raise ValueError(
            f"{op}: mask is {list(mask.shape)} on {mask.device}; expected {list(v.shape[:1])}, the rows of v, on "
            f"{v.device}"
        )
    return (mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0).contiguous()


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge `num_states` attention states of every row.

    Args:
        v: outputs, `[seq_len, num_states, num_heads, head_dim]`; read in place whatever the strides of the first two
            axes, in multiples of 16 bytes.
        s: fp32 `[seq_len, num_states, num_heads]`, base 2.

    Returns:
        `[seq_len, num_heads, head_dim]` and `[seq_len, num_heads]`.

    Raises: as `merge_state`.
    """
    if is_dynamo_compiling():
        out = _new_state((v.shape[0], *v.shape[2:-1]), v)
        _list_door("merge_states", v, s, None, out)
        return out
    return merge_list("merge_states", v, s, None)


def variable_length_merge_states(
    v: torch.Tensor, s: torch.Tensor, indptr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge a varying number of attention states of every row.

    Args:
        v: outputs, `[num_states, num_heads, head_dim]`, the states of each row side by side.
        s: fp32 `[num_states, num_heads]`, base 2.
        indptr: int32 `[seq_len + 1]`; row i merges states `[indptr[i], indptr[i + 1])`, none giving zeros and -inf.
            Never falls, and ends at num_states or before.

    Returns:
        `[seq_len, num_heads, head_dim]` and `[seq_len, num_heads]`.

    Raises: as `merge_state`, and, on the CPU and where FLASHINFER_CHECK_INDICES=1, ValueError for an indptr that begins
    below zero or descends, and IndexError for one that ends past the states.
    """
    if is_dynamo_compiling():
        out = _new_state((indptr.shape[0] - 1, *v.shape[1:-1]), v)
        _list_door("variable_length_merge_states", v, s, indptr, out)
        return out
    if indptr is None:  # which merge_states goes by
        checks.require_addresses("variable_length_merge_states", indptr=indptr)
    return merge_list("variable_length_merge_states", v, s, indptr)


_State = tuple[torch.Tensor, torch.Tensor]  # v, s


def _new_state(shape: Sequence[int], v: torch.Tensor) -> _State:
    """A traced call's result."""
    return v.new_empty((*shape, v.shape[-1])), v.new_empty(shape, dtype=torch.float32)


class _Merge(NamedTuple):
    launch: PreparedLaunch
    new_v: memo.Allocate
    new_s: memo.Allocate
    may_look: bool = False  # at the values of indptr


_pairs: memo.Memo[_Merge] = memo.Memo()
_lists: memo.Memo[_Merge] = memo.Memo()


def _merge_pair(
    op: str,
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: Optional[torch.Tensor] = None,
    out: Optional[_State] = None,
) -> _State:
    try:
        v_ptr, s_ptr, v_other_ptr, s_other_ptr = v.data_ptr(), s.data_ptr(), v_other.data_ptr(), s_other.data_ptr()
    except (AttributeError, RuntimeError):
        checks.require_addresses(op, v=v, s=s, **{"the other v": v_other, "the other s": s_other})
        raise
    lowest, without_memory = LOWEST_ADDRESS, None
    if v_ptr < lowest or s_ptr < lowest or v_other_ptr < lowest or s_other_ptr < lowest:
        checks.require_addresses(op, v=v, s=s, **{"the other v": v_other, "the other s": s_other})
        without_memory = s.device, v_other.device, s_other.device  # on meta has the number of the CPU
    key = (
        v.dtype, v.shape, v.stride(), v.device, v_other.dtype, v_other.shape, v_other.stride(),
        v_other.get_device(), s.dtype, s.shape, s.stride(), s.get_device(), s_other.dtype, s_other.shape,
        s_other.stride(), s_other.get_device(), (v_ptr | v_other_ptr) & 15, without_memory,
    )  # fmt: skip
    merge = _pairs.find(key)
    if merge is None:
        if out is not None:
            _require_writable(op, *out)
        checks.require(v.dim() == 3, op, f"v has shape {list(v.shape)}; expected [seq_len, num_heads, head_dim]")
        checks.require_like(op, "the other v", v_other, v, "v")
        _require_states(op, v, s, "s")
        _require_states(op, v, s_other, "the other s")
        given = (v, s, v_other, s_other)
        readable = (_aligned(v), _fp32(op, s), _aligned(v_other), _fp32(op, s_other))
        if any(new is not old for new, old in zip(readable, given)):
            return _merge_pair(op, *readable, mask, out)
        merge = _pairs.remember(key, _prepare(op, v, v.shape[0]))
    if out is None:
        out = merge.new_v(), merge.new_s()
    v_out_ptr, s_out_ptr = (v_ptr, s_ptr) if out[0] is v else (out[0].data_ptr(), out[1].data_ptr())
    mask_ptr = 0 if mask is None else mask.data_ptr()
    merge.launch(v_ptr, s_ptr, v_other_ptr, s_other_ptr, mask_ptr, 0, v_out_ptr, s_out_ptr)
    return out


def merge_list(
    op: str, v: torch.Tensor, s: torch.Tensor, indptr: Optional[torch.Tensor], out: Optional[_State] = None
) -> _State:
    """indptr None: every row of v has its states on dim 1; else they lie side by side on dim 0."""
    try:
        v_ptr, s_ptr, indptr_ptr = v.data_ptr(), s.data_ptr(), 0 if indptr is None else indptr.data_ptr()
    except (AttributeError, RuntimeError):
        checks.require_addresses(op, v=v, s=s, **({} if op == "merge_states" else {"indptr": indptr}))
        raise
    if v_ptr < LOWEST_ADDRESS or s_ptr < LOWEST_ADDRESS or (indptr is not None and indptr_ptr < LOWEST_ADDRESS):
        checks.require_addresses(op, v=v, s=s, **({} if indptr is None else {"indptr": indptr}))
    key = (
        v.dtype, v.shape, v.stride(), v.device, s.dtype, s.shape, s.stride(), s.device,
        None if indptr is None else memo.signature(indptr), v_ptr & 15,
    )  # fmt: skip
    merge = _lists.find(key)
    if merge is None:
        order = "[seq_len, num_states, num_heads, head_dim]" if indptr is None else "[num_states, num_heads, head_dim]"
        checks.require(v.dim() == (4 if indptr is None else 3), op, f"v has shape {list(v.shape)}; expected {order}")
        _require_states(op, v, s, "s")
        readable = (_rows(v), _fp32_rows(op, s), None if indptr is None else _offsets(op, v, indptr))
        if any(new is not old for new, old in zip(readable, (v, s, indptr))):
            return merge_list(op, *readable, out)
        num_rows, num_states = v.shape[:2] if indptr is None else (indptr.shape[0] - 1, v.shape[0])
        state_dim = 0 if indptr is not None else 1
        strides = (v.stride(0), v.stride(state_dim), s.stride(0), s.stride(state_dim))
        prepared = _prepare(op, v, num_rows, num_states, strides)
        merge = _lists.remember(key, prepared._replace(may_look=indptr is not None and indices.are_visible(indptr)))
    if merge.may_look and indptr is not None:
        _look_at(op, v, indptr)
    v_out, s_out = (merge.new_v(), merge.new_s()) if out is None else out
    merge.launch(v_ptr, s_ptr, 0, 0, 0, indptr_ptr, v_out.data_ptr(), s_out.data_ptr())
    return v_out, s_out


def _look_at(op: str, v: torch.Tensor, indptr: torch.Tensor) -> None:
    if indices.are_visible(indptr):
        indices.require_offsets(op, "indptr", indptr, v.shape[0], "the states in v")


def _prepare(
    op: str, v: torch.Tensor, num_rows: int, num_states: Optional[int] = None, strides: Sequence[int] = (0, 0, 0, 0)
) -> _Merge:
    """A launch that takes the addresses of MergeParams; of pairs, unless a number of states is given: of every row, or
    with offsets of all."""
    num_heads, head_dim = v.shape[-2:]
    checks.require_supported(op, "v", v, families.DTYPES)
    launch: PreparedLaunch = memo.no_launch
    if num_rows * num_heads > 0 and not v.is_meta:
        spec = families.MERGE_STATES.spec(
            target.of_device(v.device), dtype=dtypes.short_name(v.dtype), head_dim=head_dim, pair=num_states is None
        )
        launcher = default_resolver().load(spec).on(v.get_device())
        num_blocks = -(-num_rows * num_heads // families.rows_per_block(launcher.config)) if v.is_cuda else 1
        counts = {
            "num_rows": num_rows,
            "num_heads": checks.integer(op, "num_heads", num_heads),
            "num_states": checks.integer(op, "num_states", num_states or 0),
            **dict(zip(families.STRIDES, strides)),
        }
        launch = launcher.prepare((num_blocks, 1, 1), counts, varying=families.ADDRESSES)
    return _Merge(
        launch,
        memo.allocator((num_rows, num_heads, head_dim), v.dtype, v.device),
        memo.allocator((num_rows, num_heads), torch.float32, v.device),
    )


def _require_states(op: str, v: torch.Tensor, s: torch.Tensor, name: str) -> None:
    if s.shape != v.shape[:-1] or s.device != v.device:
        raise ValueError(
            f"{op}: {name} has shape {list(s.shape)} on {s.device}; expected {list(v.shape[:-1])} on {v.device}"
        )


def _require_writable(op: str, v: torch.Tensor, s: torch.Tensor) -> None:
    for name, tensor in (("v", v), ("s", s)):
        checks.require(tensor.is_contiguous(), op, f"{name} is not contiguous; call .contiguous()")
    checks.require(s.dtype == torch.float32, op, f"s is {s.dtype}; expected float32")
    checks.require(
        v.data_ptr() % 16 == 0, op, f"v starts {v.data_ptr() % 16} bytes after a multiple of 16; call .clone()"
    )


def _aligned(v: torch.Tensor) -> torch.Tensor:
    """Contiguous, from a multiple of 16 bytes on, as kernels load vectors: itself if it is that, else a copy."""
    v = v.contiguous()
    return v if v.data_ptr() % 16 == 0 else v.clone()


def _rows(v: torch.Tensor) -> torch.Tensor:
    """Of lists, which may have any strides over rows and states: itself where every vector is aligned, else a copy."""
    num_heads, head_dim = v.shape[-2:]
    is_dense = (v.stride(-1) == 1 or head_dim == 1) and (v.stride(-2) == head_dim or num_heads == 1)
    vector = 16 // v.element_size()
    if not is_dense or v.data_ptr() % 16 or any(stride % vector for stride in v.stride()[:-2]):
        return _aligned(v)
    return v


def _fp32_rows(op: str, s: torch.Tensor) -> torch.Tensor:
    return s if s.dtype == torch.float32 and (s.stride(-1) == 1 or s.shape[-1] == 1) else _fp32(op, s)


def _fp32(op: str, s: torch.Tensor) -> torch.Tensor:
    checks.require(s.is_floating_point(), op, f"s is {s.dtype}; expected float32")
    return s.float().contiguous()


def _offsets(op: str, v: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    checks.require(
        indptr.dim() == 1 and indptr.numel() >= 1 and indptr.device == v.device, op,
        f"indptr is {list(indptr.shape)} on {indptr.device}; expected [seq_len + 1] on {v.device}",
    )  # fmt: skip
    checks.require(indptr.dtype in (torch.int32, torch.int64), op, f"indptr is {indptr.dtype}; expected torch.int32")
    if not indptr.is_meta:
        _look_at(op, v, indptr)  # before int32 cuts a value short
    return indptr.int().contiguous()


_OUT = traced.Bundle(("Tensor(!) v_out", "Tensor(!) s_out"), lambda state: state, lambda *state: state)
_PAIR = {"v": "Tensor", "s": "Tensor", "v_other": "Tensor", "s_other": "Tensor", "mask": "Tensor?"}
_pair_door = traced.door("merge_state", _merge_pair, {"op": "str", **_PAIR, "out": _OUT})
_in_place_door = traced.door("merge_state_in_place", _merge_in_place, _PAIR | {"v": "Tensor(!)", "s": "Tensor(!)"})
_list_door = traced.door(
    "merge_states", merge_list, {"op": "str", "v": "Tensor", "s": "Tensor", "indptr": "Tensor?", "out": _OUT}
)
