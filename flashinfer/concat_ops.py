# SPDX-License-Identifier: Apache-2.0
"""Keys of latent attention that is not absorbed, put together from their parts."""

from __future__ import annotations

import math

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import concat as families
from flashinfer.families.layout import vec_size
from flashinfer.families.page import strides
from flashinfer.host import checks, memo, traced
from flashinfer.host.memo import no_launch
from flashinfer.host.rows import alignment_of, require_distinct
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch

__all__ = ["concat_mla_k"]
_OP = "concat_mla_k"


def concat_mla_k(k: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor, *, backend: str = "default") -> None:
    """Keys from their two parts: `k[:, h] = [k_nope[:, h], k_rope[:, 0]]`, for prefill over 128 + 64 dimensions.

    Args:
        k: `[num_tokens, num_heads, nope_dim + rope_dim]`, written; shares no memory with the others.
        k_nope: `[num_tokens, num_heads, nope_dim]`, of each head.
        k_rope: `[num_tokens, 1, rope_dim]`, of all heads. fp16, bf16, fp32 or fp8, all of one dtype; unit stride in the
            last axis, any strides before.
        backend: accepted for compatibility.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit, or elements of k share memory.
        TypeError: an argument is no tensor.
        UnsupportedConfig: no kernel for this dtype, device or size.
    """
    if is_dynamo_compiling():
        return _door(k, k_nope, k_rope)
    return _concat(k, k_nope, k_rope)


_launches: memo.Memo[PreparedLaunch] = memo.Memo()


def _concat(k: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor) -> None:
    try:
        k_ptr = k.data_ptr() or checks.no_address(_OP, "k", k)
        nope_ptr = k_nope.data_ptr() or checks.no_address(_OP, "k_nope", k_nope)
        rope_ptr = k_rope.data_ptr() or checks.no_address(_OP, "k_rope", k_rope)
        key = (
            (k_ptr | nope_ptr | rope_ptr) & 15, k.dtype, k.shape, k.stride(), k.device, k_nope.dtype, k_nope.shape,
            k_nope.stride(), k_nope.device, k_rope.dtype, k_rope.shape, k_rope.stride(), k_rope.device,
        )  # fmt: skip
        launch = _launches.get(key)
    except (AttributeError, RuntimeError):
        checks.require_addresses(_OP, k=k, k_nope=k_nope, k_rope=k_rope)
        raise
    if launch is None:
        launch = _launches.remember(key, _prepare(k, k_nope, k_rope))
    launch(nope_ptr, rope_ptr, k_ptr)


def _prepare(k: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor) -> PreparedLaunch:
    given = {"k_nope": k_nope, "k_rope": k_rope, "k": k}
    checks.require_tensors(_OP, **given)
    for name, tensor in given.items():
        checks.require(
            tensor.dim() == 3, _OP, f"{name} has shape {list(tensor.shape)}; expected [num_tokens, num_heads, dim]"
        )
        checks.require_dtype_device(_OP, name, tensor, k, "k")
        checks.require_unit_stride(_OP, name, tensor)
    num_tokens, num_heads, nope_dim = k_nope.shape
    rope_dim = k_rope.shape[2]
    for name, expected in (("k_rope", (num_tokens, 1, rope_dim)), ("k", (num_tokens, num_heads, nope_dim + rope_dim))):
        checks.require(
            given[name].shape == expected,
            _OP,
            f"{name} has shape {list(given[name].shape)}; expected {list(expected)} for k_nope of shape "
            f"{list(k_nope.shape)} and a rotary part of {rope_dim}",
        )
    require_distinct(_OP, "k", k)
    device_index, dtype = k.get_device(), dtypes.short_name(k.dtype)
    vec = vec_size(dtype, math.gcd(nope_dim, rope_dim), alignment_of(k, k_nope, k_rope)) if device_index >= 0 else 1
    spec = families.CONCAT_MLA_K.spec(
        target.of_device(k.device), dtype=dtype, nope_dim=nope_dim, rope_dim=rope_dim, vec_size=vec
    )
    if device_index >= 0 and families.num_lanes(spec) > 1024:
        raise UnsupportedConfig(
            f"{_OP}: {nope_dim} + {rope_dim} elements in vectors of {vec} need more than 1024 threads; align the rows"
        )
    if num_tokens * num_heads == 0:
        return no_launch
    launcher = default_resolver().load(spec).on(device_index)
    groups_per_block = launcher.config.launch.num_threads // families.num_lanes(spec)
    num_groups = num_tokens * -(-num_heads // families.HEADS_PER_THREAD)
    values = {
        **strides("k_nope_strides", k_nope.stride()),
        **strides("k_strides", k.stride()),
        "k_rope_stride": k_rope.stride(0),
        "num_tokens": num_tokens,
        "num_heads": num_heads,
    }
    grid = (-(-num_groups // groups_per_block), 1, 1)
    return launcher.prepare(grid, values, varying=("k_nope", "k_rope", "k"))


_door = traced.door(_OP, _concat, {"k": "Tensor(!)", "k_nope": "Tensor", "k_rope": "Tensor"})
