# SPDX-License-Identifier: Apache-2.0
"""What engines import from `flashinfer.utils`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flashinfer import utils
from tests.fuzz.call import Call, Check, Refused, Wrong, equal, near
from tests.fuzz.draw import FLOATS, FP8, Draw
from tests.fuzz.table import Case
from tests.fuzz.table.indices import whole
from tests.oracles import attention as oracle


def _same(expected: Any) -> Check:
    def check(actual: Any) -> None:
        if actual != expected:
            raise Wrong(f"{actual!r}; expected {expected!r}")

    return check


def _get_indptr(d: Draw) -> Iterator[Call]:
    def expect(x: Any) -> Mapping[str, Check]:
        if x.dim() != 1 or x.is_complex():
            raise Refused("no vector of lengths")
        ends = [0]
        for length in x.tolist():
            ends.append(ends[-1] + whole("a length", length))
            if not 0 <= ends[-1] < 1 << 31 or length < 0:
                raise Refused("a length below 0, or more rows than int32 counts")
        return {"return": equal(torch.tensor(ends, dtype=torch.int32))}

    yield from d.maybe_hostile(Call("get_indptr", utils.get_indptr, {"x": d.index(d.lengths(d.size(), 9))}, expect))


def _get_alibi_slopes(d: Draw) -> Iterator[Call]:
    def expect(n_heads: Any, device: Any) -> Mapping[str, Check]:
        if not 0 < whole("n_heads", n_heads) < 1 << 20:
            raise Refused("no number of heads")
        return {"return": near(oracle.alibi_slopes(int(n_heads)), torch.float32)}

    arguments = {"n_heads": d.choice((1, 2, 3, 8, 12, 33)), "device": torch.device("cpu")}
    yield from d.maybe_hostile(Call("get_alibi_slopes", utils.get_alibi_slopes, arguments, expect))


def _counter_bytes(d: Draw) -> Iterator[Call]:
    arguments = {"batch_size": d.choice((0, 7)), "num_qo_heads": d.choice((1, 32)), "sm_count": 132}

    def expect(**sizes: Any) -> Mapping[str, Check]:
        if any(whole(name, size) < 0 for name, size in sizes.items()):
            raise Refused("a size below 0")
        return {"return": _same(0)}

    name = "get_trtllm_gen_multi_ctas_kv_counter_bytes"
    yield from d.maybe_hostile(Call(name, getattr(utils, name), arguments, expect))


def _canonicalize(d: Draw) -> Iterator[Call]:
    names = {
        "float16": torch.float16,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
        "float8_e4m3fn": torch.float8_e4m3fn,
    }

    def expect(dtype: Any) -> Mapping[str, Check]:
        if isinstance(dtype, torch.dtype):
            return {"return": _same(dtype)}
        if dtype not in names:
            raise Refused("no dtype")
        return {"return": _same(names[dtype])}

    given = d.choice((*names, torch.float32))
    yield from d.maybe_hostile(
        Call("canonicalize_torch_dtype", utils.canonicalize_torch_dtype, {"dtype": given}, expect)
    )


def _is_float8(d: Draw) -> Iterator[Call]:
    x = d.normal(2, dtype=d.choice((*FLOATS, *FP8)))
    yield from d.maybe_hostile(
        Call("is_float8", utils.is_float8, {"x": x}, lambda x: {"return": _same(x.dtype in FP8)})
    )


def _of_device(name: str, expected: Any, d: Draw) -> Iterator[Call]:
    def expect(device: Any) -> Mapping[str, Check]:
        if not isinstance(device, torch.device) or expected is None:
            raise Refused("no device, or not one of this kind")
        return {"return": _same(expected)}

    call = Call(name, getattr(utils, name), {"device": torch.device("cpu")}, expect)
    yield Call(**{**vars(call), "changes": ("a CPU",)}) if expected is None else call


def _backend(name: str, expected: Any, d: Draw) -> Iterator[Call]:
    given = {
        "pos_encoding_mode": d.choice((0, 1, 2)),
        "use_fp16_qk_reductions": d.chance(0.5),
        "use_custom_mask": d.chance(0.5),
    }
    kinds = {"dtype_q": d.choice(FLOATS), "dtype_kv": d.choice((*FLOATS, *FP8))}
    device = {"device": torch.device("cpu")} if name.startswith("determine") else {}
    covered = not (given["use_fp16_qk_reductions"] or given["use_custom_mask"] or given["pos_encoding_mode"])
    covered = covered and kinds["dtype_q"] == kinds["dtype_kv"] and kinds["dtype_q"] != torch.float32
    answer = _same(covered if expected is None else expected)
    yield Call(name, getattr(utils, name), {**device, **given, **kinds}, lambda **_: {"return": answer})


CASES: dict[str, Case] = {
    "get_indptr": _get_indptr,
    "get_alibi_slopes": _get_alibi_slopes,
    "get_trtllm_gen_multi_ctas_kv_counter_bytes": _counter_bytes,
    "canonicalize_torch_dtype": _canonicalize,
    "is_float8": _is_float8,
    "get_compute_capability": functools.partial(_of_device, "get_compute_capability", None),
    "get_device_sm_count": functools.partial(_of_device, "get_device_sm_count", None),
    "is_sm90a_supported": functools.partial(_of_device, "is_sm90a_supported", False),
    "determine_gemm_backend": functools.partial(_of_device, "determine_gemm_backend", "sm80"),
    "determine_mla_backend": functools.partial(_of_device, "determine_mla_backend", "fa2"),
    "is_fa3_backend_supported": functools.partial(_backend, "is_fa3_backend_supported", None),
    "determine_attention_backend": functools.partial(_backend, "determine_attention_backend", "fa2"),
}
