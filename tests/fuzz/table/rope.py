# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding, alone and fused."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused, Unspecified, near, nothing, pair
from tests.fuzz.draw import FLOATS, FP8, Draw
from tests.fuzz.table import Case
from tests.fuzz.table import page as paged
from tests.fuzz.table.indices import LARGEST, integers, offsets, whole
from tests.fuzz.table.norm import number
from tests.oracles import norm as norm_oracle
from tests.oracles import rope as oracle

LLAMA31 = ("low_freq_factor", "high_freq_factor", "old_context_len")


def _frequencies(
    rotary_dim: int, rope_scale: Any, rope_theta: Any, low: Any = 1, high: Any = 4, context: Any = 0
) -> torch.Tensor:
    """Radians per position of each pair. FP64 has lost the angle where the turns are too many."""
    for value in (rope_scale, rope_theta):
        if not 0 < float(value) < math.inf:
            raise Refused("a scale or a base that is not positive and finite")
    if not context:
        return oracle.frequencies(rotary_dim, float(rope_scale), float(rope_theta))
    context, low, high = whole("old_context_len", context), float(low), float(high)
    if not (math.isfinite(low) and math.isfinite(high) and low < high and context >= 0):
        raise Refused("factors in no order, or a context of no length")
    if low <= 0:
        raise Unspecified  # the oracle divides by it
    return oracle.llama31_frequencies(rotary_dim, float(rope_scale), float(rope_theta), low, high, context)


def _angles(positions: list[int], radians: torch.Tensor) -> torch.Tensor:
    angles = oracle.angles_of(torch.tensor(positions, dtype=torch.int64), radians)
    if angles.numel() and not float(angles.abs().max()) < LARGEST:
        raise Unspecified
    return angles


def _rotary_dim(given: Any, head_dim: int) -> int:
    rotary_dim = head_dim if given is None else whole("rotary_dim", given)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise Refused("a rotary_dim that is no number of pairs of the head")
    return rotary_dim


def _require_heads(q: Any, k: Any) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise Refused("q and k of different tokens or head dimensions")
    if not (q.is_floating_point() and k.is_floating_point()):
        raise Refused("q and k of no floating type")


def _turned(x: torch.Tensor, angles: torch.Tensor, interleave: Any) -> Check:
    return near(oracle.rotate(x, angles, bool(interleave)), x.dtype)


def _draw_heads(d: Draw, num_tokens: int, groups: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """q, k and the head dimension."""
    dtype, head_dim = d.kernel(*FLOATS), d.kernel(32, 8, 64)
    heads = d.random.randint(1, 3), d.random.randint(1, 2)
    q, k = (d.normal(num_tokens, count, head_dim, dtype=dtype, groups=groups) for count in heads)
    return q, k, head_dim


def _draw_rotation(d: Draw, head_dim: int, is_llama31: bool) -> dict[str, Any]:
    rotation: dict[str, Any] = {
        "rotary_dim": d.kernel(None, head_dim, head_dim // 2), "interleave": d.kernel(False, True),
        "rope_scale": d.choice((1.0, 8.0, 0.5)), "rope_theta": d.choice((1e4, 5e5)),
    }  # fmt: skip
    if is_llama31:
        rotation.update(
            low_freq_factor=d.choice((1.0, 0.5)), high_freq_factor=4.0, old_context_len=d.choice((8192, 64))
        )
    return rotation


def _draw_position(d: Draw) -> int:
    return d.choice((0, 1, d.random.randint(0, 5000), 131071, 1_000_000))


def _apply(name: str, d: Draw) -> Iterator[Call]:
    in_place, is_llama31, by_row = "inplace" in name, "llama31" in name, "pos_ids" in name
    lengths = d.lengths(d.random.randint(1, 3), 3)
    num_tokens = sum(lengths) + (0 if by_row else d.choice((0, 0, 2)))  # rows past the last request are padding
    q, k, head_dim = _draw_heads(d, num_tokens)
    index = d.kernel(torch.int64, torch.int32)
    arguments: dict[str, Any] = {"q": q, "k": k}
    if by_row:
        arguments["pos_ids"] = d.index([_draw_position(d) for _ in range(num_tokens)], index)
    else:
        arguments["indptr"] = d.index([sum(lengths[:i]) for i in range(len(lengths) + 1)], index)
        arguments["offsets"] = d.index([_draw_position(d) for _ in lengths], index)
    arguments.update(_draw_rotation(d, head_dim, is_llama31))

    def expect(
        q: Any, k: Any, rotary_dim: Any, interleave: Any, rope_scale: Any, rope_theta: Any, pos_ids: Any = None,
        indptr: Any = None, offsets: Any = None, **llama31: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        _require_heads(q, k)
        positions = integers("pos_ids", pos_ids, len(q)) if by_row else _ragged_positions(indptr, offsets, len(q))
        radians = _frequencies(
            _rotary_dim(rotary_dim, q.shape[2]), rope_scale, rope_theta, *(llama31[n] for n in LLAMA31 if llama31)
        )
        angles = _angles(positions, radians)
        checks = [_turned(x, angles, interleave) for x in (q, k)]
        return {"return": nothing, "q": checks[0], "k": checks[1]} if in_place else {"return": pair(*checks)}

    yield from d.maybe_hostile(Call(name, getattr(flashinfer, name), arguments, expect, ("q", "k") if in_place else ()))


def _ragged_positions(indptr: Any, first: Any, num_tokens: int) -> list[int]:
    begins = integers("offsets", first)
    starts = offsets("indptr", indptr, len(begins) + 1, num_tokens)
    positions = [
        begin + i for begin, (start, end) in zip(begins, itertools.pairwise(starts)) for i in range(end - start)
    ]
    if any(abs(position) >= LARGEST for position in positions):
        raise Unspecified
    return [0] * starts[0] + positions + [0] * (num_tokens - starts[-1])


def _draw_table(d: Draw, rotary_dim: int) -> torch.Tensor:
    angles = torch.arange(d.random.randint(8, 20)).double()[:, None] * oracle.frequencies(rotary_dim)
    return d.place(torch.cat([angles.cos(), angles.sin()], dim=1).to(d.kernel(torch.float32, torch.bfloat16)))


def _from_table(table: Any, positions: list[int], rotary_dim: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of each token."""
    if rotary_dim is not None and whole("rotary_dim", rotary_dim) != table.shape[-1]:
        raise Refused("a table of another rotary_dim")
    if table.dim() != 2 or table.shape[1] % 2 or not table.is_floating_point():
        raise Refused("a table that is no cos and sin")
    if any(not 0 <= position < len(table) for position in positions):
        raise Refused(f"a position outside the table of {len(table)}")
    rows = table[torch.tensor(positions, dtype=torch.int64)].double()
    return rows[:, : rows.shape[1] // 2], rows[:, rows.shape[1] // 2 :]


def _with_table(name: str, d: Draw) -> Iterator[Call]:
    in_place, num_tokens = "inplace" in name, d.size()
    q, k, head_size = _draw_heads(d, num_tokens)
    if d.chance(0.5):
        q, k = (d.normal(num_tokens, x.shape[1] * head_size, dtype=x.dtype) for x in (q, k))
    table = _draw_table(d, d.kernel(head_size, head_size // 2))
    positions = [d.random.randrange(len(table)) for _ in range(num_tokens)]
    arguments = {
        "positions": d.index(positions, d.kernel(torch.int64, torch.int32)),
        "query": q, "key": k, "head_size": head_size, "cos_sin_cache": table, "is_neox": d.kernel(True, False),
    }  # fmt: skip

    def expect(
        positions: Any, query: Any, key: Any, head_size: Any, cos_sin_cache: Any, is_neox: Any
    ) -> Mapping[str, Check]:
        head_size = whole("head_size", head_size)
        heads = []
        for x in (query, key):
            if (
                x.dim() not in (2, 3)
                or head_size <= 0
                or x.shape[-1] % head_size
                or (x.dim() == 3 and x.shape[2] != head_size)
            ):
                raise Refused("rows that are no heads of this size")
            heads.append(
                x.reshape(
                    len(x), x.shape[1] * x.shape[2] // head_size if x.dim() == 3 else x.shape[1] // head_size, head_size
                )
            )
        _require_heads(*heads)
        cos, sin = _from_table(cos_sin_cache, integers("positions", positions, len(query)))
        if 2 * cos.shape[1] > head_size:
            raise Refused("more pairs than a head has")
        turned = [
            oracle.rotate_by(x, cos, sin, not is_neox).reshape(given.shape) for x, given in zip(heads, (query, key))
        ]
        checks = [near(x, given.dtype) for x, given in zip(turned, (query, key))]
        return {"return": nothing, "query": checks[0], "key": checks[1]} if in_place else {"return": pair(*checks)}

    outputs = ("query", "key") if in_place else ()
    yield from d.maybe_hostile(Call(name, getattr(flashinfer, name), arguments, expect, outputs))


def _append(d: Draw) -> Iterator[Call]:
    pages, layout = paged.draw_pages(d, d.kernel(torch.int32, torch.int64)), d.choice(("NHD", "HND"))
    slots = paged.draw_slots(d, pages)
    num_tokens = len(slots.positions)
    q, k, head_dim = _draw_heads(d, num_tokens)
    cache_dtype = d.kernel(q.dtype, *FP8)
    table = _draw_table(d, head_dim) if not d.narrow and d.chance(0.3) else None
    token_index = d.kernel(torch.int32, torch.int64)
    highest = 19 if table is None else len(table) - 1
    arguments: dict[str, Any] = {
        "q": q, "k": k, "v": d.normal(*k.shape, dtype=k.dtype, groups=0),
        "batch_indices": d.index(slots.batch_indices.tolist(), token_index),
        "positions": d.index(slots.positions.tolist(), token_index),
        "paged_kv_cache": paged.draw_cache(d, pages, k.shape[1], (head_dim, head_dim), cache_dtype, layout),
        "kv_indices": pages.indices, "kv_indptr": pages.indptr, "kv_last_page_len": None, "kv_layout": layout,
        "q_out": d.choice((None, q, d.blank(*q.shape, dtype=q.dtype, groups=0))),
        "pos_ids": d.index([d.random.randint(0, highest) for _ in range(num_tokens)], token_index),
        **_draw_rotation(d, head_dim, False), "cos_sin_cache": table, "k_scale": None, "v_scale": None,
        "enable_pdl": None,
    }  # fmt: skip
    if table is not None:
        arguments["rotary_dim"] = d.choice((None, table.shape[1]))
    if cache_dtype in FP8 and d.chance(0.5):
        arguments.update(k_scale=0.5, v_scale=d.dense(torch.tensor([2.0])))

    def expect(
        q: Any, k: Any, v: Any, batch_indices: Any, positions: Any, paged_kv_cache: Any, kv_indices: Any,
        kv_indptr: Any, kv_last_page_len: Any, kv_layout: Any, q_out: Any, pos_ids: Any, rotary_dim: Any,
        interleave: Any, rope_scale: Any, rope_theta: Any, cos_sin_cache: Any, k_scale: Any, v_scale: Any,
        enable_pdl: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        _require_heads(q, k)
        if (
            v.shape != k.shape
            or q.dtype != k.dtype
            or v.dtype != k.dtype
            or (q_out is not None and q_out.shape != q.shape)
        ):
            raise Refused("operands that do not fit each other")
        k_cache, _ = paged.cache_halves(paged_kv_cache, kv_layout)
        places = paged.find_slots(batch_indices, positions, kv_indices, kv_indptr, len(q), *k_cache.shape[:2])
        turned_at = integers("pos_ids", positions if pos_ids is None else pos_ids, len(q))
        padding = torch.tensor([min(slot) < 0 for slot in zip(batch_indices.tolist(), positions.tolist())]).bool()
        turned_at = [0 if is_padding else position for position, is_padding in zip(turned_at, padding.tolist())]
        if cos_sin_cache is None:
            angles = _angles(turned_at, _frequencies(_rotary_dim(rotary_dim, q.shape[2]), rope_scale, rope_theta))
            cos, sin = angles.cos(), angles.sin()
        else:
            cos, sin = _from_table(cos_sin_cache, turned_at, rotary_dim)
        turned = [oracle.rotate_by(x, cos, sin, bool(interleave)) for x in (q, k)]

        def check_q(actual: Any) -> None:
            near(turned[0][~padding], q.dtype)(actual[~padding])

        check_cache = _check_cache(paged_kv_cache, kv_layout, (turned[1], v), k.dtype, (k_scale, v_scale), places)
        checks = {"return": check_q, "paged_kv_cache": check_cache}
        return checks if q_out is None else {**checks, "q_out": check_q}

    function, outputs = flashinfer.rope_append_paged_kv_cache, ("paged_kv_cache", "q_out")
    call = Call("rope_append_paged_kv_cache", function, arguments, expect, outputs, (("q_out", "q"),))
    yield from d.maybe_hostile(call)


def _check_cache(cache: Any, kv_layout: Any, rows: Any, dtype: torch.dtype, scales: Any, places: Any) -> Check:
    """Keys were turned in fp32, so those of a cache that is not fp8 are close and not equal."""
    halves = paged.cache_halves(cache, kv_layout)
    if halves[0].dtype in FP8:
        return paged.check_appended(cache, kv_layout, (rows[0], rows[1].double()), scales, places)
    if (
        any(scale is not None for scale in scales)
        or halves[0].dtype != dtype
        or halves[0].shape[2:] != rows[0].shape[1:]
    ):
        raise Refused("a scale where nothing is converted, or rows that do not fit the cache")

    def check(actual: Any) -> None:
        now = paged.cache_halves(actual, kv_layout)
        for half, before, values, is_key in zip(now, halves, rows, (True, False)):
            expected = before.double()
            for row, page, entry in places:
                expected[page, entry] = values[row].double()
            if is_key:
                near(expected, dtype)(half)
            elif not torch.equal(half.double().nan_to_num(7e7), expected.nan_to_num(7e7)):
                raise AssertionError("values differ from the rows")

    return check


def _qk_norm(d: Draw) -> Iterator[Call]:
    dtype, head_dim, num_tokens = d.kernel(*FLOATS), d.kernel(32, 8, 64), d.size()
    heads, others = (d.random.randint(1, 3), d.random.randint(1, 2)), d.choice((0, 1, 2))
    total = sum(heads) + others
    shape = (num_tokens, total * head_dim) if d.chance(0.5) else (num_tokens, total, head_dim)
    table = _draw_table(d, head_dim) if not d.narrow and d.chance(0.3) else None
    positions = [d.random.randint(0, 7) if table is not None else _draw_position(d) for _ in range(num_tokens)]
    arguments: dict[str, Any] = {
        "qkv": d.normal(*shape, dtype=dtype, groups=0),
        "q_weight": d.dense(d.values(head_dim, dtype=dtype)), "k_weight": d.dense(d.values(head_dim, dtype=dtype)),
        "pos_ids": d.index(positions, torch.int64),
        "num_qo_heads": heads[0], "num_kv_heads": heads[1], "eps": 1e-6, "weight_bias": d.choice((0.0, 1.0)),
        **_draw_rotation(d, head_dim, False), "cos_sin_cache": table, "enable_pdl": None,
    }  # fmt: skip
    if table is not None:
        arguments["rotary_dim"] = d.choice((None, table.shape[1]))

    def expect(
        qkv: Any, q_weight: Any, k_weight: Any, pos_ids: Any, num_qo_heads: Any, num_kv_heads: Any, eps: Any,
        weight_bias: Any, rotary_dim: Any, interleave: Any, rope_scale: Any, rope_theta: Any, cos_sin_cache: Any,
        enable_pdl: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        counts = (whole("num_qo_heads", num_qo_heads), whole("num_kv_heads", num_kv_heads))
        head_dim = q_weight.shape[-1]
        if (
            q_weight.dim() != 1
            or q_weight.shape != k_weight.shape
            or qkv.dim() not in (2, 3)
            or not qkv.is_floating_point()
        ):
            raise Refused("weights or rows of another rank")
        if (
            head_dim == 0
            or qkv.shape[-1] % head_dim
            or (qkv.dim() == 3 and qkv.shape[2] != head_dim)
            or min(counts) < 0
        ):
            raise Refused("rows that are no heads of this dimension, or heads of a negative number")
        x = qkv.reshape(len(qkv), qkv.numel() // max(1, len(qkv)) // head_dim, head_dim)
        if len(qkv) and x.shape[1] < sum(counts):
            raise Refused("fewer heads than there are of q and k")
        expected = x.double()
        positions = integers("pos_ids", pos_ids, len(qkv))
        if cos_sin_cache is None:
            angles = _angles(positions, _frequencies(_rotary_dim(rotary_dim, head_dim), rope_scale, rope_theta))
            cos, sin = angles.cos(), angles.sin()
        else:
            cos, sin = _from_table(cos_sin_cache, positions, rotary_dim)
        begin, of_root = 0, number(eps)
        if not of_root >= 0:
            raise Refused("eps is negative")
        for count, weight in zip(counts, (q_weight, k_weight)):
            normed = norm_oracle.rmsnorm(x[:, begin : begin + count], weight.double() + number(weight_bias), of_root)
            expected[:, begin : begin + count] = oracle.rotate_by(normed, cos, sin, bool(interleave))
            begin += count
        return {"return": nothing, "qkv": near(expected.reshape(qkv.shape), qkv.dtype)}

    yield from d.maybe_hostile(
        Call("fused_qk_rmsnorm_rope", flashinfer.fused_qk_rmsnorm_rope, arguments, expect, ("qkv",))
    )


_APPLY = ("apply_rope", "apply_rope_inplace", "apply_rope_pos_ids", "apply_rope_pos_ids_inplace", "apply_llama31_rope",
          "apply_llama31_rope_inplace", "apply_llama31_rope_pos_ids", "apply_llama31_rope_pos_ids_inplace")  # fmt: skip
_TABLE = ("apply_rope_with_cos_sin_cache", "apply_rope_with_cos_sin_cache_inplace")
CASES: dict[str, Case] = {
    **{name: functools.partial(_apply, name) for name in _APPLY},
    **{name: functools.partial(_with_table, name) for name in _TABLE},
    "rope_append_paged_kv_cache": _append,
    "fused_qk_rmsnorm_rope": _qk_norm,
}
