# SPDX-License-Identifier: Apache-2.0
"""How tokens are turned, as the rotary operators (`flashinfer.rope`) and their fused relatives have it in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

import torch

from flashinfer import dtypes
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import rope as families
from flashinfer.families.layout import DTYPES, vec_size
from flashinfer.host import checks, indices, traced
from flashinfer.host.rows import alignment_of
from flashinfer.jit.loader import Value


class Rotation(NamedTuple):
    """What decides each token's angles: positions, or indptr and offsets; frequencies, or a cos_sin_cache."""

    rotary_dim: Optional[int]  # None: the width of the table, or the head's dimension
    interleave: bool
    positions: Optional[torch.Tensor] = None  # [num_tokens]
    indptr: Optional[torch.Tensor] = None  # [batch_size + 1]
    offsets: Optional[torch.Tensor] = None  # [batch_size]
    cos_sin_cache: Optional[torch.Tensor] = None  # [num_positions, rotary_dim]
    # The frequencies, as families.rope.frequency_table takes them.
    rope_scale: float = 1.0
    rope_theta: float = 1e4
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 0

    def identify(self, op: str) -> tuple[tuple[int, int, int, int], tuple[object, ...]]:
        """Addresses, the fields of `Rotation` in rope/params.h, and what a prepared launch depends on.

        Does not look for what has to be there: where a caller left it out, an AttributeError, which `check` explains.
        """
        given: Any = self
        rotary_dim, interleave, positions, indptr, offsets, table, *frequencies = given
        if indptr is not None:
            indptr_ptr = indptr.data_ptr() or checks.no_address(op, "indptr", indptr)
            offsets_ptr = offsets.data_ptr() or checks.no_address(op, "offsets", offsets)
            return (0, indptr_ptr, offsets_ptr, 0), (
                rotary_dim, interleave, indptr.dtype, indptr.shape, indptr.stride(), indptr.device,
                offsets.dtype, offsets.shape, offsets.stride(), offsets.device, *frequencies,
            )  # fmt: skip
        positions_ptr = positions.data_ptr() or checks.no_address(op, "positions", positions)
        where = positions.dtype, positions.shape, positions.stride(), positions.device
        if table is None:
            return (positions_ptr, 0, 0, 0), (rotary_dim, interleave, *where, *frequencies)
        table_ptr = table.data_ptr() or checks.no_address(op, "cos_sin_cache", table)
        of_table = table.dtype, table.shape, table.stride(), table.device, table_ptr & 15
        return (positions_ptr, 0, 0, table_ptr), (rotary_dim, interleave, where, of_table)

    def tensors(self) -> dict[str, Optional[torch.Tensor]]:
        """Those that it is made of, by name. None where one is missing."""
        ragged = self.indptr is not None or self.offsets is not None
        where = {"indptr": self.indptr, "offsets": self.offsets} if ragged else {"positions": self.positions}
        return where if self.cos_sin_cache is None else {**where, "cos_sin_cache": self.cos_sin_cache}


FIELDS = tuple(f"rotation.{field[0]}" for field in families.ROTATION)
BUNDLE = traced.fields(
    Rotation,
    *("int? rotary_dim", "bool interleave", "Tensor? rope_positions", "Tensor? indptr", "Tensor? offsets"),
    *("Tensor? cos_sin_cache", "float rope_scale", "float rope_theta", "float low_freq_factor"),
    *("float high_freq_factor", "int old_context_len"),
)


class Geometry(NamedTuple):
    """What `check` finds: heads as they are seen, axes of the spec, and what does not vary of the parameters."""

    heads: dict[str, torch.Tensor]  # [num_tokens, num_heads, head_dim]
    axes: dict[str, str | int | bool]
    constants: dict[str, Value]
    reads_values: bool  # of index tensors on the host, for `require_positions`


def check(
    op: str,
    rotation: Rotation,
    tensors: Mapping[str, torch.Tensor],
    head_dim: Optional[int] = None,
    *,
    rotary_part_only: bool = False,
    also_loaded: tuple[torch.Tensor, ...] = (),
) -> Geometry:
    """Check heads and their rotation; choose one width of loads for all of them.

    tensors: `[num_tokens, num_heads, head_dim]`, queries first, by the names of their strides in the parameters. With
    head_dim given, heads may lie flat in the last axis. also_loaded: in vectors of the same width.
    """
    heads = {name: _as_heads(op, name, tensor, head_dim) for name, tensor in tensors.items()}
    q = next(iter(heads.values()))
    num_tokens, _, head_dim = q.shape
    for name, tensor in heads.items():
        checks.require(
            tensor.shape[0] == num_tokens and tensor.shape[2] == head_dim,
            op,
            f"{name} has shape {list(tensor.shape)}; expected [{num_tokens}, num_heads, {head_dim}], as q",
        )
        checks.require_dtype_device(op, name, tensor, q, "q")
    dtype = dtypes.short_name(q.dtype)
    if dtype not in DTYPES:
        raise UnsupportedConfig(f"{op}: q is {q.dtype}; expected float16, bfloat16 or float32")
    if head_dim % 4 != 0 or not 0 < head_dim <= 512:
        raise UnsupportedConfig(f"{op}: head_dim is {head_dim}; expected a multiple of 4, at most 512")
    checks.require_tensors(op, **rotation.tensors())
    interleave = checks.boolean(op, "interleave", rotation.interleave)
    rotary_dim = _rotary_dim(op, rotation, head_dim)
    cos_sin = "computed" if rotation.cos_sin_cache is None else dtypes.short_name(rotation.cos_sin_cache.dtype)
    lengths = math.gcd(rotary_dim // 2, rotary_dim // 2 if rotary_part_only else head_dim // 2)
    vec = 1
    if q.is_cuda:
        vec = vec_size(dtype, lengths, alignment_of(*heads.values(), *also_loaded))
        if rotation.cos_sin_cache is not None:
            # A lane reads the angles of its vector (of half of it, if interleaved) with loads of at most 16 bytes.
            widest, aligned = (vec_size(cos_sin, lengths, bits) for bits in (0, alignment_of(rotation.cos_sin_cache)))
            vec = vec if aligned == widest else min(vec, aligned * (2 if interleave else 1))
        checks.require(
            not interleave or vec >= 2,
            op,
            "q or k has an odd stride or offset, which interleave=True does not allow; call .contiguous()",
        )
    axes: dict[str, str | int | bool] = {
        "dtype": dtype,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "interleave": interleave,
        "cos_sin": cos_sin,
        "position_index": _check_positions(op, rotation, q),
        "vec_size": vec,
    }
    table = rotation.cos_sin_cache
    constants: dict[str, Value] = {
        "setup.cos_sin_stride": 0 if table is None else table.stride(0),
        "setup.num_positions": 0 if table is None else table.shape[0],
        "setup.batch_size": 0 if rotation.offsets is None else rotation.offsets.shape[0],
        "setup.frequencies": _frequencies(op, rotation, rotary_dim),
        "num_tokens": num_tokens,
    }
    for name, tensor in heads.items():
        constants[f"{name}_strides.token"], constants[f"{name}_strides.head"] = tensor.stride()[:2]
    parts = rotation.tensors()
    reads_values = (table is not None or rotation.positions is None) and indices.may_be_visible(*parts.values())
    return Geometry(heads, axes, constants, reads_values)


def _rotary_dim(op: str, rotation: Rotation, head_dim: int) -> int:
    """Checks the shape and type of a table."""
    table, largest = rotation.cos_sin_cache, min(head_dim, families.MAX_ROTARY_DIM)
    rotary_dim = head_dim if rotation.rotary_dim is None else checks.integer(op, "rotary_dim", rotation.rotary_dim)
    if table is not None:
        checks.require(
            table.dim() == 2 and rotation.rotary_dim in (None, table.shape[-1]),
            op,
            f"cos_sin_cache has shape {list(table.shape)}; expected [max_position, "
            f"{'rotary_dim' if rotation.rotary_dim is None else rotary_dim}]: cos, then sin",
        )
        checks.require_unit_stride(op, "cos_sin_cache", table)
        if dtypes.short_name(table.dtype) not in DTYPES:
            raise UnsupportedConfig(f"{op}: cos_sin_cache is {table.dtype}; expected float32, float16 or bfloat16")
        rotary_dim = table.shape[1]
    checks.require(
        0 < rotary_dim <= largest and rotary_dim % 4 == 0,
        op,
        f"rotary_dim is {rotary_dim}; expected a multiple of 4, at most {largest}",
    )
    return rotary_dim


def _check_positions(op: str, rotation: Rotation, q: torch.Tensor) -> str:
    """The type of index."""
    positions, indptr, offsets, table = rotation[2:6]
    if table is not None:
        checks.require_device(op, "cos_sin_cache", table, q, "q")
        checks.require(table.shape[0] > 0 or q.shape[0] == 0, op, "cos_sin_cache has no rows; expected max_position")
    if positions is not None:
        checks.check_index(op, "positions", positions, q.shape[0])
        checks.require_device(op, "positions", positions, q, "q")
        return str(positions.dtype)[6:]
    assert indptr is not None and offsets is not None
    checks.check_index(op, "offsets", offsets)
    checks.check_index(op, "indptr", indptr, offsets.shape[0] + 1)
    checks.require_dtype_device(op, "offsets", offsets, indptr, "indptr")
    checks.require_device(op, "indptr", indptr, q, "q")
    return str(indptr.dtype)[6:]


def _frequencies(op: str, rotation: Rotation, rotary_dim: int) -> bytes:
    scale, theta, low, high, context = rotation[-5:]
    scale, theta = checks.real(op, "rope_scale", scale, above=0), checks.real(op, "rope_theta", theta, above=0)
    low, high = checks.real(op, "low_freq_factor", low), checks.real(op, "high_freq_factor", high)
    context = checks.integer(op, "old_context_len", context, 0)
    checks.require(
        context == 0 or high > low, op, f"high_freq_factor is {high:g}; expected more than low_freq_factor, {low:g}"
    )
    try:
        return families.frequency_table(rotary_dim, scale, theta, low, high, context)
    except (OverflowError, ValueError):
        raise ValueError(f"{op}: rope_theta is {theta:g}, rope_scale {scale:g}; their frequencies overflow") from None


def _as_heads(op: str, name: str, tensor: torch.Tensor, head_dim: Optional[int]) -> torch.Tensor:
    """`[num_tokens, num_heads, head_dim]`; with head_dim given, heads may lie flat in the last axis."""
    checks.require_tensors(op, **{name: tensor})
    if head_dim is not None and tensor.dim() == 2:
        checks.require(
            checks.integer(op, "head_size", head_dim, 1) > 0 and tensor.shape[1] % head_dim == 0,
            op,
            f"{name} has shape {list(tensor.shape)}; expected [num_tokens, num_heads * {head_dim}]",
        )
        checks.require_unit_stride(op, name, tensor)
        tensor = tensor.view(tensor.shape[0], tensor.shape[1] // head_dim, head_dim)
    checks.require(
        tensor.dim() == 3 and (head_dim is None or tensor.shape[2] == head_dim),
        op,
        f"{name} has shape {list(tensor.shape)}; expected [num_tokens, num_heads, {head_dim or 'head_dim'}]",
    )
    checks.require_unit_stride(op, name, tensor)
    return tensor


def require_positions(
    op: str, rotation: Rotation, num_tokens: int, are_turned: Optional[Callable[[], torch.Tensor]] = None
) -> None:
    """Check the values of a rotation's index tensors: rows of a table, offsets within the rows of q. Raises IndexError
    or ValueError. are_turned: makes a mask of the tokens that count; None: all do."""
    if not indices.are_visible(*rotation.tensors().values()):
        return
    if rotation.indptr is not None:
        indices.require_offsets(op, "indptr", rotation.indptr, num_tokens, "the rows of q")
    if rotation.cos_sin_cache is not None and rotation.positions is not None:
        size = rotation.cos_sin_cache.shape[0]
        indices.require_within(
            op, "positions", rotation.positions, 0, size, "the rows of cos_sin_cache", where=are_turned
        )
