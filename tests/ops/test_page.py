# SPDX-License-Identifier: Apache-2.0
"""Appending to paged caches, positions of ragged rows, and lengths: exact, on both targets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.oracles import page as oracle


class Case(NamedTuple):
    appended: tuple[int, ...]  # rows of each request
    seq_lens: tuple[int, ...]  # length of each request after the append
    page_size: int
    num_heads: int
    head_dim: int
    padding: int = 0  # rows past the end of the batch


CASES = {
    "prefill": Case((5, 9, 3), (5, 9, 3), 4, 8, 128),
    "decode": Case((1, 1, 1, 1), (17, 16, 1, 33), 16, 8, 64),
    "page size 1": Case((2, 3), (4, 3), 1, 2, 128),
    "last page full": Case((4, 8), (8, 8), 4, 4, 64),
    "some requests empty": Case((0, 3, 0, 0, 2, 0), (0, 5, 7, 0, 2, 0), 3, 5, 32),
    "padded batch": Case((2, 1), (6, 3), 4, 7, 128, padding=9),
    "odd dimensions": Case((3, 2), (3, 4), 5, 3, 20),
    "one head": Case((6,), (11,), 8, 1, 256),
    "no rows": Case((0, 0), (3, 4), 4, 2, 64),
}


class Pages(NamedTuple):
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    append_indptr: torch.Tensor
    seq_lens: torch.Tensor
    num_pages: int


def make_pages(case: Case, device: torch.device, dtype: torch.dtype = torch.int32) -> Pages:
    """Pages in shuffled order, with unused ones between, and indices longer than needed."""
    counts = [-(-length // case.page_size) for length in case.seq_lens]
    num_used = sum(counts)
    order = torch.randperm(num_used + 3, generator=torch.Generator().manual_seed(1))
    tensor = lambda values: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    return Pages(
        indptr=tensor([0, *torch.tensor(counts).cumsum(0).tolist()]),
        indices=tensor(order.tolist()),
        last_page_len=tensor([(length - 1) % case.page_size + 1 if length else 0 for length in case.seq_lens]),
        append_indptr=tensor([0, *torch.tensor(case.appended).cumsum(0).tolist()]),
        seq_lens=tensor(case.seq_lens),
        num_pages=num_used + 3,
    )


def make_rows(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    num_rows = sum(case.appended) + case.padding
    rows = torch.randn(num_rows, case.num_heads, case.head_dim, generator=torch.Generator().manual_seed(seed))
    return rows.to(device, dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=device).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Exact comparison that treats NaN as a value."""
    return tensor.detach().cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_append(device: torch.device, name: str, kv_layout: str, index_dtype: torch.dtype) -> None:
    case = CASES[name]
    pages = make_pages(case, device, index_dtype)
    key, value = (make_rows(case, torch.bfloat16, device, seed) for seed in (2, 3))
    batch_indices, positions = flashinfer.get_batch_indices_positions(pages.append_indptr, pages.seq_lens, len(key))
    cache = poisoned((pages.num_pages, 2, case.page_size, case.num_heads, case.head_dim), torch.bfloat16, device)
    expected = [
        oracle.append(rows.cpu(), cache[:, i].cpu(), batch_indices, positions, pages.indices, pages.indptr)
        for i, rows in enumerate((key, value))
    ]
    if kv_layout == "HND":
        cache = cache.transpose(2, 3).contiguous()
    returned = flashinfer.append_paged_kv_cache(
        key, value, batch_indices, positions, cache, pages.indices, pages.indptr, pages.last_page_len, kv_layout
    )
    assert returned is None
    if kv_layout == "HND":
        cache = cache.transpose(2, 3)
    for i in range(2):
        assert torch.equal(bits(cache[:, i]), bits(expected[i]))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_append_to_a_pair_of_strided_caches(device: torch.device, dtype: torch.dtype) -> None:
    """Caches cut out of larger tensors, rows cut out of a packed qkv, at different offsets."""
    case = CASES["prefill"]
    pages = make_pages(case, device)
    qkv = torch.randn(17, 8 * 4, 128, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    key, value = qkv[:, 16:24], qkv[:, 24:]
    batch_indices, positions = flashinfer.get_batch_indices_positions(pages.append_indptr, pages.seq_lens, 17)
    wide = poisoned((pages.num_pages, case.page_size, 20, 160), dtype, device)
    k_cache, v_cache = wide[:, :, 1:9, 16:144], wide[:, :, 10:18, :128]
    expected = wide.cpu().clone()
    arguments = (batch_indices, positions, pages.indices, pages.indptr)
    expected[:, :, 1:9, 16:144] = oracle.append(key.cpu(), k_cache.cpu(), *arguments)
    expected[:, :, 10:18, :128] = oracle.append(value.cpu(), v_cache.cpu(), *arguments)
    flashinfer.append_paged_kv_cache(
        key, value, batch_indices, positions, (k_cache, v_cache), pages.indices, pages.indptr, pages.last_page_len
    )
    assert torch.equal(bits(wide), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scales", ["none", "numbers", "tensors"])
def test_append_to_an_fp8_cache(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, scales: str
) -> None:
    case = CASES["prefill"]
    pages = make_pages(case, device)
    key, value = (make_rows(case, dtype, device, seed) for seed in (2, 3))
    largest = torch.finfo(cache_dtype).max
    key[0, 0, :6] = torch.tensor([0.0, -0.0, 1e-4, 60000.0, -60000.0, 0.013]).to(dtype)
    batch_indices, positions = flashinfer.get_batch_indices_positions(pages.append_indptr, pages.seq_lens, len(key))
    # Powers of two: multiplying by the reciprocal is exact, and so the comparison is.
    k_scale, v_scale = {"none": (1.0, 1.0), "numbers": (0.5, 4.0), "tensors": (0.25, 2.0)}[scales]
    given = {
        "none": {},
        "numbers": {"k_scale": k_scale, "v_scale": v_scale},
        "tensors": {
            "k_scale": torch.tensor([k_scale], device=device),
            "v_scale": torch.tensor(v_scale, device=device),
        },
    }[scales]
    cache = torch.zeros(pages.num_pages, 2, case.page_size, case.num_heads, case.head_dim).to(device, cache_dtype)
    quantize = lambda x, scale: (x.float() / scale).clamp(-largest, largest).to(cache_dtype).float()  # noqa: E731
    for_oracle = (batch_indices, positions, pages.indices, pages.indptr)
    expected_k = oracle.append(quantize(key, k_scale).cpu(), cache[:, 0].cpu().float(), *for_oracle)
    expected_v = oracle.append(quantize(value, v_scale).cpu(), cache[:, 1].cpu().float(), *for_oracle)
    flashinfer.append_paged_kv_cache(
        key, value, batch_indices, positions, cache, pages.indices, pages.indptr, None, **given
    )
    assert torch.equal(cache[:, 0].cpu().float(), expected_k)
    assert torch.equal(cache[:, 1].cpu().float(), expected_v)


@pytest.mark.sanitizer
@pytest.mark.parametrize("which", ["both", "ckv", "kpe"])
def test_append_mla(device: torch.device, which: str) -> None:
    """Both caches are slices of one tensor, as engines keep them."""
    case = Case((3, 1, 6), (70, 64, 6), 64, 1, 512)
    pages = make_pages(case, device)
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(10, 576, generator=generator).to(device, torch.bfloat16)
    ckv, kpe = rows[:, :512], rows[:, 512:]
    batch_indices, positions = flashinfer.get_batch_indices_positions(pages.append_indptr, pages.seq_lens, 10)
    cache = poisoned((pages.num_pages, 64, 576), torch.bfloat16, device)
    expected = cache.cpu().clone()
    for name, part, piece in (("ckv", slice(0, 512), ckv), ("kpe", slice(512, 576), kpe)):
        if which in ("both", name):
            filled = oracle.append(
                piece.cpu()[:, None],
                expected[:, :, None, part],
                batch_indices,
                positions,
                pages.indices,
                pages.indptr,
            )
            expected[:, :, part] = filled[:, :, 0]
    flashinfer.append_paged_mla_kv_cache(
        ckv,
        kpe,
        batch_indices,
        positions,
        cache[..., :512] if which != "kpe" else None,
        cache[..., 512:] if which != "ckv" else None,
        pages.indices,
        pages.indptr,
        pages.last_page_len,
    )
    assert torch.equal(bits(cache), bits(expected))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_batch_indices_positions_and_seq_lens(device: torch.device, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    pages = make_pages(case, device, dtype)
    nnz = sum(case.appended) + case.padding
    out = torch.full((2, nnz), -7, dtype=torch.int32, device=device)
    first = flashinfer.get_batch_indices_positions(pages.append_indptr, pages.seq_lens, np.int64(nnz))
    got = flashinfer.get_batch_indices_positions(pages.append_indptr, pages.seq_lens, nnz)
    assert all(map(torch.equal, first, got))  # the same call to a memo, which allocates by either
    got = flashinfer.get_batch_indices_positions(pages.append_indptr, pages.seq_lens, nnz, out[0], out[1])
    assert got[0].data_ptr() == out[0].data_ptr()
    expected = oracle.batch_indices_positions(pages.append_indptr, pages.seq_lens, nnz)
    assert (got[0].tolist(), got[1].tolist()) == expected
    seq_lens = flashinfer.get_seq_lens(pages.indptr, pages.last_page_len, case.page_size)
    assert seq_lens.dtype == torch.int32 and seq_lens.tolist() == list(case.seq_lens)


def test_index_dtypes_may_differ(device: torch.device) -> None:
    indptr = torch.tensor([0, 2, 5], dtype=torch.int64, device=device)
    seq_lens = torch.tensor([2, 9], dtype=torch.int32, device=device)
    batch_indices, positions = flashinfer.get_batch_indices_positions(indptr, seq_lens, 5)
    assert batch_indices.tolist() == [0, 0, 1, 1, 1] and positions.tolist() == [0, 1, 6, 7, 8]


def test_many_requests(device: torch.device) -> None:
    lengths = torch.randint(0, 5, (3000,), generator=torch.Generator().manual_seed(0))
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    batch_indices, positions = flashinfer.get_batch_indices_positions(
        indptr, lengths.to(device) + 10, int(lengths.sum())
    )
    assert torch.equal(batch_indices.cpu(), torch.repeat_interleave(torch.arange(3000), lengths).int())
    expected = torch.arange(int(lengths.sum())) - indptr[:-1].cpu()[batch_indices.cpu().long()] + 10
    assert torch.equal(positions.cpu(), expected.int())


def test_errors_name_the_argument(device: torch.device) -> None:
    case = CASES["prefill"]
    pages = make_pages(case, device)
    key = make_rows(case, torch.bfloat16, device, 0)
    batch_indices, positions = flashinfer.get_batch_indices_positions(pages.append_indptr, pages.seq_lens, 17)
    cache = torch.zeros(pages.num_pages, 2, 4, 8, 128, dtype=torch.bfloat16, device=device)

    def append(**changed: object) -> None:
        arguments = {
            "append_key": key,
            "append_value": key,
            "batch_indices": batch_indices,
            "positions": positions,
            "paged_kv_cache": cache,
            "kv_indices": pages.indices,
            "kv_indptr": pages.indptr,
            "kv_last_page_len": pages.last_page_len,
        }
        flashinfer.append_paged_kv_cache(**{**arguments, **changed})

    append()
    with pytest.raises(ValueError, match=r"kv_layout is 'NDH'; expected 'NHD' or 'HND'"):
        append(kv_layout="NDH")
    with pytest.raises(ValueError, match=r"expected \[pages, 2, .*\], K and V on dim 1, or a pair \(k, v\)"):
        append(paged_kv_cache=cache[:, 0])
    with pytest.raises(ValueError, match=r"paged_kv_cache dim 4 \(head_dim\) is 64, the rows have 128"):
        append(paged_kv_cache=cache[..., :64])
    with pytest.raises(ValueError, match=r"batch_indices has shape \[16\]; expected \[17\]"):
        append(batch_indices=batch_indices[:16])
    with pytest.raises(ValueError, match=r"positions is torch.int64; expected torch.int32, the dtype of batch_indices"):
        append(positions=positions.long())
    with pytest.raises(ValueError, match=r"kv_indptr is torch.float32; expected torch.int32 or torch.int64"):
        append(kv_indptr=pages.indptr.float())
    with pytest.raises(UnsupportedConfig, match=r"rows are bf16 and the cache is fp16; expected the same dtype"):
        append(paged_kv_cache=cache.half())
    with pytest.raises(ValueError, match=r"k_scale is given, but rows and cache are both torch.bfloat16"):
        append(k_scale=0.5)
    with pytest.raises(ValueError, match=r"ckv_cache and kpe_cache are both None"):
        flashinfer.append_paged_mla_kv_cache(
            key[:, 0], key[:, 0], batch_indices, positions, None, None, pages.indices, pages.indptr, None
        )


@pytest.mark.gpu
def test_cuda_graph_replayed_with_fewer_rows() -> None:
    device = torch.device("cuda")
    case = CASES["padded batch"]
    pages = make_pages(case, device)
    key = make_rows(case, torch.bfloat16, device, 0)
    cache = poisoned((pages.num_pages, 2, case.page_size, case.num_heads, case.head_dim), torch.bfloat16, device)
    append_indptr = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)

    def step() -> None:
        seq_lens = flashinfer.get_seq_lens(pages.indptr, pages.last_page_len, case.page_size)
        batch_indices, positions = flashinfer.get_batch_indices_positions(append_indptr, seq_lens, len(key))
        flashinfer.append_paged_kv_cache(
            key, key, batch_indices, positions, cache, pages.indices, pages.indptr, pages.last_page_len
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    append_indptr.copy_(pages.append_indptr)
    cache.fill_(float("nan"))
    graph.replay()
    batch_indices, positions = flashinfer.get_batch_indices_positions(pages.append_indptr, pages.seq_lens, len(key))
    empty = torch.full_like(cache[:, 0].cpu(), float("nan"))
    expected = oracle.append(key.cpu(), empty, batch_indices, positions, pages.indices, pages.indptr)
    assert torch.equal(bits(cache[:, 0]), bits(expected)) and torch.equal(bits(cache[:, 1]), bits(expected))
