# SPDX-License-Identifier: Apache-2.0
"""Calls on a GPU, by Python's operators and through the C interface, on the same tensors and workspaces.

What they launch is compared on GPUs that are not there (launches.py), and on one what they compute (test_gpu.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import flashinfer
from flashinfer.attention.decode import single as decode_single
from flashinfer.attention.prefill import single as prefill_single
from tests.cpp.kit import (
    Kernels,
    MlaShape,
    RopeOptions,
    SampleOptions,
    Shape,
    Workspace,
    options,
    page_table,
    tensor,
)

BF16, FP8, FP32, INT32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32
CODES = {BF16: 2, FP8: 3, torch.float16: 1}
EPS = ctypes.c_float(1e-6)
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """Both calls return their results, of which those in place are operands too."""

    name: str
    by_python: Callable[[], Tensors]
    by_cpp: Callable[[Kernels], Tensors]
    in_place: Tensors = ()


def draw(shape: tuple[int, ...]) -> torch.Tensor:
    """Of what rows are made; launches.py has none that takes time."""
    return torch.randn(shape, device="cuda")


def rows(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return draw(shape).to(dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=INT32, device="cuda")


def empty_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.zeros(tuple(x.shape), dtype=dtype or x.dtype, device="cuda")


def cases() -> Iterator[Case]:
    for hidden, offset in ((4096, 0), (128, 0), (128, 1)):
        yield rmsnorm_case(hidden, offset)
    yield fused_add_case()
    for num_heads, dim, dtype in ((8, 128, BF16), (1, 64, BF16), (2, 128, FP8)):
        yield append_case(num_heads, dim, dtype)
    for dim, rotary in ((128, 128), (96, 96), (128, 64)):
        yield rope_case(dim, rotary)
    for num_rows, vocab in ((1, 128256), (64, 128256), (512, 32000), (3, 1000)):
        for filter in ("top_p", "none"):
            yield sample_case(num_rows, vocab, filter)
    yield sample_rows_case()
    for name, case in DECODES.items():
        yield decode_case(f"decode, {name}", **case)
    for kv_len in (100, 5000, 100000):
        yield single_decode_case(kv_len)
    for name, case in PREFILLS.items():
        yield (ragged_case if case.pop("ragged", False) else prefill_case)(f"prefill, {name}", **case)
    for qo_len, kv_len in ((4096, 4096), (16, 8192), (4, 100)):
        yield single_prefill_case(qo_len, kv_len)
    for name, case in MLAS.items():
        yield mla_case(f"mla, {name}", **case)


# --------------------------------------------------------------------------------------------------------- elementwise


def rmsnorm_case(hidden: int, offset: int) -> Case:
    packed, weight = rows(3, 5, hidden + 8), rows(hidden)
    x, out = packed[:, :4, offset : offset + hidden], rows(3, 4, hidden)

    def by_cpp(kernels: Kernels) -> Tensors:
        kernels.rmsnorm(x, weight, out, EPS, 0)
        return (out,)

    return Case(f"rmsnorm {hidden} +{offset}", lambda: (flashinfer.rmsnorm(x, weight, out=out),), by_cpp)


def fused_add_case() -> Case:
    x, residual, weight = rows(70, 4096), rows(70, 4096), rows(4096)

    def by_python() -> Tensors:
        flashinfer.fused_add_rmsnorm(x, residual, weight)
        return x, residual

    def by_cpp(kernels: Kernels) -> Tensors:
        kernels.fused_add_rmsnorm(x, residual, weight, EPS, 0)
        return x, residual

    return Case("fused_add_rmsnorm", by_python, by_cpp, (x, residual))


def append_case(num_heads: int, dim: int, dtype: torch.dtype) -> Case:
    """45 tokens of each of two requests, alternating, over pages of 16."""
    indptr, indices, last = ints(0, 3, 6), ints(5, 0, 3, 1, 2, 4), ints(13, 13)
    key, value = rows(90, num_heads, dim), rows(90, num_heads, dim)
    batch, positions = ints(*(i % 2 for i in range(90))), ints(*(i // 2 for i in range(90)))
    cache = rows(6, 2, 16, num_heads, dim, dtype=dtype)
    scales = {"k_scale": 0.5, "v_scale": 2.0} if dtype is FP8 else {}
    numbers = [ctypes.c_float(x) for x in scales.values()] or [ctypes.c_float(1)] * 2

    def by_python() -> Tensors:
        flashinfer.append_paged_kv_cache(key, value, batch, positions, cache, indices, indptr, last, **scales)
        return (cache,)

    def by_cpp(kernels: Kernels) -> Tensors:
        table = page_table(indptr, indices, last)
        kernels.append(key, value, batch, positions, cache[:, 0], cache[:, 1], table, *numbers)
        return (cache,)

    return Case(f"append {num_heads} x {dim} {dtype}", by_python, by_cpp, (cache,))


def rope_case(dim: int, rotary: int) -> Case:
    q, k, positions = rows(50, 32, dim), rows(50, 8, dim), ints(*(i * 2657 for i in range(50)))

    def by_python() -> Tensors:
        flashinfer.apply_rope_pos_ids_inplace(q, k, positions, rotary_dim=rotary, rope_theta=5e5)
        return q, k

    def by_cpp(kernels: Kernels) -> Tensors:
        kernels.rope(q, k, positions, q, k, RopeOptions(rotary, 0, 1.0, 5e5, 1.0, 4.0, 0))
        return q, k

    return Case(f"rope {rotary} of {dim}", by_python, by_cpp, (q, k))


def sample_case(num_rows: int, vocab: int, filter: str) -> Case:
    """Of probabilities under top-p, or of logits without a filter."""
    scores, out = rows(num_rows, vocab, dtype=FP32), ints(*[0] * num_rows)
    if filter == "top_p":
        scores = (scores * 4).softmax(-1)

    def by_python() -> Tensors:
        if filter == "top_p":
            return (flashinfer.sampling.top_p_sampling_from_probs(scores, 0.875, seed=7, offset=8),)
        return (flashinfer.sampling.sampling_from_logits(scores, seed=7, offset=8),)

    def by_cpp(kernels: Kernels) -> Tensors:
        is_top_p = filter == "top_p"
        kernels.sample(scores, out, SampleOptions(not is_top_p, 0, 0.875 if is_top_p else 1.0, 0.0, 0, 7, 8))
        return (out,)

    return Case(f"sample {filter} of {num_rows} x {vocab}", by_python, by_cpp)


def sample_rows_case() -> Case:
    """Of chosen rows of bf16 logits, by top-k and what top-p leaves of it."""
    logits, indices, out = rows(9, 32000), ints(8, 2, 2), ints(0, 0, 0)

    def by_python() -> Tensors:
        sampler = flashinfer.sampling.top_k_top_p_sampling_from_logits
        return (sampler(logits, 40, 0.75, indices=indices, seed=7, offset=8),)

    def by_cpp(kernels: Kernels) -> Tensors:
        chosen = ctypes.pointer(tensor(indices))
        kernels.sample(logits, out, SampleOptions(1, 40, 0.75, 0.0, 1, 7, 8, chosen))
        return (out,)

    return Case("sample of chosen rows", by_python, by_cpp)


# ----------------------------------------------------------------------------------------------------------- attention

DECODES: dict[str, dict[str, Any]] = {
    "8 of 32 heads": {},
    "groups of 12": {"heads": (24, 2)},
    "head_dim 256, page_size 1": {"dim": 256, "page": 1, "heads": (16, 8)},
    "fp8 cache with a scale, window": {"kv": FP8, "given": {"window_left": 100}, "scale": 0.5},
    "soft cap": {"given": {"logits_soft_cap": 30.0, "sm_scale": 0.1}},
    "a large batch": {"batch": 200},
}
PREFILLS: dict[str, dict[str, Any]] = {
    "4 x 512": {},
    "16 queries each": {"qo_len": 16},
    "long": {"qo_len": 8192, "kv_len": 8192, "batch": 2},
    "page_size 1, no mask": {"page": 1, "causal": False},
    "page_size 12": {"page": 12},
    "fp8 cache": {"kv": FP8, "scale": 0.5},
    "window, soft cap": {"given": {"window_left": 64, "logits_soft_cap": 20.0}},
    "head_dim 64": {"dim": 64},
    "ragged": {"ragged": True},
    "ragged, no mask": {"ragged": True, "causal": False, "heads": (8, 8)},
}
MLAS: dict[str, dict[str, Any]] = {
    "decode of 128 heads": {},
    "decode of 16 heads": {"num_heads": 16},
    "page_size 1": {"page": 1},
    "prefill": {"qo_len": 64},
    "fp8": {"kv": FP8, "scale": 0.5},
}


def workspaces(wrapper: Any) -> Workspace:
    """Those of a wrapper of Python's."""
    sizes = [(x.data_ptr(), x.numel() * x.element_size()) for x in _buffers(wrapper)]
    return Workspace(*sizes[0], *sizes[1])


def _buffers(wrapper: Any) -> Tensors:
    return wrapper._int_workspace_buffer, wrapper._float_workspace_buffer


def _workspace() -> torch.Tensor:
    return torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")


def _tables(batch: int, page: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Pages from the last to the first."""
    each = -(-kv_len // page)
    indptr, last = ints(*(each * i for i in range(batch + 1))), ints(*[(kv_len - 1) % page + 1] * batch)
    return indptr, ints(*range(each * batch - 1, -1, -1)), last, each * batch


def _shape(heads: tuple[int, int], dim: int, page: int, kv: torch.dtype) -> Shape:
    return Shape(*heads, dim, 0, page, CODES[BF16], CODES[kv], CODES[BF16])


def decode_case(
    name: str,
    heads: tuple[int, int] = (32, 8),
    dim: int = 128,
    page: int = 16,
    batch: int = 5,
    kv: torch.dtype = BF16,
    scale: float = 1.0,
    given: dict[str, Any] | None = None,
) -> Case:
    chosen = given or {}
    indptr, indices, last, num_pages = _tables(batch, page, 140)
    q, cache = rows(batch, heads[0], dim), rows(num_pages, 2, page, heads[1], dim, dtype=kv)
    out, lse = empty_like(q), rows(batch, heads[0], dtype=FP32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace())

    def by_python() -> Tensors:
        wrapper.plan(indptr, indices, last, *heads, dim, page, q_data_type=BF16, kv_data_type=kv, **chosen)
        for _ in range(2):  # the second may read its plan ahead of the kernel before it
            wrapper.run(q, cache, k_scale=scale, v_scale=scale, out=out, lse=lse, return_lse=True)
        return out, lse

    def by_cpp(kernels: Kernels) -> Tensors:
        made = kernels.make("batch_decode", workspaces(wrapper))
        how = options(k_scale=scale, v_scale=scale, **chosen)
        made.plan(page_table(indptr, indices, last), _shape(heads, dim, page, kv), how)
        for _ in range(2):
            made.run(q, cache[:, 0], cache[:, 1], out, lse)
        return out, lse

    return Case(name, by_python, by_cpp)


def single_decode_case(kv_len: int) -> Case:
    q, k, v, out = rows(32, 128), rows(kv_len, 8, 128), rows(kv_len, 8, 128), rows(32, 128)

    def by_python() -> Tensors:
        decode_single._scratches.clear()
        decode_single._singles = type(decode_single._singles)()
        return (flashinfer.single_decode_with_kv_cache(q, k, v),)

    def by_cpp(kernels: Kernels) -> Tensors:
        workspace = Workspace()
        if decode_single._scratches:
            ((counters, partials),) = decode_single._scratches.values()
            sizes = (counters.numel() * 4 + 512, partials.numel() + 512)  # regions begin at multiples of 256
            workspace = Workspace(counters.data_ptr(), sizes[0], partials.data_ptr(), sizes[1])
        kernels.single_decode(workspace, q, k, v, out, options())
        return (out,)

    return Case(f"single decode of {kv_len}", by_python, by_cpp)


def prefill_case(
    name: str,
    heads: tuple[int, int] = (32, 8),
    dim: int = 128,
    page: int = 16,
    batch: int = 4,
    qo_len: int = 512,
    kv_len: int = 1024,
    kv: torch.dtype = BF16,
    scale: float = 1.0,
    causal: bool = True,
    given: dict[str, Any] | None = None,
) -> Case:
    chosen, num_tokens = given or {}, batch * qo_len
    qo_indptr = ints(*(qo_len * i for i in range(batch + 1)))
    indptr, indices, last, num_pages = _tables(batch, page, kv_len)
    q, cache = rows(num_tokens, heads[0], dim), rows(num_pages, 2, page, heads[1], dim, dtype=kv)
    out, lse = empty_like(q), rows(num_tokens, heads[0], dtype=FP32)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace())

    def by_python() -> Tensors:
        wrapper.plan(
            qo_indptr, indptr, indices, last, *heads, dim, page, causal=causal, q_data_type=BF16, kv_data_type=kv,
            **chosen,
        )  # fmt: skip
        wrapper.run(q, cache, k_scale=scale, v_scale=scale, out=out, lse=lse, return_lse=True)
        return out, lse

    def by_cpp(kernels: Kernels) -> Tensors:
        made = kernels.make("batch_prefill", workspaces(wrapper))
        how = options(is_causal=causal, k_scale=scale, v_scale=scale, **chosen)
        made.plan(qo_indptr, num_tokens, page_table(indptr, indices, last), _shape(heads, dim, page, kv), how)
        made.run(q, cache[:, 0], cache[:, 1], out, lse)
        return out, lse

    return Case(name, by_python, by_cpp)


def ragged_case(name: str, heads: tuple[int, int] = (32, 8), causal: bool = True) -> Case:
    batch, qo_len, kv_len, dim = 4, 512, 1024, 128
    qo_indptr, kv_indptr = (ints(*(length * i for i in range(batch + 1))) for length in (qo_len, kv_len))
    q, k, v = rows(batch * qo_len, heads[0], dim), *(rows(batch * kv_len, heads[1], dim) for _ in "kv")
    out, lse = empty_like(q), rows(batch * qo_len, heads[0], dtype=FP32)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace())

    def by_python() -> Tensors:
        wrapper.plan(qo_indptr, kv_indptr, *heads, dim, causal=causal, q_data_type=BF16)
        wrapper.run(q, k, v, out=out, lse=lse, return_lse=True)
        return out, lse

    def by_cpp(kernels: Kernels) -> Tensors:
        made = kernels.make("batch_prefill", workspaces(wrapper))
        made.plan_ragged(qo_indptr, batch * qo_len, kv_indptr, _shape(heads, dim, 1, BF16), options(is_causal=causal))
        made.run_ragged(q, k, v, out, lse)
        return out, lse

    return Case(name, by_python, by_cpp)


def single_prefill_case(qo_len: int, kv_len: int) -> Case:
    q, k, v, out = rows(qo_len, 32, 128), rows(kv_len, 8, 128), rows(kv_len, 8, 128), rows(qo_len, 32, 128)

    def by_python() -> Tensors:
        prefill_single._schedules.clear()
        prefill_single._singles = type(prefill_single._singles)()
        return (flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True),)

    def by_cpp(kernels: Kernels) -> Tensors:
        workspace = Workspace()
        if prefill_single._schedules:
            (schedule,) = prefill_single._schedules.values()
            own, whole = schedule.workspaces
            workspace = Workspace(own.data_ptr(), own.numel(), whole.data_ptr(), whole.numel())
        kernels.single_prefill(workspace, q, k, v, out, options(is_causal=1))
        return (out,)

    return Case(f"single prefill of {qo_len} on {kv_len}", by_python, by_cpp)


def mla_case(
    name: str,
    num_heads: int = 128,
    page: int = 64,
    batch: int = 4,
    qo_len: int = 1,
    kv: torch.dtype = BF16,
    scale: float = 1.0,
) -> Case:
    num_tokens = batch * qo_len
    qo_indptr, lens = ints(*(qo_len * i for i in range(batch + 1))), ints(*[1000] * batch)
    indptr, indices, _, num_pages = _tables(batch, page, 1000)
    q_nope, q_pe = rows(num_tokens, num_heads, 512), rows(num_tokens, num_heads, 64)
    ckv, kpe = rows(num_pages, page, 576, dtype=kv).split((512, 64), dim=-1)
    out, lse = empty_like(q_nope), rows(num_tokens, num_heads, dtype=FP32)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(_workspace())

    def by_python() -> Tensors:
        wrapper.plan(qo_indptr, indptr, indices, lens, num_heads, 512, 64, page, True, 0.1, BF16, kv)
        wrapper.run(q_nope, q_pe, ckv, kpe, out=out, lse=lse, return_lse=True, ckv_scale=scale)
        return out, lse

    def by_cpp(kernels: Kernels) -> Tensors:
        made = kernels.make("mla", workspaces(wrapper))
        shape = MlaShape(num_heads, 512, 64, page, CODES[BF16], CODES[kv])
        made.plan(qo_indptr, num_tokens, page_table(indptr, indices, lens), shape, 1, 0.1, scale)
        made.run(q_nope, q_pe, ckv, kpe, out, lse)
        return out, lse

    return Case(name, by_python, by_cpp)
