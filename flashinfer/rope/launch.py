# SPDX-License-Identifier: Apache-2.0
"""Prepared launches of the rotary operators: check once per signature, then pack and launch.

Each has a function that runs it, which a traced call reaches again through a door, and one that prepares its launch.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from flashinfer import target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import rope as families
from flashinfer.host import checks, memo, traced
from flashinfer.host.memo import Allocate, no_launch
from flashinfer.host.rows import require_distinct
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import Grid, Launcher, PreparedLaunch
from flashinfer.rope import rotation as rotary
from flashinfer.rope.rotation import Rotation


def grid(launcher: Launcher, num_tokens: int, *num_heads: int) -> Grid:
    """Blocks for all groups of kHeadsPerThread heads of one kind (queries, keys, values) of one token."""
    heads_per_thread = int(launcher.config.constants["kHeadsPerThread"])
    num_groups = num_tokens * sum(-(-count // heads_per_thread) for count in num_heads)
    return -(-num_groups // launcher.config.launch.units_per_block), 1, 1


# --------------------------------------------------------------------------------------------------------------- rotate


class _Rope(NamedTuple):
    launch: PreparedLaunch
    reads_values: bool  # of index tensors
    new_q: Allocate
    new_k: Allocate


_ropes: memo.Memo[_Rope] = memo.Memo()


def rope(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: Optional[torch.Tensor],
    k_out: Optional[torch.Tensor],
    rotation: Rotation,
    head_dim: Optional[int] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q_out, k_out: q and k themselves, or others, or None to allocate them. With head_dim given, heads may lie flat in
    the last axis."""
    if is_dynamo_compiling():
        return _trace_rope(op, q, k, q_out is q, rotation, head_dim)
    try:
        q_ptr = q.data_ptr() or checks.no_address(op, "q", q)
        k_ptr = k.data_ptr() or checks.no_address(op, "k", k)
        where, how = rotation.identify(op)
        alignment = q_ptr | k_ptr
        out: object = None if q_out is None else ()
        if q_out is not q and q_out is not None and k_out is not None:
            alignment |= q_out.data_ptr() | k_out.data_ptr()
            out = memo.signature(q_out), memo.signature(k_out)
        key = (
            op, head_dim, alignment & 15, out, q.dtype, q.shape, q.stride(), q.device,
            k.dtype, k.shape, k.stride(), k.device, how,
        )  # fmt: skip
        prepared = _ropes.get(key)
    except (AttributeError, TypeError):
        _prepare_rope(op, q, k, q_out, k_out, rotation, head_dim)  # says what is wrong
        raise
    if prepared is None:
        prepared = _ropes.remember(key, _prepare_rope(op, q, k, q_out, k_out, rotation, head_dim))
    launch, reads_values, new_q, new_k = prepared
    if reads_values:
        rotary.require_positions(op, rotation, q.shape[0])
    if q_out is q:
        launch(q_ptr, k_ptr, q_ptr, k_ptr, *where)
        return q, k
    if q_out is None or k_out is None:
        q_out, k_out = new_q(), new_k()
    launch(q_ptr, k_ptr, q_out.data_ptr(), k_out.data_ptr(), *where)
    return q_out, k_out


def _trace_rope(
    op: str, q: torch.Tensor, k: torch.Tensor, is_inplace: bool, rotation: Rotation, head_dim: Optional[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    if is_inplace:
        _rope_inplace_door(op, q, k, rotation, head_dim)
        return q, k
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _rope_door(op, q, k, q_out, k_out, rotation, head_dim)
    return q_out, k_out


def _prepare_rope(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: Optional[torch.Tensor],
    k_out: Optional[torch.Tensor],
    rotation: Rotation,
    head_dim: Optional[int],
) -> _Rope:
    checks.require_tensors(op, q=q, k=k)
    is_inplace = q_out is q
    new_q, new_k = (memo.allocator(x.shape, x.dtype, x.device) for x in (q, k))
    heads = {"q": q, "k": k, "q_out": new_q() if q_out is None else q_out, "k_out": new_k() if k_out is None else k_out}
    for name in "qk":
        checks.require_like(op, f"{name}_out", heads[f"{name}_out"], heads[name], name)
        require_distinct(op, name if is_inplace else f"{name}_out", heads[f"{name}_out"])
    geometry = rotary.check(op, rotation, heads, head_dim, rotary_part_only=is_inplace)
    num_heads = {"num_qo_heads": geometry.heads["q"].shape[1], "num_kv_heads": geometry.heads["k"].shape[1]}
    launch: PreparedLaunch = no_launch
    if q.numel() + k.numel() > 0:
        spec = families.ROPE.spec(
            target.of_device(q.device),
            **geometry.axes,
            ragged=rotation.positions is None,
            rotary_part_only=is_inplace and geometry.axes["rotary_dim"] != geometry.axes["head_dim"],
        )
        launcher = default_resolver().load(spec).on(q.get_device())
        launch = launcher.prepare(
            grid(launcher, q.shape[0], *num_heads.values()),
            {**geometry.constants, **num_heads},
            varying=("q", "k", "q_out", "k_out", *rotary.FIELDS),
        )
    return _Rope(launch, geometry.reads_values, new_q, new_k)


_rope_door = traced.door(
    "rope",
    rope,
    {
        **{"op": "str", "q": "Tensor", "k": "Tensor", "q_out": "Tensor(!)", "k_out": "Tensor(!)"},
        **{"rotation": rotary.BUNDLE, "head_dim": "int?"},
    },
)
_rope_inplace_door = traced.door(
    "rope_inplace",
    lambda op, q, k, rotation, head_dim: rope(op, q, k, q, k, rotation, head_dim),
    {"op": "str", "q": "Tensor(!)", "k": "Tensor(!)", "rotation": rotary.BUNDLE, "head_dim": "int?"},
)


# --------------------------------------------------------------------------------------------------- norm and rotate


class _QkNorm(NamedTuple):
    launch: PreparedLaunch
    k_offset: int  # bytes from the address of qkv to its keys
    reads_values: bool


_QK_NORM = "fused_qk_rmsnorm_rope"
_qk_norms: memo.Memo[_QkNorm] = memo.Memo()


def qk_norm(
    qkv: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    num_heads: tuple[int, int],
    eps: float,
    weight_bias: float,
    rotation: Rotation,
    pdl: Optional[bool],
) -> None:
    """weights, num_heads: of queries and keys."""
    if is_dynamo_compiling():
        _qk_norm_door(qkv, weights, num_heads, eps, weight_bias, rotation, pdl)
        return
    q_weight, k_weight = weights
    try:
        qkv_ptr = qkv.data_ptr() or checks.no_address(_QK_NORM, "qkv", qkv)
        q_weight_ptr = q_weight.data_ptr() or checks.no_address(_QK_NORM, "q_weight", q_weight)
        k_weight_ptr = k_weight.data_ptr() or checks.no_address(_QK_NORM, "k_weight", k_weight)
        where, how = rotation.identify(_QK_NORM)
        key = (
            pdl, eps, weight_bias, num_heads, (qkv_ptr | q_weight_ptr | k_weight_ptr) & 15,
            qkv.dtype, qkv.shape, qkv.stride(), qkv.device, memo.signature(q_weight), memo.signature(k_weight), how,
        )  # fmt: skip
        prepared = _qk_norms.get(key)
    except (AttributeError, TypeError):
        _prepare_qk_norm(qkv, weights, num_heads, eps, weight_bias, rotation, pdl)  # says what is wrong
        raise
    if prepared is None:
        prepared = _prepare_qk_norm(qkv, weights, num_heads, eps, weight_bias, rotation, pdl)
        _qk_norms.remember(key, prepared)
    if prepared.reads_values:
        rotary.require_positions(_QK_NORM, rotation, qkv.shape[0])
    prepared.launch(qkv_ptr, qkv_ptr + prepared.k_offset, q_weight_ptr, k_weight_ptr, *where)


def _prepare_qk_norm(
    qkv: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    num_heads: tuple[int, int],
    eps: float,
    weight_bias: float,
    rotation: Rotation,
    pdl: Optional[bool],
) -> _QkNorm:
    op = _QK_NORM
    checks.require_flag(op, "enable_pdl", pdl)
    q_weight, k_weight = weights
    checks.require_tensors(op, qkv=qkv, q_weight=q_weight, k_weight=k_weight)
    head_dim = q_weight.shape[-1] if q_weight.dim() == 1 else 0
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        checks.require_dtype_device(op, name, weight, qkv, "qkv")
        checks.require(
            weight.shape == (head_dim,) and head_dim > 0 and weight.is_contiguous(),
            op,
            f"{name} has shape {list(weight.shape)}; expected a contiguous [{head_dim or 'head_dim'}]",
        )
    num_qo_heads, num_kv_heads = (
        checks.integer(op, name, count, 0) for name, count in zip(("num_qo_heads", "num_kv_heads"), num_heads)
    )
    require_distinct(op, "qkv", qkv)
    geometry = rotary.check(op, rotation, {"qkv": qkv}, head_dim, also_loaded=weights)
    heads = geometry.heads["qkv"]
    checks.require(
        heads.shape[1] >= num_qo_heads + num_kv_heads,
        op,
        f"qkv has {heads.shape[1]} heads of {head_dim}; expected at least {num_qo_heads} + {num_kv_heads} (q and k)",
    )
    eps, weight_bias = checks.real(op, "eps", eps, at_least=0.0), checks.real(op, "weight_bias", weight_bias)
    launch: PreparedLaunch = no_launch
    if heads.shape[0] * (num_qo_heads + num_kv_heads) > 0:
        spec = families.QK_NORM_ROPE.spec(target.of_device(qkv.device), **geometry.axes)
        if qkv.is_cuda and families.lanes_per_head(spec) > 32:
            raise UnsupportedConfig(
                f"{op}: a head of {head_dim} in vectors of {geometry.axes['vec_size']} needs more than one warp; "
                "align qkv to 16 bytes"
            )
        launcher = default_resolver().load(spec).on(qkv.get_device(), pdl=pdl)
        constants = {"eps": eps, "weight_bias": weight_bias, "num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads}
        launch = launcher.prepare(
            grid(launcher, heads.shape[0], num_qo_heads, num_kv_heads),
            {**geometry.constants, **constants},
            varying=("q", "k", "q_weight", "k_weight", *rotary.FIELDS),
        )
    k_offset = num_qo_heads * heads.stride(1) * qkv.element_size()
    return _QkNorm(launch, k_offset, geometry.reads_values)


_qk_norm_door = traced.door(
    "qk_norm_rope",
    qk_norm,
    {
        **{"qkv": "Tensor(!)", "weights": traced.together("Tensor q_weight", "Tensor k_weight")},
        **{
            "num_heads": traced.together("int num_qo_heads", "int num_kv_heads"),
            "eps": "float",
            "weight_bias": "float",
        },
        **{"rotation": rotary.BUNDLE, "pdl": "bool?"},
    },
)
