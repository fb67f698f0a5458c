# SPDX-License-Identifier: Apache-2.0
"""The C++ headers on the CPU, through the C interface: the same kernels give the same bits as Python's operators."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

import flashinfer
from flashinfer import target
from flashinfer.families.norm import RMSNORM
from flashinfer.families.page import APPEND_PAGED_KV
from flashinfer.families.rope import ROPE
from flashinfer.families.sampling import SAMPLE_ROW
from tests.cpp.kit import Api, CError, Kernels, RopeOptions, SampleOptions, page_table, tensor, write_set

HOST = target.host()
HIDDEN, HEADS, DIM, VOCAB = 48, 4, 32, 100


def rmsnorm_spec(dtype: str, hidden_size: int = HIDDEN, **axes: bool) -> flashinfer.jit.KernelSpec:
    vec_size = 4 if dtype == "fp32" else 8
    chosen = {"add_residual": False, "gemma": False, **axes}
    return RMSNORM.spec(HOST, dtype=dtype, hidden_size=hidden_size, vec_size=vec_size, **chosen)


def sample_spec(input: str, filter: str) -> flashinfer.jit.KernelSpec:
    return SAMPLE_ROW.spec(HOST, dtype="fp32", input=input, filter=filter, cluster_size=1, row_kib=0)


APPEND = {
    **{"key_dim": DIM, "value_dim": DIM, "token_index": "int32", "page_index": "int32"},
    **{"vec_size": 1, "heads_per_thread": 1},
}
ROTARY = {
    **{"dtype": "bf16", "head_dim": DIM, "cos_sin": "computed", "position_index": "int32", "vec_size": 1},
    "ragged": False,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    specs = [
        rmsnorm_spec("fp32"),
        rmsnorm_spec("bf16"),
        rmsnorm_spec("bf16", add_residual=True, gemma=True),
        APPEND_PAGED_KV.spec(HOST, dtype="fp32", cache_dtype="fp32", **APPEND),
        APPEND_PAGED_KV.spec(HOST, dtype="fp32", cache_dtype="fp8_e4m3", **APPEND),
        ROPE.spec(HOST, **ROTARY, rotary_dim=DIM, interleave=False, rotary_part_only=False),
        ROPE.spec(HOST, **ROTARY, rotary_dim=16, interleave=True, rotary_part_only=True),
        sample_spec("probs", "top_p"),
        sample_spec("logits", "top_k_top_p"),
        sample_spec("probs", "min_p"),
        sample_spec("logits", "none"),
    ]
    return write_set(tmp_path_factory.mktemp("set"), specs)


@pytest.fixture(scope="module")
def kernels(api: Api, root: Path) -> Kernels:
    return api.open([root])


def test_target(kernels: Kernels) -> None:
    assert kernels.target == HOST


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_rmsnorm(dtype: torch.dtype, kernels: Kernels) -> None:
    """Of heads cut out of a packed projection: rows in groups."""
    packed, weight = torch.randn(3, 5, HIDDEN + 16).to(dtype), torch.randn(HIDDEN).to(dtype)
    x, out = packed[:, :4, :HIDDEN], torch.full((3, 4, HIDDEN), math.nan, dtype=dtype)
    kernels.rmsnorm(x, weight, out, _float(1e-5), 0)
    assert torch.equal(out, flashinfer.rmsnorm(x, weight, 1e-5))


def test_fused_add_rmsnorm(kernels: Kernels) -> None:
    x, residual, weight = (torch.randn(*shape).bfloat16() for shape in ((7, HIDDEN), (7, HIDDEN), (HIDDEN,)))
    expected = x.clone(), residual.clone()
    flashinfer.gemma_fused_add_rmsnorm(*expected, weight)
    kernels.fused_add_rmsnorm(x, residual, weight, _float(1e-6), 1)
    assert torch.equal(x, expected[0]) and torch.equal(residual, expected[1])


@pytest.mark.parametrize("cache_dtype", (torch.float32, torch.float8_e4m3fn), ids=("same", "fp8"))
@pytest.mark.parametrize("layout", ("NHD", "HND"))
def test_append(cache_dtype: torch.dtype, layout: str, kernels: Kernels) -> None:
    page_size, num_pages = 4, 6
    key, value = torch.randn(5, HEADS, DIM), torch.randn(5, HEADS, DIM)
    batch_indices, positions = _int([0, 0, 1, 1, -1]), _int([3, 4, 0, 7, 0])
    indptr, indices, last = _int([0, 2, 4]), _int([5, 0, 3, 1]), _int([1, 4])
    shape = (num_pages, page_size, HEADS, DIM) if layout == "NHD" else (num_pages, HEADS, page_size, DIM)
    scales = (0.5, 2.0) if cache_dtype != torch.float32 else (1.0, 1.0)
    caches = tuple(torch.zeros(shape).to(cache_dtype) for _ in range(4))
    given = dict(zip(("k_scale", "v_scale"), scales)) if cache_dtype != torch.float32 else {}
    flashinfer.append_paged_kv_cache(
        key, value, batch_indices, positions, caches[2:], indices, indptr, last, layout, **given
    )
    k, v = caches[:2] if layout == "NHD" else (cache.transpose(1, 2) for cache in caches[:2])
    table = page_table(indptr, indices, last)
    kernels.append(key, value, batch_indices, positions, k, v, table, *map(_float, scales))
    for found, expected in zip(caches[:2], caches[2:]):
        assert torch.equal(found.float(), expected.float()) and found.float().any()


INT32_MAX, INT64_MAX = (1 << 31) - 1, (1 << 63) - 1
# Two requests, of pages [3, 0] and [2], over a cache of 4 pages of 4 slots: what one changed entry makes of it.
LEADS_OUTSIDE: dict[str, tuple[dict[str, list[int]], str]] = {
    "a request past the last": ({"batch_indices": [0, 2]}, r"batch_indices\[1\] is 2; expected below 2"),
    "the largest request": ({"batch_indices": [0, INT64_MAX]}, r"batch_indices\[1\] is 9223372036854775807"),
    "a position past its pages": ({"positions": [8, 0]}, r"positions\[0\] is 8; request 0 has 2 pages of 4"),
    "the largest position": ({"positions": [0, INT64_MAX]}, r"positions\[1\] is 9223372036854775807; request 1"),
    "a page past the cache": ({"indices": [3, 4, 2]}, r"indices\[1\] is 4; expected below 4.*position 5 of request 0"),
    "the largest page": ({"indices": [3, 0, INT64_MAX]}, r"indices\[2\] is 9223372036854775807"),
    "offsets past the pages": ({"indptr": [0, 2, 4]}, r"indptr ends at 4; expected at most 3"),
    "offsets that descend": ({"indptr": [0, 3, 2]}, r"indptr\[2\] is 2; expected 3 or more"),
    "offsets below 0": ({"indptr": [-1, 2, 3]}, r"indptr\[0\] is -1; expected 0 or more"),
}


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=("int32", "int64"))
@pytest.mark.parametrize("case", LEADS_OUTSIDE)
def test_append_that_leads_outside(case: str, dtype: torch.dtype, kernels: Kernels) -> None:
    """An error as in Python, before any row is written, whichever row it is of."""
    changed, message = LEADS_OUTSIDE[case]
    given = {"batch_indices": [0, 1], "positions": [5, 0], "indices": [3, 0, 2], "indptr": [0, 2, 3], **changed}
    if dtype == torch.int32 and any(INT64_MAX in values for values in given.values()):
        given = {name: [min(value, INT32_MAX) for value in values] for name, values in given.items()}
        message = message.replace(str(INT64_MAX), str(INT32_MAX))
    request, position, indices, indptr = (
        torch.tensor(given[name], dtype=dtype) for name in ("batch_indices", "positions", "indices", "indptr")
    )
    key, caches = torch.ones(2, HEADS, DIM), torch.zeros(2, 4, 4, HEADS, DIM)
    with pytest.raises((IndexError, ValueError)):
        flashinfer.append_paged_kv_cache(key, key, request, position, tuple(caches), indices, indptr, None)
    with pytest.raises(CError, match=message):
        table = page_table(indptr, indices, _int([1, 1]))
        kernels.append(key, key, request, position, *caches, table, _float(1), _float(1))
    assert not caches.any()


@pytest.mark.parametrize("padding", ("batch_indices", "positions", "indices"))
def test_append_skips_padding(padding: str, kernels: Kernels) -> None:
    """A negative number marks it; the other row is written, and entries that no row leads to may hold anything."""
    given = {"batch_indices": [0, 1], "positions": [0, 1], "indices": [3, INT32_MAX, 2], "indptr": [0, 2, 3]}
    given[padding][0] = -1
    request, position, indices, indptr = map(_int, given.values())
    key, caches, table = (
        torch.ones(2, HEADS, DIM),
        torch.zeros(2, 4, 4, HEADS, DIM),
        page_table(indptr, indices, indptr),
    )
    kernels.append(key, key, request, position, *caches, table, _float(1), _float(1))
    assert caches[:, 2, 1].eq(1).all() and caches.sum() == 2 * HEADS * DIM


def test_rope(kernels: Kernels) -> None:
    q, k, positions = (
        torch.randn(6, HEADS, DIM).bfloat16(),
        torch.randn(6, 2, DIM).bfloat16(),
        _int([0, 1, 7, 131071, 5, 2]),
    )
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    llama = RopeOptions(0, 0, 8.0, 5e5, 1.0, 4.0, 8192)
    kernels.rope(q, k, positions, q_out, k_out, llama)
    expected = flashinfer.apply_llama31_rope_pos_ids(q, k, positions)
    assert torch.equal(q_out, expected[0]) and torch.equal(k_out, expected[1])


def test_rope_in_place(kernels: Kernels) -> None:
    """Of the first dimensions of a head alone, pairs side by side."""
    q, k, positions = (
        torch.randn(6, HEADS, DIM).bfloat16(),
        torch.randn(6, 2, DIM).bfloat16(),
        _int([0, 1, 7, 99, 5, 2]),
    )
    expected = q.clone(), k.clone()
    flashinfer.apply_rope_pos_ids_inplace(*expected, positions, rotary_dim=16, interleave=True, rope_theta=1e6)
    kernels.rope(q, k, positions, q, k, RopeOptions(16, 1, 1.0, 1e6, 1.0, 4.0, 0))
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


@pytest.mark.parametrize("case", ("top_p", "top_k_top_p", "min_p", "none"))
def test_sample(case: str, kernels: Kernels) -> None:
    logits = torch.randn(32, VOCAB) * 3
    probs, words, out = logits.softmax(-1), {"seed": 1234, "offset": 40}, torch.full((32,), -1, dtype=torch.int32)
    state = (words["seed"], words["offset"])
    if case == "top_p":
        expected = flashinfer.sampling.top_p_sampling_from_probs(probs, 0.8, **words)
        kernels.sample(probs, out, SampleOptions(0, 0, 0.8, 0.0, 0, *state))
    elif case == "top_k_top_p":
        expected = flashinfer.sampling.top_k_top_p_sampling_from_logits(logits, 10, 0.9, **words)
        kernels.sample(logits, out, SampleOptions(1, 10, 0.9, 0.0, 1, *state))
    elif case == "min_p":
        expected = flashinfer.sampling.min_p_sampling_from_probs(probs, 0.1, **words)
        kernels.sample(probs, out, SampleOptions(0, 0, 1.0, 0.1, 0, *state))
    else:
        expected = flashinfer.sampling.sampling_from_logits(logits, **words)
        kernels.sample(logits, out, SampleOptions(1, 0, 1.0, 0.0, 0, *state))
    assert torch.equal(out, expected) and len(set(out.tolist())) > 4


def test_sample_of_chosen_rows(kernels: Kernels) -> None:
    probs, out = torch.eye(8, VOCAB), torch.full((3,), -1, dtype=torch.int32)
    chosen, wrong = _int([5, 0, 5]), _int([5, 0, 8])
    kernels.sample(probs, out, SampleOptions(0, 0, 0.5, 0.0, 0, 1, 0, ctypes.pointer(tensor(chosen))))
    assert out.tolist() == [5, 0, 5]
    with pytest.raises(CError, match=r"row_indices\[2\] is 8; expected 0 to 7"):
        kernels.sample(probs, out, SampleOptions(0, 0, 0.5, 0.0, 0, 1, 0, ctypes.pointer(tensor(wrong))))


def _float(value: float) -> ctypes.c_float:
    return ctypes.c_float(value)


def _int(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
