# SPDX-License-Identifier: Apache-2.0
"""Matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Optional

import torch

import flashinfer
from flashinfer import gemm
from tests.fuzz.call import Call, Check, Refused, Unspecified, lenient, near
from tests.fuzz.draw import FLOATS, FP8, Draw
from tests.fuzz.table import Case
from tests.oracles import gemm as oracle

_E4M3 = FP8[0]


def _bmm_fp8(d: Draw) -> Iterator[Call]:
    batch, m, k, n = d.size(3), d.size(5), d.choice((1, 16, 33)), d.choice((1, 7, 32))
    dtypes, dtype = d.choice(((FP8[0], FP8[0]), (FP8[0], FP8[1]), (FP8[1], FP8[0]))), d.choice(FLOATS[1:])
    arguments = {
        "A": d.dense(torch.randn(batch, m, k, generator=d.torch).to(dtypes[0])),
        "B": d.dense(torch.randn(batch, n, k, generator=d.torch).to(dtypes[1])).mT,
        "A_scale": d.dense(torch.tensor([0.5])), "B_scale": d.dense(torch.tensor([1.25])), "dtype": dtype,
        "out": d.blank(batch, m, n, dtype=dtype) if d.chance(0.4) else None, "backend": "cublas",
    }  # fmt: skip

    def expect(A: Any, B: Any, A_scale: Any, B_scale: Any, dtype: Any, out: Any, **_: Any) -> Mapping[str, Check]:  # noqa: N803
        if A.dtype not in FP8 or B.dtype not in FP8 or A.dim() != 3 or B.dim() != 3 or dtype not in FLOATS[1:]:
            raise Refused("no matrices of fp8, or no dtype for them")
        if any(scale.numel() != 1 or scale.dtype != torch.float32 for scale in (A_scale, B_scale)):
            raise Refused("no scale")
        if not (bool(A_scale.isfinite().all()) and bool(B_scale.isfinite().all())):
            raise Unspecified  # which factor comes first
        exact = A.double() @ B.double() * (A_scale.double().reshape(()) * B_scale.double().reshape(()))
        checked = near(exact, dtype)
        return {"return": checked, **({} if out is None else {"out": checked})}

    yield from d.maybe_hostile(Call("bmm_fp8", flashinfer.bmm_fp8, arguments, expect, outputs=("out",)))


# ------------------------------------------------------------------------------------------------------------- segments


def _segment_gemm(d: Draw) -> Iterator[Call]:
    lengths, d_in, d_out = d.lengths(d.size(4), 20), d.choice((1, 8, 33, 130)), d.choice((1, 7, 40))
    dtype, column_major = d.kernel(*FLOATS), d.kernel(True, False)
    num_weights, num_rows = len(lengths) + d.size(2), sum(lengths) + d.choice((0, 0, 3))
    shape = (d_out, d_in) if column_major else (d_in, d_out)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    by_lengths, chosen = d.chance(0.5), [d.random.randrange(num_weights) for _ in lengths] if num_weights else []
    arguments = {
        "x": d.normal(num_rows, d_in, dtype=dtype),
        "weights": d.normal(num_weights, *shape, dtype=dtype),
        "batch_size": len(lengths), "weight_column_major": column_major,
        "out": d.blank(num_rows, d_out, dtype=dtype) if d.chance(0.5) else None,
        "seg_lens": d.index(lengths) if by_lengths else None,
        "seg_indptr": None if by_lengths else d.index(offsets),
        "weight_indices": d.index(chosen) if d.chance(0.6) else None,
    }  # fmt: skip

    def run(**given: Any) -> Any:
        return flashinfer.SegmentGEMMWrapper(torch.empty(1)).run(**given)

    def expect(
        x: Any, weights: Any, batch_size: Any, weight_column_major: Any, out: Any, seg_lens: Any, seg_indptr: Any,
        weight_indices: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        ends = [0, *seg_lens.cumsum(0).tolist()] if seg_indptr is None else seg_indptr.tolist()
        assert batch_size == len(ends) - 1 and ends == sorted(ends) and ends[0] >= 0 and ends[-1] <= len(x)
        assert x.dtype == weights.dtype and weight_column_major in (True, False)
        _require_small(x, weights)
        indices = list(range(batch_size)) if weight_indices is None else weight_indices.tolist()
        assert all(index < len(weights) for index in indices) and len(indices) == batch_size
        if min(indices, default=0) < 0:
            raise Unspecified  # rows that are left as they are, among poison
        rows = weights if weight_column_major else weights.mT
        untouched = torch.zeros(len(x), rows.shape[1], dtype=x.dtype) if out is None else out
        exact = oracle.segments(x, rows, ends, indices, untouched)
        covered = slice(ends[0], ends[-1])  # the rest is poison, or zeros
        if out is None:
            return {"return": near(exact, x.dtype)}

        def check(actual: Any) -> None:
            near(exact[covered], x.dtype)(actual[covered])

        return {"return": check, "out": check}

    yield from d.maybe_hostile(Call("SegmentGEMMWrapper", run, arguments, lenient(expect), outputs=("out",)))


# --------------------------------------------------------------------------------------------------- scales of blocks


def _require_small(*tensors: torch.Tensor) -> None:
    """Not so large that sums in fp32 overflow, or cancel to what rounding left."""
    assert all(bool((x.abs().float() < 1e3).all()) for x in tensors)


def _blocks(size: int) -> int:
    return -(-size // oracle.BLOCK)


def _scaled_operands(d: Draw, num_weights: Optional[int]) -> dict[str, Any]:
    m, n, k = d.size(20), d.choice((1, 8, 130)), d.choice((1, 40, 128, 300))
    of_weights = () if num_weights is None else (num_weights,)
    scales = lambda *shape: d.place(torch.rand(shape, generator=d.torch) + 0.1)  # noqa: E731
    return {
        "a": d.normal(m, k, dtype=_E4M3), "b": d.normal(*of_weights, n, k, dtype=_E4M3),
        "a_scale": scales(m, _blocks(k)), "b_scale": scales(*of_weights, _blocks(n), _blocks(k)),
    }  # fmt: skip


def _output(d: Draw, m: int, n: int) -> dict[str, Any]:
    dtype = d.kernel(torch.bfloat16, torch.float16)
    return {"out": d.blank(m, n, dtype=dtype) if d.chance(0.5) else None, "out_dtype": dtype}


def _gemm_fp8_nt_groupwise(d: Draw) -> Iterator[Call]:
    arguments = _scaled_operands(d, None)
    mode = d.choice(("MN", "K"))
    if mode == "MN":
        arguments = {name: x.mT if name.endswith("scale") else x for name, x in arguments.items()}
    arguments |= {"scale_major_mode": mode, **_output(d, len(arguments["a"]), len(arguments["b"]))}

    def expect(
        a: Any, b: Any, a_scale: Any, b_scale: Any, scale_major_mode: Any, out: Any, out_dtype: Any
    ) -> Mapping[str, Check]:
        assert scale_major_mode in ("MN", "K") and a.dtype == b.dtype == _E4M3
        if scale_major_mode == "MN":
            a_scale, b_scale = a_scale.mT, b_scale.mT
        _require_small(a, b, a_scale, b_scale)
        exact = oracle.dequantized(a, a_scale) @ oracle.dequantized(b, b_scale).mT
        checked = near(exact, torch.bfloat16 if out is None and out_dtype is None else out_dtype or out.dtype)
        return {"return": checked, **({} if out is None else {"out": checked})}

    name = "gemm_fp8_nt_groupwise"
    yield from d.maybe_hostile(Call(name, getattr(gemm, name), arguments, lenient(expect), outputs=("out",)))


def _group_gemm_fp8_nt_groupwise(d: Draw) -> Iterator[Call]:
    num_groups = d.random.randint(1, 3)
    arguments = _scaled_operands(d, num_groups)
    m, n = len(arguments["a"]), arguments["b"].shape[1]
    ends = sorted(d.random.randint(0, m) for _ in range(num_groups - 1))
    arguments |= {"m_indptr": d.index([0, *ends, m]), "scale_major_mode": "K", **_output(d, m, n)}

    def expect(
        a: Any, b: Any, a_scale: Any, b_scale: Any, m_indptr: Any, scale_major_mode: Any, out: Any, out_dtype: Any
    ) -> Mapping[str, Check]:
        ends = m_indptr.tolist()
        assert scale_major_mode == "K" and a.dtype == b.dtype == _E4M3
        assert ends == sorted(ends) and ends[0] == 0 and ends[-1] == len(a) and len(ends) == len(b) + 1
        _require_small(a, b, a_scale, b_scale)
        rows = oracle.dequantized(a, a_scale)
        weights = [oracle.dequantized(b[i], b_scale[i]) for i in range(len(b))]
        exact = torch.cat([rows[ends[i] : ends[i + 1]] @ weight.mT for i, weight in enumerate(weights)])
        checked = near(exact, torch.bfloat16 if out is None and out_dtype is None else out_dtype or out.dtype)
        return {"return": checked, **({} if out is None else {"out": checked})}

    name = "group_gemm_fp8_nt_groupwise"
    yield from d.maybe_hostile(Call(name, getattr(gemm, name), arguments, lenient(expect), outputs=("out",)))


def _fp8_blockscale_gemm(d: Draw) -> Iterator[Call]:
    m, n, blocks = d.size(20), d.choice((1, 8, 130)), d.choice((1, 2, 3))
    dtype = d.kernel(torch.bfloat16, torch.float16)
    arguments = {
        "input": d.normal(m, blocks * oracle.BLOCK, dtype=dtype),
        "weight": d.normal(n, blocks * oracle.BLOCK, dtype=_E4M3),
        "weight_scale": d.place(torch.rand(_blocks(n), blocks, generator=d.torch) + 0.1), **_output(d, m, n),
    }  # fmt: skip

    def expect(input: Any, weight: Any, weight_scale: Any, out: Any, out_dtype: Any) -> Mapping[str, Check]:
        assert input.dtype in FLOATS[1:] and weight.dtype == _E4M3
        _require_small(input, weight, weight_scale)
        # As a kernel divides: a quotient halfway between two numbers of 8 bits falls to either.
        groups = input.float().unflatten(-1, (-1, oracle.BLOCK))
        scale = groups.abs().amax(-1).clamp(min=1e-30) / 448.0
        values = (groups / scale[..., None]).to(_E4M3).flatten(-2)
        exact = oracle.dequantized(values, scale) @ oracle.dequantized(weight, weight_scale).mT
        checked = near(exact, torch.bfloat16 if out is None and out_dtype is None else out_dtype or out.dtype)
        return {"return": checked, **({} if out is None else {"out": checked})}

    name = "fp8_blockscale_gemm_sm90"
    yield from d.maybe_hostile(Call(name, getattr(gemm, name), arguments, lenient(expect), outputs=("out",)))


CASES: dict[str, Case] = {
    "bmm_fp8": _bmm_fp8,
    "SegmentGEMMWrapper": _segment_gemm,
    "gemm_fp8_nt_groupwise": _gemm_fp8_nt_groupwise,
    "group_gemm_fp8_nt_groupwise": _group_gemm_fp8_nt_groupwise,
    "fp8_blockscale_gemm_sm90": _fp8_blockscale_gemm,
}
