"""Prepared launches of the rotary operators: check once per signature, then pack and launch."""

from __future__ import annotations

from typing import Any, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import rope as families
from flashinfer.families.page import SLOT_ADDRESSES, vec_size
from flashinfer.host import checks, memo, quant_scale, traced
from flashinfer.host.paged_cache import (
    PagedCache,
    cache_addresses,
    cache_signature,
    cache_strides,
    check_cache,
    check_conversion,
    check_scales,
    check_slots,
    head_strides,
    split_cache,
)
from flashinfer.host.quant_scale import Scale
from flashinfer.host.rows import alignment_of
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch, Value
from flashinfer.jit.spec import KernelSpec
from flashinfer.rope import rotation as rotary
from flashinfer.rope.rotation import Rotation

_memo: memo.Memo[PreparedLaunch] = memo.Memo()
# With the batch size and the page size, which stand among the addresses.
_appends: memo.Memo[tuple[PreparedLaunch, tuple[int, int]]] = memo.Memo()


def _nothing(*_: object) -> None:
    """The launch of an operator on an empty batch."""


def rope(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    rotation: Rotation,
    head_dim: Optional[int] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.compiler.is_dynamo_compiling():
        _run_rope(op, q, k, q_out, k_out, head_dim, rotation)
    elif q_out is q:
        _compiled_rope_inplace(op, q, k, head_dim, *rotation)
    else:
        _compiled_rope(op, q, k, q_out, k_out, head_dim, *rotation)
    return q_out, k_out


def _run_rope(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    head_dim: Optional[int],
    rotation: Rotation,
) -> None:
    q_ptr, k_ptr, q_out_ptr, k_out_ptr = q.data_ptr(), k.data_ptr(), q_out.data_ptr(), k_out.data_ptr()
    key = (
        op,
        head_dim,
        (q_ptr | k_ptr | q_out_ptr | k_out_ptr) & 15,
        memo.signature(q),
        memo.signature(k),
        rotation.signature(),
    )
    launch = _memo.get(key)
    if launch is None:
        launch = _memo.remember(key, _prepare_rope(op, q, k, q_out, k_out, rotation, head_dim))
    launch(q_ptr, k_ptr, q_out_ptr, k_out_ptr, *rotation.addresses())


_compiled_rope = traced.compiled_op(
    f"rope(str op, Tensor q, Tensor k, Tensor(a!) q_out, Tensor(b!) k_out, int? head_dim, {rotary.SCHEMA}) -> ()",
    lambda op, q, k, q_out, k_out, head_dim, *rotation: _run_rope(
        op, q, k, q_out, k_out, head_dim, Rotation(*rotation)
    ),
)
_compiled_rope_inplace = traced.compiled_op(
    f"rope_inplace(str op, Tensor(a!) q, Tensor(b!) k, int? head_dim, {rotary.SCHEMA}) -> ()",
    lambda op, q, k, head_dim, *rotation: _run_rope(op, q, k, q, k, head_dim, Rotation(*rotation)),
)


def append(
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    paged_kv_cache: PagedCache,
    kv_layout: str,
    scales: tuple[Scale, Scale],
    rotation: Rotation,
    pdl: Optional[bool],
) -> None:
    """heads: q, k, v, q_out; slots: batch_indices, positions, kv_indices, kv_indptr; scales: of k and v."""
    q, k, v, q_out = heads
    batch_indices, positions, kv_indices, kv_indptr = slots
    k_scale, v_scale = scales
    if torch.compiler.is_dynamo_compiling():
        pair = (paged_kv_cache, None) if isinstance(paged_kv_cache, torch.Tensor) else paged_kv_cache
        _compiled_append(
            *heads, *slots, *pair, kv_layout, *quant_scale.split(k_scale), *quant_scale.split(v_scale), pdl, *rotation
        )
        return
    addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), q_out.data_ptr())
    caches = cache_addresses(paged_kv_cache)
    key = (
        kv_layout,
        pdl,
        (addresses[0] | addresses[1] | addresses[2] | addresses[3] | caches[0] | caches[1]) & 15,
        memo.signature(q),
        memo.signature(k),
        memo.signature(v),
        None if q_out is q else memo.signature(q_out),
        memo.signature(batch_indices),
        memo.signature(positions),
        cache_signature(paged_kv_cache),
        memo.signature(kv_indices),
        memo.signature(kv_indptr),
        quant_scale.signature(k_scale),
        quant_scale.signature(v_scale),
        rotation.signature(),
    )
    prepared = _appends.get(key)
    if prepared is None:
        op = "rope_append_paged_kv_cache"
        split = split_cache(op, paged_kv_cache, kv_layout)
        check_scales(op, k_scale, v_scale, k, split[0])
        slot_axes = check_slots(op, k, *slots)
        geometry = (kv_indptr.shape[0] - 1, split[0].shape[1])
        launch = _prepare_append(op, heads, split, slot_axes, rotation, pdl)
        prepared = _appends.remember(key, (launch, geometry))
    launch, geometry = prepared
    launch(
        *addresses,
        *caches,
        *quant_scale.values(k_scale),
        *quant_scale.values(v_scale),
        batch_indices.data_ptr(),
        positions.data_ptr(),
        kv_indices.data_ptr(),
        kv_indptr.data_ptr(),
        *geometry,
        *rotation.addresses(),
    )


def _run_compiled_append(*arguments: Any) -> None:
    k_cache, v_cache, kv_layout = arguments[8:11]
    cache = k_cache if v_cache is None else (k_cache, v_cache)
    scales = (quant_scale.join(*arguments[11:13]), quant_scale.join(*arguments[13:15]))
    append(arguments[:4], arguments[4:8], cache, kv_layout, scales, Rotation(*arguments[16:]), arguments[15])


_compiled_append = traced.compiled_op(
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor(a!) q_out, Tensor batch_indices, Tensor positions, "
    "Tensor kv_indices, Tensor kv_indptr, Tensor(b!) k_cache, Tensor(c!)? v_cache, str kv_layout, "
    f"{quant_scale.SCHEMA.format('k_scale')}, {quant_scale.SCHEMA.format('v_scale')}, bool? pdl, "
    f"{rotary.SCHEMA}) -> ()",
    _run_compiled_append,
)


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
    (q_weight, k_weight), (num_qo_heads, num_kv_heads) = weights, num_heads
    if torch.compiler.is_dynamo_compiling():
        _compiled_qk_norm(qkv, *weights, *num_heads, eps, weight_bias, pdl, *rotation)
        return
    address, q_weight_ptr, k_weight_ptr = qkv.data_ptr(), q_weight.data_ptr(), k_weight.data_ptr()
    key = (
        "qk_norm",
        pdl,
        eps,
        weight_bias,
        num_qo_heads,
        num_kv_heads,
        (address | q_weight_ptr | k_weight_ptr) & 15,
        memo.signature(qkv),
        memo.signature(q_weight),
        memo.signature(k_weight),
        rotation.signature(),
    )
    launch = _memo.get(key)
    if launch is None:
        launch = _memo.remember(key, _prepare_qk_norm(qkv, weights, num_heads, eps, weight_bias, rotation, pdl))
    key_address = address + num_qo_heads * qkv.element_size() * (q_weight.shape[0] if qkv.dim() == 2 else qkv.stride(1))
    launch(address, key_address, q_weight_ptr, k_weight_ptr, *rotation.addresses())


_compiled_qk_norm = traced.compiled_op(
    "qk_norm_rope(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, int num_qo_heads, int num_kv_heads, float eps, "
    f"float weight_bias, bool? pdl, {rotary.SCHEMA}) -> ()",
    lambda qkv, q_weight, k_weight, num_qo_heads, num_kv_heads, eps, weight_bias, pdl, *rotation: qk_norm(
        qkv, (q_weight, k_weight), (num_qo_heads, num_kv_heads), eps, weight_bias, Rotation(*rotation), pdl
    ),
)


def _prepare_rope(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    rotation: Rotation,
    head_dim: Optional[int],
) -> PreparedLaunch:
    is_inplace = q_out is q
    q, k = rotary.as_heads(op, "q", q, head_dim), rotary.as_heads(op, "k", k, head_dim)
    q_out, k_out = rotary.as_heads(op, "q", q_out, head_dim), rotary.as_heads(op, "k", k_out, head_dim)
    rotary.check_same_heads(op, "k", k, q)
    geometry = rotary.check_rotation(op, rotation, q, [q, k, q_out, k_out], is_inplace)
    num_tokens, num_qo_heads, num_kv_heads = q.shape[0], q.shape[1], k.shape[1]
    if q.numel() + k.numel() == 0:
        return _nothing
    spec = families.ROPE.spec(
        target.of_device(q.device),
        **geometry.axes,
        ragged=rotation.positions is None,
        rotary_part_only=is_inplace and geometry.axes["rotary_dim"] != q.shape[2],
    )
    return _prepare(
        spec,
        [num_qo_heads, num_kv_heads],
        {
            **geometry.constants,
            **head_strides("q_strides", q),
            **head_strides("k_strides", k),
            **head_strides("q_out_strides", q_out),
            **head_strides("k_out_strides", k_out),
            "num_tokens": num_tokens,
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": num_kv_heads,
        },
        varying=("q", "k", "q_out", "k_out", *rotary.ADDRESSES),
        device_index=q.get_device(),
    )


def _prepare_append(
    op: str,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    caches: tuple[torch.Tensor, torch.Tensor],
    slot_axes: dict[str, str],
    rotation: Rotation,
    pdl: Optional[bool],
) -> PreparedLaunch:
    (q, k, v, q_out), (k_cache, v_cache) = heads, caches
    for name, tensor in (("q", q), ("k", k), ("v", v), ("q_out", q_out)):
        rotary.as_heads(op, name, tensor)
        rotary.check_same_heads(op, name, tensor, q)
    checks.require_like(op, "v", v, k, "k")
    checks.require_like(op, "q_out", q_out, q, "q")
    check_cache(op, "key", k, k_cache, k_cache)
    check_cache(op, "value", v, v_cache, k_cache)
    cache_dtype = dtypes.short_name(k_cache.dtype)
    check_conversion(op, dtypes.short_name(k.dtype), cache_dtype)
    geometry = rotary.check_rotation(op, rotation, q, [q, k, v, q_out], False)
    if q.is_cuda:
        lengths = (q.shape[2] // 2,)
        geometry.axes["vec_size"] = min(
            int(geometry.axes["vec_size"]), vec_size(cache_dtype, lengths, alignment_of(k_cache, v_cache))
        )
        checks.require(
            not rotation.interleave or int(geometry.axes["vec_size"]) >= 2,
            op,
            "the cache has an odd stride, which interleave=True does not allow",
        )
    num_tokens, num_qo_heads, num_kv_heads = q.shape[0], q.shape[1], k.shape[1]
    if q.numel() + k.numel() == 0:
        return _nothing
    spec = families.ROPE_APPEND.spec(target.of_device(q.device), **geometry.axes, cache_dtype=cache_dtype, **slot_axes)
    return _prepare(
        spec,
        [num_qo_heads, num_kv_heads, num_kv_heads],
        {
            **geometry.constants,
            **head_strides("q_strides", q),
            **head_strides("k_strides", k),
            **head_strides("v_strides", v),
            **head_strides("q_out_strides", q_out),
            **cache_strides("key_cache_strides", k_cache),
            **cache_strides("value_cache_strides", v_cache),
            "num_tokens": num_tokens,
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": num_kv_heads,
        },
        varying=(
            *("q", "k", "v", "q_out", "key_cache", "value_cache"),
            *quant_scale.names("key_scale"),
            *quant_scale.names("value_scale"),
            *SLOT_ADDRESSES,
            "slots.batch_size",
            "slots.page_size",
            *rotary.ADDRESSES,
        ),
        device_index=q.get_device(),
        pdl=pdl,
    )


def _prepare_qk_norm(
    qkv: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    num_heads: tuple[int, int],
    eps: float,
    weight_bias: float,
    rotation: Rotation,
    pdl: Optional[bool],
) -> PreparedLaunch:
    (q_weight, k_weight), (num_qo_heads, num_kv_heads) = weights, num_heads
    op = "fused_qk_rmsnorm_rope"
    head_dim = q_weight.shape[-1]
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        checks.require_dtype_device(op, name, weight, qkv, "qkv")
        checks.require(
            weight.shape == (head_dim,) and weight.is_contiguous(),
            op,
            f"{name} has shape {list(weight.shape)}; expected a contiguous [{head_dim}]",
        )
    heads = rotary.as_heads(op, "qkv", qkv, head_dim)
    checks.require(
        heads.shape[1] >= num_qo_heads + num_kv_heads,
        op,
        f"qkv has {heads.shape[1]} heads of {head_dim}; expected at least {num_qo_heads} + {num_kv_heads} (q and k)",
    )
    geometry = rotary.check_rotation(op, rotation, heads, [heads, q_weight, k_weight], False)
    num_tokens = heads.shape[0]
    if num_tokens * (num_qo_heads + num_kv_heads) == 0:
        return _nothing
    spec = families.QK_NORM_ROPE.spec(target.of_device(qkv.device), **geometry.axes)
    if qkv.is_cuda and families.lanes_per_head(spec) > 32:
        raise UnsupportedConfig(
            f"{op}: a head of {head_dim} in vectors of {geometry.axes['vec_size']} needs more than one warp; "
            "align qkv to 16 bytes"
        )
    return _prepare(
        spec,
        [num_qo_heads, num_kv_heads],
        {
            **geometry.constants,
            **head_strides("strides", heads),
            "eps": eps,
            "weight_bias": weight_bias,
            "num_tokens": num_tokens,
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": num_kv_heads,
        },
        varying=("q", "k", "q_weight", "k_weight", *rotary.ADDRESSES),
        device_index=qkv.get_device(),
        pdl=pdl,
    )


def _prepare(
    spec: KernelSpec,
    num_heads: list[int],
    values: dict[str, Value],
    *,
    varying: tuple[str, ...],
    device_index: int,
    pdl: Optional[bool] = None,
) -> PreparedLaunch:
    """num_heads: of each kind of head (queries, keys, values) that the kernel visits."""
    launcher = default_resolver().load(spec).on(device_index, pdl=pdl)
    grid = rotary.grid(spec, launcher.config, int(values["num_tokens"]), num_heads)
    return launcher.prepare(grid, values, varying=varying)
