"""How tokens are turned, as the rotary operators (`flashinfer.rope`) and their fused relatives have it in common."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch

from flashinfer import dtypes
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import rope as families
from flashinfer.families.layout import DTYPES
from flashinfer.families.page import vec_size
from flashinfer.host import checks, memo
from flashinfer.host.checks import check_index
from flashinfer.host.rows import alignment_of
from flashinfer.jit.loader import Value
from flashinfer.jit.spec import Config, KernelSpec


class Rotation(NamedTuple):
    """What decides each token's angles: positions, or indptr and offsets; frequencies, or a cos_sin_cache."""

    rotary_dim: Optional[int]  # None: the head's dimension
    interleave: bool
    positions: Optional[torch.Tensor] = None  # [num_tokens]
    indptr: Optional[torch.Tensor] = None  # [batch_size + 1]
    offsets: Optional[torch.Tensor] = None  # [batch_size]
    cos_sin_cache: Optional[torch.Tensor] = None  # [max_position, rotary_dim]
    # The frequencies, as families.rope.frequency_table takes them.
    rope_scale: float = 1.0
    rope_theta: float = 1e4
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 0

    @classmethod
    def at(cls, positions: torch.Tensor, rotary_dim: Optional[int], interleave: bool, *frequencies: Any) -> Rotation:
        return cls(rotary_dim, interleave, positions, None, None, None, *frequencies)

    @classmethod
    def of_requests(
        cls,
        indptr: torch.Tensor,
        offsets: torch.Tensor,
        rotary_dim: Optional[int],
        interleave: bool,
        *frequencies: Any,
    ) -> Rotation:
        return cls(rotary_dim, interleave, None, indptr, offsets, None, *frequencies)

    @classmethod
    def by_table(cls, positions: torch.Tensor, cos_sin_cache: torch.Tensor, interleave: bool) -> Rotation:
        return cls(cos_sin_cache.shape[-1], interleave, positions, None, None, cos_sin_cache)

    def signature(self) -> tuple[object, ...]:
        if self.positions is not None:
            where = memo.signature(self.positions)
        else:
            assert self.indptr is not None and self.offsets is not None
            where = memo.signature(self.indptr) + memo.signature(self.offsets)
        angles: tuple[object, ...] = self[-5:]
        if self.cos_sin_cache is not None:
            angles = (*memo.signature(self.cos_sin_cache), self.cos_sin_cache.data_ptr() & 15)
        return self.rotary_dim, self.interleave, where, angles

    def addresses(self) -> tuple[int, int, int, int]:
        """The pointers of `Rotary` in rope/params.h, in order."""
        positions, indptr, offsets, table = self[2:6]
        if positions is not None:
            return positions.data_ptr(), 0, 0, 0 if table is None else table.data_ptr()
        assert indptr is not None and offsets is not None
        return 0, indptr.data_ptr(), offsets.data_ptr(), 0


ADDRESSES = ("rotary.positions", "rotary.indptr", "rotary.offsets", "rotary.cos_sin_cache")
# A rotation in the schema of an operator for torch.compile: its fields, in order.
SCHEMA = (
    "int? rotary_dim, bool interleave, Tensor? rope_positions, Tensor? indptr, Tensor? offsets, Tensor? cos_sin_cache, "
    "float rope_scale, float rope_theta, float low_freq_factor, float high_freq_factor, int old_context_len"
)


class Geometry(NamedTuple):
    """What a prepared launch keeps of a rotation: spec axes, and the rest of `Rotary`, after its pointers."""

    axes: dict[str, str | int | bool]
    constants: dict[str, Value]


def check_rotation(
    op: str, rotation: Rotation, q: torch.Tensor, heads: list[torch.Tensor], rotary_part_only: bool
) -> Geometry:
    """Check a rotation against queries `[num_tokens, num_heads, head_dim]`; choose one width of loads for all heads."""
    num_tokens, _, head_dim = q.shape
    rotary_dim = head_dim if rotation.rotary_dim is None else rotation.rotary_dim
    checks.require(
        0 < rotary_dim <= min(head_dim, families.MAX_ROTARY_DIM) and rotary_dim % 4 == 0,
        op,
        f"rotary_dim is {rotary_dim}; expected a multiple of 4, at most {min(head_dim, families.MAX_ROTARY_DIM)}",
    )
    dtype = dtypes.short_name(q.dtype)
    if dtype not in DTYPES:
        raise UnsupportedConfig(f"{op}: q is {q.dtype}; expected float16, bfloat16 or float32")
    if head_dim % 4 != 0 or head_dim > 512:
        raise UnsupportedConfig(f"{op}: head_dim is {head_dim}; expected a multiple of 4, at most 512")

    checks.require(
        rotation.rope_scale > 0 and rotation.rope_theta > 0,
        op,
        f"rope_scale is {rotation.rope_scale} and rope_theta {rotation.rope_theta}; expected positive numbers",
    )
    checks.require(
        rotation.old_context_len == 0 or rotation.high_freq_factor > rotation.low_freq_factor,
        op,
        f"high_freq_factor is {rotation.high_freq_factor}; expected more than low_freq_factor, "
        f"{rotation.low_freq_factor}",
    )

    index, batch_size = _check_positions(op, rotation, q, num_tokens)
    cos_sin, cos_sin_stride = _check_cos_sin(op, rotation, q, rotary_dim)
    lengths = (rotary_dim // 2,) if rotary_part_only else (rotary_dim // 2, head_dim // 2)
    vec = vec_size(dtype, lengths, alignment_of(*heads)) if q.is_cuda else 1
    if q.is_cuda and rotation.cos_sin_cache is not None:
        # A lane reads the angles of its vector (of half of it, if interleaved) with loads of at most 16 bytes.
        widest = vec_size(cos_sin, lengths, 0)
        aligned = vec_size(cos_sin, lengths, alignment_of(rotation.cos_sin_cache))
        vec = vec if aligned == widest else min(vec, aligned * (2 if rotation.interleave else 1))
    checks.require(
        not (q.is_cuda and rotation.interleave and vec < 2),
        op,
        "q or k has an odd stride or offset, which interleave=True does not allow; call .contiguous()",
    )
    axes: dict[str, str | int | bool] = {
        "dtype": dtype,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "interleave": rotation.interleave,
        "cos_sin": cos_sin,
        "position_index": index,
        "vec_size": vec,
    }
    constants: dict[str, Value] = {
        "rotary.cos_sin_stride": cos_sin_stride,
        "rotary.batch_size": batch_size,
        "rotary.reserved": 0,
        "rotary.frequencies": families.frequency_table(rotary_dim, *rotation[-5:]),
    }
    return Geometry(axes, constants)


def _check_positions(op: str, rotation: Rotation, q: torch.Tensor, num_tokens: int) -> tuple[str, int]:
    if rotation.positions is not None:
        check_index(op, "positions", rotation.positions, num_tokens)
        checks.require_device(op, "positions", rotation.positions, q, "q")
        return str(rotation.positions.dtype)[6:], 0
    assert rotation.indptr is not None and rotation.offsets is not None
    batch_size = rotation.offsets.shape[0]
    check_index(op, "offsets", rotation.offsets, batch_size)
    check_index(op, "indptr", rotation.indptr, batch_size + 1)
    checks.require_dtype_device(op, "offsets", rotation.offsets, rotation.indptr, "indptr")
    checks.require_device(op, "indptr", rotation.indptr, q, "q")
    return str(rotation.indptr.dtype)[6:], batch_size


def _check_cos_sin(op: str, rotation: Rotation, q: torch.Tensor, rotary_dim: int) -> tuple[str, int]:
    cache = rotation.cos_sin_cache
    if cache is None:
        return "computed", 0
    checks.require(
        cache.dim() == 2 and cache.shape[1] == rotary_dim,
        op,
        f"cos_sin_cache has shape {list(cache.shape)}; expected [max_position, {rotary_dim}]: cos, then sin",
    )
    checks.require_unit_stride(op, "cos_sin_cache", cache)
    checks.require_device(op, "cos_sin_cache", cache, q, "q")
    dtype = dtypes.short_name(cache.dtype)
    if dtype not in DTYPES:
        raise UnsupportedConfig(f"{op}: cos_sin_cache is {cache.dtype}; expected float32, float16 or bfloat16")
    return dtype, cache.stride(0)


def as_heads(op: str, name: str, tensor: torch.Tensor, head_dim: Optional[int] = None) -> torch.Tensor:
    """`[num_tokens, num_heads, head_dim]`; with head_dim given, heads may lie flat in the last axis."""
    if head_dim is not None and tensor.dim() == 2:
        checks.require(
            tensor.shape[1] % head_dim == 0,
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


def check_same_heads(op: str, name: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    """The rows and head dimension of q, in any number of heads."""
    checks.require(
        tensor.shape[0] == q.shape[0] and tensor.shape[2] == q.shape[2],
        op,
        f"{name} has shape {list(tensor.shape)}; expected [{q.shape[0]}, num_heads, {q.shape[2]}], as q",
    )
    checks.require_dtype_device(op, name, tensor, q, "q")


def grid(spec: KernelSpec, config: Config, num_tokens: int, num_heads: list[int]) -> tuple[int, int, int]:
    """Blocks for all groups of kHeadsPerThread heads of one kind (queries, keys, values) of one token."""
    heads_per_thread = int(config.constants["kHeadsPerThread"])
    groups_per_block = config.launch.num_threads // families.lanes_per_head(spec)
    num_groups = num_tokens * sum(-(-count // heads_per_thread) for count in num_heads)
    return -(-num_groups // groups_per_block), 1, 1
