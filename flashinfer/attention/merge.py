"""Merging of attention states: results of attention over disjoint parts of a KV become the result over all of it.

A state is an output and the base-2 logarithm of its sum of exponentials; merging is the online softmax of Milakov &
Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch

from flashinfer import _op, dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.jit import resolver
from flashinfer.kernels import cascade as families


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
        UnsupportedConfig: no kernel for this dtype or head_dim.
    """
    v_a, v_b = v_a.contiguous(), v_b.contiguous()
    v_out, s_out = torch.empty_like(v_a), torch.empty(s_a.shape, dtype=torch.float32, device=s_a.device)
    merge = _compiled_pair if torch.compiler.is_dynamo_compiling() else _merge_pair
    merge("merge_state", v_a, _fp32(s_a), v_b, _fp32(s_b), None, v_out, s_out)
    return v_out, s_out


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: Optional[torch.Tensor] = None,
) -> None:
    """`merge_state` of (v, s) with (v_other, s_other), written over v and s.

    Args:
        v, v_other: `[seq_len, num_heads, head_dim]`; v is contiguous.
        s, s_other: fp32 `[seq_len, num_heads]`; s is contiguous.
        mask: bool `[seq_len]`; rows with False keep their v and s. None merges all.

    Raises: as `merge_state`.
    """
    if mask is not None:
        mask = _row_mask(v, mask)
    merge = _compiled_in_place if torch.compiler.is_dynamo_compiling() else _merge_in_place
    merge(v, s, v_other.contiguous(), _fp32(s_other), mask)


def _merge_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: Optional[torch.Tensor]
) -> None:
    _merge_pair("merge_state_in_place", v, s, v_other, s_other, mask, v, s)


def _row_mask(v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.shape != v.shape[:1] or mask.device != v.device:
        raise ValueError(
            f"merge_state_in_place: mask is {list(mask.shape)} on {mask.device}; expected [{v.shape[0]}] on {v.device}"
        )
    return (mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0).contiguous()


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge `num_states` attention states of every row.

    Args:
        v: outputs, `[seq_len, num_states, num_heads, head_dim]`.
        s: fp32 `[seq_len, num_states, num_heads]`, base 2.

    Returns:
        `[seq_len, num_heads, head_dim]` and `[seq_len, num_heads]`.

    Raises: as `merge_state`.
    """
    op = "merge_states"
    _op.require(v.dim() == 4, op, f"v has shape {list(v.shape)}; expected [seq_len, num_states, num_heads, head_dim]")
    _require_states(op, v, s, "s")
    return _merge_list(op, v.contiguous(), _fp32(s), None, v.shape[0], v.shape[1])


def variable_length_merge_states(
    v: torch.Tensor, s: torch.Tensor, indptr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge a varying number of attention states of every row.

    Args:
        v: outputs, `[num_states, num_heads, head_dim]`, the states of each row side by side.
        s: fp32 `[num_states, num_heads]`, base 2.
        indptr: int32 `[seq_len + 1]`; row i merges states `[indptr[i], indptr[i + 1])`, none giving zeros and -inf.

    Returns:
        `[seq_len, num_heads, head_dim]` and `[seq_len, num_heads]`.

    Raises: as `merge_state`.
    """
    op = "variable_length_merge_states"
    _op.require(v.dim() == 3, op, f"v has shape {list(v.shape)}; expected [num_states, num_heads, head_dim]")
    _require_states(op, v, s, "s")
    _op.require(
        indptr.dim() == 1 and indptr.numel() >= 1 and indptr.device == v.device, op,
        f"indptr is {list(indptr.shape)} on {indptr.device}; expected [seq_len + 1] on {v.device}",
    )  # fmt: skip
    return _merge_list(op, v.contiguous(), _fp32(s), indptr.int().contiguous(), indptr.numel() - 1, 0)


def _fp32(s: torch.Tensor) -> torch.Tensor:
    return s.float().contiguous()


def _require_states(op: str, v: torch.Tensor, s: torch.Tensor, name: str) -> None:
    if s.shape != v.shape[:-1] or s.device != v.device:
        raise ValueError(
            f"{op}: {name} has shape {list(s.shape)} on {s.device}; expected {list(v.shape[:-1])} on {v.device}"
        )


_Launch = Callable[..., None]
_lists: _op.Memo[tuple[_Launch, tuple[int, int, int]]] = _op.Memo()
_pairs: _op.Memo[Callable[[int, int, int, int, int, int, int], None]] = _op.Memo()


def _launcher(
    op: str, v: torch.Tensor, num_rows: int, num_heads: int, pair: bool
) -> tuple[_Launch, tuple[int, int, int]]:
    dtype = dtypes.short_name(v.dtype)
    if dtype not in families.DTYPES:
        raise UnsupportedConfig(f"{op}: v is {v.dtype}; expected float16, bfloat16 or float32")
    spec = families.MERGE_STATES.spec(target.of_device(v.device), dtype=dtype, head_dim=v.shape[-1], pair=pair)
    launcher = resolver().load(spec).on(v.get_device())
    grid = (1, 1, 1)
    if v.is_cuda:
        grid = (-(-num_rows * num_heads // families.rows_per_block(launcher.config)), 1, 1)
    return launcher, grid


def _merge_pair(
    op: str,
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: Optional[torch.Tensor],
    v_out: torch.Tensor,
    s_out: torch.Tensor,
) -> None:
    key = (
        v.dtype, v.shape, v.stride(), v.get_device(), v_other.dtype, v_other.shape, v_other.stride(),
        v_other.get_device(), s.dtype, s.shape, s.stride(), s.get_device(), s_other.dtype, s_other.shape,
        s_other.stride(), s_other.get_device(),
    )  # fmt: skip
    launch = _pairs.get(key)
    if launch is None:
        launch = _pairs.remember(key, _prepare_pair(op, v, s, v_other, s_other))
    launch(
        v.data_ptr(), s.data_ptr(), v_other.data_ptr(), s_other.data_ptr(), 0 if mask is None else mask.data_ptr(),
        v_out.data_ptr(), s_out.data_ptr(),
    )  # fmt: skip


def _prepare_pair(
    op: str, v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor
) -> Callable[[int, int, int, int, int, int, int], None]:
    _op.require(v.dim() == 3, op, f"v has shape {list(v.shape)}; expected [seq_len, num_heads, head_dim]")
    for name, tensor in (("v", v), ("the other v", v_other), ("s", s), ("the other s", s_other)):
        _op.require(tensor.is_contiguous(), op, f"{name} is not contiguous; call .contiguous()")
    _op.require_like(op, "the other v", v_other, v, "v")
    _require_states(op, v, s, "s")
    _require_states(op, v, s_other, "the other s")
    for name, tensor in (("s", s), ("the other s", s_other)):
        _op.require(tensor.dtype == torch.float32, op, f"{name} is {tensor.dtype}; expected float32")
    if v.numel() == 0:
        return lambda *_: None
    launcher, grid = _launcher(op, v, v.shape[0], v.shape[1], True)
    num_rows, num_heads, device_index = v.shape[0], v.shape[1], v.get_device()

    def launch(v: int, s: int, v_other: int, s_other: int, mask: int, v_out: int, s_out: int) -> None:
        launcher(
            grid,
            _op.current_stream(device_index),
            v,
            s,
            v_other,
            s_other,
            mask,
            0,
            v_out,
            s_out,
            num_rows,
            num_heads,
            0,
        )

    return launch


def _merge_list(
    op: str, v: torch.Tensor, s: torch.Tensor, indptr: Optional[torch.Tensor], num_rows: int, num_states: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads, head_dim = v.shape[-2:]
    v_out = torch.empty((num_rows, num_heads, head_dim), dtype=v.dtype, device=v.device)
    s_out = torch.empty((num_rows, num_heads), dtype=torch.float32, device=v.device)
    merge = _compiled_list if torch.compiler.is_dynamo_compiling() else _launch_list
    merge(op, v, s, indptr, num_states, v_out, s_out)
    return v_out, s_out


def _launch_list(
    op: str,
    v: torch.Tensor,
    s: torch.Tensor,
    indptr: Optional[torch.Tensor],
    num_states: int,
    v_out: torch.Tensor,
    s_out: torch.Tensor,
) -> None:
    num_rows, num_heads, head_dim = v_out.shape
    if v_out.numel() == 0:
        return
    key = (v.dtype, head_dim, v.get_device(), num_rows, num_heads)
    found = _lists.get(key)
    if found is None:
        found = _lists.remember(key, _launcher(op, v, num_rows, num_heads, False))
    launch, grid = found
    launch(
        grid, _op.current_stream(v.get_device()), v.data_ptr(), s.data_ptr(), 0, 0, 0,
        0 if indptr is None else indptr.data_ptr(), v_out.data_ptr(), s_out.data_ptr(), num_rows, num_heads, num_states,
    )  # fmt: skip


_compiled_pair = _op.compiled_op(
    "merge_state(str op, Tensor v, Tensor s, Tensor v_other, Tensor s_other, Tensor? mask, Tensor(a!) v_out, "
    "Tensor(b!) s_out) -> ()",
    _merge_pair,
)
_compiled_in_place = _op.compiled_op(
    "merge_state_in_place(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, Tensor? mask) -> ()",
    _merge_in_place,
)
_compiled_list = _op.compiled_op(
    "merge_states(str op, Tensor v, Tensor s, Tensor? indptr, int num_states, Tensor(a!) v_out, "
    "Tensor(b!) s_out) -> ()",
    _launch_list,
)
