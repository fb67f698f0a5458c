# SPDX-License-Identifier: Apache-2.0
"""Unplanned attention, and merging of its states; what planned attention (wrappers.py) has in common with it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import torch

import flashinfer
from flashinfer.cascade import variable_length_merge_states
from tests.fuzz.call import Call, Check, Refused, Unspecified, near, nothing, pair, require_tensor
from tests.fuzz.draw import FLOATS, FP8, Draw
from tests.fuzz.table import Case
from tests.fuzz.table.indices import LARGEST, offsets, whole
from tests.oracles.attention import attention
from tests.oracles.quantization import packbits

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (BF16, torch.float8_e4m3fn), (F16, torch.float8_e5m2))  # q, KV


def draw_options(d: Draw) -> dict[str, Any]:
    """What happens to scores, mostly one thing at a time."""
    given: dict[str, Any] = {"pos_encoding_mode": "NONE", "window_left": -1, "logits_soft_cap": None, "sm_scale": None,
                             "rope_scale": None, "rope_theta": None}  # fmt: skip
    kind = d.kernel("plain", "rope", "alibi", "window", "soft cap", "all")
    if kind in ("rope", "all"):
        given.update(pos_encoding_mode="ROPE_LLAMA", rope_scale=d.choice((None, 2.0)), rope_theta=d.choice((None, 5e5)))
    if kind == "alibi":
        given["pos_encoding_mode"] = "ALIBI"
    if kind in ("window", "all"):
        given["window_left"] = d.choice((0, 1, 5, 100))
    if kind in ("soft cap", "all"):
        given["logits_soft_cap"] = d.choice((1.0, 30.0))
    given["sm_scale"] = d.choice((None, 0.2))
    return given


def read_options(
    pos_encoding_mode: Any = "NONE", window_left: Any = -1, logits_soft_cap: Any = None, sm_scale: Any = None,
    rope_scale: Any = None, rope_theta: Any = None, **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """As the oracle takes them."""
    if pos_encoding_mode is None or window_left is None:
        raise Unspecified  # what was planned, or the default
    if pos_encoding_mode not in ("NONE", "ROPE_LLAMA", "ALIBI"):
        raise Refused("an unknown position encoding")
    rope = pos_encoding_mode == "ROPE_LLAMA"
    return {
        "pos_encoding_mode": pos_encoding_mode,
        "window_left": max(-1, min(whole("window_left", window_left), LARGEST)),
        "logits_soft_cap": None if logits_soft_cap is None else _number("logits_soft_cap", logits_soft_cap, 0.0),
        "sm_scale": None if sm_scale is None else _positive("sm_scale", sm_scale),
        "rope_scale": None if rope_scale is None or not rope else _positive("rope_scale", rope_scale),
        "rope_theta": None if rope_theta is None or not rope else _positive("rope_theta", rope_theta),
    }


def read_scales(q_scale: Any = None, k_scale: Any = None, v_scale: Any = None) -> dict[str, float]:
    given = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    scales = {name: 1.0 if scale is None else _number(name, scale) for name, scale in given.items()}
    _positive("q_scale * k_scale", scales["q_scale"] * scales["k_scale"])
    return scales


def _number(name: str, value: Any, least: float = -math.inf) -> float:
    """Finite. Scores so large that fp32 has lost their differences weigh anything."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise Refused(f"{name} is {value!r}")
    if abs(value) > 1e6 or 0 < abs(value) < 1e-30:
        raise Unspecified
    return float(value)


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if number <= 0:
        raise Refused(f"{name} is not positive")
    return number


def draw_sinks(d: Draw, num_qo_heads: int, always: bool = False) -> Optional[torch.Tensor]:
    return d.dense(d.values(num_qo_heads, scale=3.0)) if always or d.kernel(False, False, True) else None


def read_sinks(sinks: Any, num_qo_heads: int) -> dict[str, Any]:
    """As the oracle takes them."""
    if sinks is None:
        return {}
    if sinks.shape != (num_qo_heads,) or sinks.dtype != F32 or not sinks.is_contiguous():
        raise Refused("sinks of another shape or dtype, or with gaps")
    require_finite(sinks)
    return {"sinks": sinks}


def near_lse(expected: torch.Tensor, scale: float = 1.0) -> Check:
    def check(actual: Any) -> None:
        require_tensor(actual, expected.shape, F32)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5 * scale, atol=1e-4 * scale)

    return check


def state(out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype, with_lse: Any, scale: float = 1.0) -> Check:
    return pair(near(out, dtype, scale), near_lse(lse, scale)) if with_lse else near(out, dtype, scale)


def require_finite(*tensors: torch.Tensor) -> None:
    """Infinities make scores whose difference is NaN, or is not: by the order of sums."""
    if not all(bool(tensor.float().isfinite().all()) for tensor in tensors):
        raise Unspecified


def require_dtypes(q: torch.dtype, kv: torch.dtype) -> None:
    if q not in FLOATS or kv not in (*FLOATS, *FP8):
        raise Refused("dtypes without a kernel")


def require_heads(num_qo_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads <= 0 or num_qo_heads <= 0 or num_qo_heads % num_kv_heads:
        raise Refused("query heads that are no multiple of the KV heads")


def rows_of(k: Any, v: Any, kv_layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`[kv_len, num_kv_heads, head_dim]`."""
    if kv_layout not in ("NHD", "HND"):
        raise Refused("an unknown layout")
    if k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2] or k.dtype != v.dtype:
        raise Refused("k and v of different rows or dtypes")
    return (k, v) if kv_layout == "NHD" else (k.transpose(0, 1), v.transpose(0, 1))


def draw_kv_rows(
    d: Draw, length: int, heads: int, dims: tuple[int, int], dtype: torch.dtype, layout: str
) -> list[torch.Tensor]:
    shape = (length, heads) if layout == "NHD" else (heads, length)
    return [d.normal(*shape, dim, dtype=dtype, groups=0) for dim in dims]


def _decode(d: Draw) -> Iterator[Call]:
    (dtype, kv_dtype), head_dim, layout = d.kernel(*DTYPES), d.kernel(32, 64), d.choice(("NHD", "HND"))
    heads, group, length = d.random.randint(1, 2), d.choice((1, 3, 9)), d.choice((0, 1, 5, 40, 600))
    k, v = draw_kv_rows(d, length, heads, (head_dim, d.kernel(head_dim, 64)), kv_dtype, layout)
    arguments = {
        "q": d.normal(heads * group, head_dim, dtype=dtype), "k": k, "v": v, "kv_layout": layout, **draw_options(d),
        "q_scale": d.choice((None, 0.5)), "k_scale": d.choice((None, 2.0)), "v_scale": d.choice((None, 0.25)),
        "return_lse": d.chance(0.5), "sinks": draw_sinks(d, heads * group),
    }  # fmt: skip

    def expect(
        q: Any,
        k: Any,
        v: Any,
        kv_layout: Any,
        q_scale: Any,
        k_scale: Any,
        v_scale: Any,
        return_lse: Any,
        sinks: Any,
        **options: Any,
    ) -> Mapping[str, Check]:
        k, v = rows_of(k, v, kv_layout)
        if q.dim() != 2 or q.shape[1] != k.shape[2] or k.shape[2] not in HEAD_DIMS or v.shape[2] not in HEAD_DIMS:
            raise Refused("head dimensions that do not fit")
        require_dtypes(q.dtype, k.dtype)
        require_heads(len(q), k.shape[1])
        given = {**read_options(**options), **read_scales(q_scale, k_scale, v_scale), **read_sinks(sinks, len(q))}
        require_finite(q, k, v)
        out, lse = attention(q[None], k, v, **given)
        return {"return": state(out[0], lse[0], q.dtype, return_lse)}

    yield from d.maybe_hostile(
        Call("single_decode_with_kv_cache", flashinfer.single_decode_with_kv_cache, arguments, expect)
    )


def _prefill(name: str, d: Draw) -> Iterator[Call]:
    (dtype, kv_dtype), head_dim, layout = d.kernel(*DTYPES), d.kernel(32, 64), d.choice(("NHD", "HND"))
    heads, group = d.random.randint(1, 2), d.choice((1, 3, 5))
    qo_len, kv_len = d.choice((0, 1, 5, 40)), d.choice((0, 1, 7, 70))
    k, v = draw_kv_rows(d, kv_len, heads, (head_dim, head_dim), kv_dtype, layout)
    kind = d.kernel("causal", "none", "bool", "packed")
    arguments = {
        "q": d.normal(qo_len, heads * group, head_dim, dtype=dtype, groups=0), "k": k, "v": v,
        **draw_mask(d, kind, [(qo_len, kv_len)]), "causal": kind == "causal", "kv_layout": layout, **draw_options(d),
        "scale_q": d.choice((None, 0.5)), "k_scale": d.choice((None, 2.0)), "v_scale": d.choice((None, 0.25)),
        "sinks": draw_sinks(d, heads * group),
    }  # fmt: skip
    if not name.endswith("return_lse"):
        arguments["return_lse"] = d.chance(0.5)

    def expect(
        q: Any, k: Any, v: Any, custom_mask: Any, packed_custom_mask: Any, causal: Any, kv_layout: Any, scale_q: Any,
        k_scale: Any, v_scale: Any, sinks: Any, return_lse: Any = True, **options: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        k, v = rows_of(k, v, kv_layout)
        if q.dim() != 3 or q.shape[2] != k.shape[2]:
            raise Refused("head dimensions that do not fit")
        require_prefill(q.dtype, k.dtype, k.shape[2], v.shape[2])
        require_heads(q.shape[1], k.shape[1])
        mask = read_mask(custom_mask, packed_custom_mask, [(len(q), len(k))])
        given = {**read_options(**options), **read_scales(scale_q, k_scale, v_scale), **read_sinks(sinks, q.shape[1])}
        require_finite(q, k, v)
        out, lse = attention(q, k, v, causal=bool(causal), custom_mask=None if mask is None else mask[0], **given)
        return {"return": state(out, lse, q.dtype, return_lse)}

    yield from d.maybe_hostile(Call(name, getattr(flashinfer, name), arguments, expect))


def require_prefill(q: torch.dtype, kv: torch.dtype, head_dim_qk: int, head_dim_vo: int) -> None:
    require_dtypes(q, kv)
    if kv != q and kv not in FP8:
        raise Refused("KV of another dtype than q")
    if not (head_dim_qk == head_dim_vo in HEAD_DIMS or (head_dim_qk, head_dim_vo) == (192, 128)):
        raise Refused("head dimensions without a kernel")


def draw_mask(d: Draw, kind: str, lengths: list[tuple[int, int]]) -> dict[str, Any]:
    """`kind`: "bool" or "packed"; any other is without."""
    masks = [torch.rand(qo_len, kv_len, generator=d.torch) < 0.6 for qo_len, kv_len in lengths]
    bits = torch.cat([mask.flatten() for mask in masks]) if masks else torch.zeros(0, dtype=torch.bool)
    packed = [byte for mask in masks for byte in packbits(mask.flatten().tolist(), "little")]
    return {
        "custom_mask": d.dense(bits) if kind == "bool" else None,
        "packed_custom_mask": d.dense(torch.tensor(packed, dtype=torch.uint8)) if kind == "packed" else None,
    }


def read_mask(custom_mask: Any, packed: Any, lengths: list[tuple[int, int]]) -> Optional[list[torch.Tensor]]:
    """`[qo_len, kv_len]` of each request."""
    sizes = [qo_len * kv_len for qo_len, kv_len in lengths]
    if packed is not None:
        if not isinstance(packed, torch.Tensor) or packed.dtype != torch.uint8:
            raise Refused("a packed mask of no bytes")
        data, at, bits = packed.reshape(-1), 0, []
        for size in sizes:
            end = at + -(-size // 8)
            if end > len(data):
                raise Refused("a packed mask shorter than the lengths")
            bits.append(((data[at:end, None] >> torch.arange(8)) & 1).reshape(-1)[:size].bool())
            at = end
    elif custom_mask is not None:
        if not isinstance(custom_mask, torch.Tensor) or custom_mask.numel() < sum(sizes):
            raise Refused("a mask shorter than the lengths")
        flat = custom_mask.reshape(-1)[: sum(sizes)] != 0
        bits = list(flat.split(sizes)) if sizes else []
    else:
        return None
    return [mask.view(shape) for mask, shape in zip(bits, lengths)]


# -------------------------------------------------------------------------------------------------------------- merging


def merged(states: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """FP64 `[..., head_dim]` and `[...]`; a state of -inf weighs nothing, whatever its output holds."""
    v, s = torch.stack([v.double() for v, _ in states]), torch.stack([s.double() for _, s in states])
    if not bool(((s == -math.inf) | s.isfinite()).all()):
        raise Unspecified
    total = torch.logsumexp(s * math.log(2), dim=0) / math.log(2)
    weight = torch.where(s == -math.inf, 0.0, torch.exp2(s - torch.where(total == -math.inf, 0.0, total)))
    return (torch.where(weight[..., None] > 0, v, 0.0) * weight[..., None]).sum(0), total


def _draw_state(d: Draw, *shape: int, dtype: torch.dtype, is_dense: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    v, s = torch.randn(shape, generator=d.torch), torch.randn(shape[:-1], generator=d.torch) * 8
    if s.numel() and d.chance(0.4):
        at = d.random.randrange(s.numel())
        s.view(-1)[at] = -math.inf
        v.view(-1, shape[-1])[at] = math.nan
    v = v.to(dtype)
    return (d.memory.place(v), d.memory.place(s)) if is_dense else (d.place(v, 0), d.place(s, 0))


def _require_state(v: Any, s: Any, rank: int) -> None:
    if (
        v.dim() != rank
        or s.shape != v.shape[:-1]
        or not v.is_floating_point()
        or s.dtype == torch.bool
        or s.is_complex()
    ):
        raise Refused("an output and an LSE that do not fit each other")


def _merge_state(d: Draw) -> Iterator[Call]:
    shape, dtype = (d.size(), d.random.randint(1, 3), d.kernel(64, 8, 96)), d.kernel(*FLOATS)
    (v_a, s_a), (v_b, s_b) = (_draw_state(d, *shape, dtype=dtype) for _ in range(2))

    def expect(v_a: Any, s_a: Any, v_b: Any, s_b: Any) -> Mapping[str, Check]:
        _require_state(v_a, s_a, 3)
        _require_state(v_b, s_b, 3)
        if v_a.shape != v_b.shape:
            raise Refused("states of different shapes")
        return {"return": state(*merged([(v_a, s_a), (v_b, s_b)]), v_a.dtype, True)}

    arguments = {"v_a": v_a, "s_a": s_a, "v_b": v_b, "s_b": s_b}
    yield from d.maybe_hostile(Call("merge_state", flashinfer.merge_state, arguments, expect))


def _merge_in_place(d: Draw) -> Iterator[Call]:
    shape, dtype = (d.size(), d.random.randint(1, 3), d.kernel(64, 8, 96)), d.kernel(*FLOATS)
    v, s = _draw_state(
        d, *shape, dtype=dtype, is_dense=True
    )  # ends a page, so starts at a multiple of 16 bytes as its size is one
    v_other, s_other = _draw_state(d, *shape, dtype=dtype)
    mask = d.dense(torch.rand(shape[0], generator=d.torch) < 0.5) if d.chance(0.5) else None

    def expect(v: Any, s: Any, v_other: Any, s_other: Any, mask: Any) -> Mapping[str, Check]:
        _require_state(v, s, 3)
        _require_state(v_other, s_other, 3)
        if v.shape != v_other.shape or (mask is not None and mask.shape != v.shape[:1]):
            raise Refused("states of different shapes")
        if s.dtype != F32:
            raise Refused("an LSE of another type than fp32, to write to")
        out, lse = merged([(v, s), (v_other, s_other)])
        idle = torch.zeros(s.shape, dtype=torch.bool)
        if mask is not None:
            kept = (mask == 0)[:, None]
            own, own_lse = merged([(v, s)])
            out, lse = torch.where(kept[..., None], own, out), torch.where(kept, own_lse, lse)
            idle = kept & (s == -math.inf)  # keeps an output that weighs nothing, or gets zeros

        def check(actual: Any) -> None:
            clean = actual.detach().clone()
            clean[idle] = 0.0
            near(out, v.dtype)(clean)

        return {"return": nothing, "v": check, "s": near_lse(lse)}

    arguments = {"v": v, "s": s, "v_other": v_other, "s_other": s_other, "mask": mask}
    yield from d.maybe_hostile(
        Call("merge_state_in_place", flashinfer.merge_state_in_place, arguments, expect, ("v", "s"))
    )


def _merge_states(d: Draw) -> Iterator[Call]:
    shape, dtype = (d.size(), d.random.randint(0, 4), d.random.randint(1, 3), d.kernel(64, 8, 96)), d.kernel(*FLOATS)
    v, s = _draw_state(d, *shape, dtype=dtype)

    def expect(v: Any, s: Any) -> Mapping[str, Check]:
        _require_state(v, s, 4)
        out, lse = merged_or_none([(v[:, i], s[:, i]) for i in range(v.shape[1])], (v.shape[0], *v.shape[2:]))
        return {"return": state(out, lse, v.dtype, True)}

    yield from d.maybe_hostile(Call("merge_states", flashinfer.merge_states, {"v": v, "s": s}, expect))


def merged_or_none(
    states: list[tuple[torch.Tensor, torch.Tensor]], shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    if states:
        return merged(states)
    return torch.zeros(shape, dtype=torch.float64), torch.full(shape[:-1], -math.inf, dtype=torch.float64)


def _variable_length(d: Draw) -> Iterator[Call]:
    lengths = d.lengths(d.random.randint(0, 4), 4)
    num_states, dtype = sum(lengths) + d.choice((0, 0, 2)), d.kernel(*FLOATS)
    v, s = _draw_state(d, num_states, d.random.randint(1, 3), d.kernel(64, 8, 96), dtype=dtype)
    indptr = d.index([sum(lengths[:i]) for i in range(len(lengths) + 1)])

    def expect(v: Any, s: Any, indptr: Any) -> Mapping[str, Check]:
        _require_state(v, s, 3)
        starts, shape = offsets("indptr", indptr, None, len(v)), tuple(v.shape[1:])
        rows = [merged_or_none([(v[i], s[i]) for i in range(*ends)], shape) for ends in itertools.pairwise(starts)]
        out = torch.stack([row for row, _ in rows]) if rows else torch.zeros(0, *shape).double()
        lse = torch.stack([row for _, row in rows]) if rows else torch.zeros(0, *shape[:-1]).double()
        return {"return": state(out, lse, v.dtype, True)}

    call = Call(
        "variable_length_merge_states", variable_length_merge_states, {"v": v, "s": s, "indptr": indptr}, expect
    )
    yield from d.maybe_hostile(call)


CASES: dict[str, Case] = {
    "single_decode_with_kv_cache": _decode,
    "single_prefill_with_kv_cache": functools.partial(_prefill, "single_prefill_with_kv_cache"),
    "single_prefill_with_kv_cache_return_lse": functools.partial(_prefill, "single_prefill_with_kv_cache_return_lse"),
    "merge_state": _merge_state,
    "merge_state_in_place": _merge_in_place,
    "merge_states": _merge_states,
    "variable_length_merge_states": _variable_length,
}
