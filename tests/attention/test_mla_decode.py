# SPDX-License-Identifier: Apache-2.0
"""Decode by latent attention behind the arguments of upstream 0.2.5: q_pe is turned on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashinfer.decode import BatchDecodeMlaWithPagedKVCacheWrapper
from flashinfer.errors import UnsupportedConfig
from tests.attention.mla_kit import DEEPSEEK_SCALE, Batch, Case, check, expect, make_batch
from tests.attention.prefill_kit import E4M3, FP16
from tests.oracles import rope


def make(device: torch.device, **options: Any) -> BatchDecodeMlaWithPagedKVCacheWrapper:
    size = (128 << 20) if device.type == "cuda" else 8
    return BatchDecodeMlaWithPagedKVCacheWrapper(torch.empty(size, dtype=torch.uint8, device=device), **options)


def last_page_len(case: Case) -> Tensor:
    return torch.tensor([(n - 1) % case.page_size + 1 for n in case.kv_lens], dtype=torch.int32)


def plan(wrapper: BatchDecodeMlaWithPagedKVCacheWrapper, batch: Batch, **options: Any) -> None:
    case = batch.case
    given = {"data_type": case.kv_dtype or case.q_dtype, "q_data_type": case.q_dtype, **options}
    index = (*batch.indices[1:3], last_page_len(case))
    wrapper.plan(*index, case.num_heads, case.dims[0], case.page_size, case.sm_scale, **given)


def expect_turned(
    batch: Batch, rope_scale: float = 1.0, rope_theta: float = 1e4, cache_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    positions = torch.tensor(batch.case.kv_lens) - 1
    angles = rope.angles_of(positions, rope.frequencies(64, rope_scale, rope_theta))
    q_pe = rope.rotate(batch.q[1], angles, interleave=True).to(batch.case.q_dtype)  # rounded between the kernels
    return expect(replace(batch, q=(batch.q[0].cpu(), q_pe)), cache_scale)


@pytest.mark.parametrize(
    "case",
    [
        Case("decode"),
        Case("heads_128_page_1", num_heads=128, page_size=1),
        Case("fp16_page_3", q_dtype=FP16, page_size=3),
        Case("no_kv", kv_lens=(0, 70, 0, 1)),
        Case("fp8", kv_dtype=E4M3),
        Case("empty_batch", qo_lens=(), kv_lens=()),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("rotation", [{}, {"rope_scale": 4.0, "rope_theta": 5e5}], ids=["plain", "scaled"])
def test_against_the_oracle(device: torch.device, case: Case, rotation: dict[str, float]) -> None:
    batch = make_batch(case, device)
    wrapper = make(device)
    plan(wrapper, batch, **rotation)
    before = batch.q[1].clone()
    out, lse = wrapper.run(*batch.q, *batch.caches, return_lse=True)
    expected = expect_turned(batch, **rotation)
    check((out, lse), expected)
    assert torch.equal(batch.q[1], before)
    again = wrapper.run_return_lse(*batch.q, *batch.caches, out=torch.empty_like(out), lse=torch.empty_like(lse))
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_scales(device: torch.device) -> None:
    batch = make_batch(Case("scales", kv_dtype=E4M3), device)
    wrapper = make(device)
    plan(wrapper, batch)
    result = wrapper.run(*batch.q, *batch.caches, q_scale=0.5, k_scale=1.4, v_scale=0.7, return_lse=True)
    check((result[0], result[1]), expect_turned(batch, cache_scale=0.7))  # q_scale * k_scale too


@pytest.mark.parametrize("v_scale", [2.0**34, -(2.0**60), 2.0**127])
def test_a_large_scale_of_zeros(device: torch.device, v_scale: float) -> None:
    """Values that are zero stay so, of a request whose KV is split as well."""
    batch = make_batch(Case("zeros", kv_lens=(33, 5000, 200, 1)), device)
    for cache in batch.caches:
        cache.zero_()
    wrapper = make(device)
    plan(wrapper, batch)
    out, lse = wrapper.run(*batch.q, *batch.caches, v_scale=v_scale, return_lse=True)
    assert (out == 0).all()
    seen = torch.tensor(batch.case.kv_lens, device=device).log2()
    torch.testing.assert_close(lse, seen[:, None].expand_as(lse), rtol=1e-5, atol=1e-5)


def test_graph_buffers(device: torch.device) -> None:
    """Plans fill the caller's buffers; a request without pages is padding."""
    sizes = {"indptr": 5, "indices": 64, "last_page_len": 4}
    buffers = {f"paged_kv_{n}_buffer": torch.zeros(size, dtype=torch.int32, device=device) for n, size in sizes.items()}
    wrapper = make(device, use_cuda_graph=True, **buffers)
    assert wrapper.is_cuda_graph_enabled and not wrapper.use_tensor_cores
    for seed, kv_lens in enumerate(((33, 90, 200, 517), (5, 0, 64, 1))):
        batch = make_batch(Case("graph", kv_lens=kv_lens), device, seed)
        plan(wrapper, batch)
        check(wrapper.run(*batch.q, *batch.caches, return_lse=True), expect_turned(batch))
        for buffer, given in zip(buffers.values(), (*batch.indices[1:3], last_page_len(batch.case))):
            assert torch.equal(buffer[: len(given)].cpu(), given)
    with pytest.raises(ValueError, match="needs paged_kv_last_page_len_buffer"):
        make(device, use_cuda_graph=True)
    with pytest.raises(ValueError, match="graphs of batch size 4"):
        plan(wrapper, make_batch(Case("other", (1,), (9,)), device))


@pytest.mark.gpu
def test_a_captured_run_follows_the_plan() -> None:
    device = torch.device("cuda")
    sizes = {"indptr": 5, "indices": 64, "last_page_len": 4}
    buffers = {f"paged_kv_{n}_buffer": torch.zeros(size, dtype=torch.int32, device=device) for n, size in sizes.items()}
    wrapper = make(device, use_cuda_graph=True, **buffers)
    batches = [make_batch(Case("replayed", kv_lens=lens), device, 3, 24) for lens in ((5, 6, 7, 8), (33, 90, 200, 517))]
    held = make_batch(batches[0].case, device, 3, 24)
    plan(wrapper, held)
    wrapper.run(*held.q, *held.caches)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = wrapper.run(*held.q, *held.caches, return_lse=True)
    for batch in reversed(batches):
        for target, source in zip((*held.q, *held.caches), (*batch.q, *batch.caches)):
            target.copy_(source)
        plan(wrapper, batch)
        graph.replay()
        check((result[0], result[1]), expect_turned(batch))


def test_errors_name_the_argument(device: torch.device) -> None:
    batch = make_batch(Case("errors"), device)
    wrapper = make(device)
    with pytest.raises(ValueError, match=r"batch_decode_mla: run\(\) before plan"):
        wrapper.run(*batch.q, *batch.caches)
    plan(wrapper, batch)
    for options, message in (
        ({"window_left": 5}, "window_left is 5"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap is 30"),
        ({"window_left": "5"}, "window_left"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_scale": -1.0}, "rope_scale"),
        ({"data_type": "int8"}, "int8"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            plan(wrapper, batch, **options)
    with pytest.raises(ValueError, match=r"indptr has shape \[5\]; expected \[3\]"):
        wrapper.plan(*batch.indices[1:3], last_page_len(batch.case)[:2], 16, 512, 64, DEEPSEEK_SCALE)
    (q_nope, q_pe), (ckv, kpe) = batch.q, batch.caches
    for given, message in (
        ((q_nope[:2], q_pe[:2], ckv, kpe), "q_pe has shape"),
        ((q_nope, q_pe[:, :4], ckv, kpe), "q_pe has shape"),
        ((q_nope, q_pe, ckv[..., :256], kpe), "ckv_cache dim 2"),
        ((q_nope, None, ckv, kpe), "q_pe is NoneType"),
        ((None, q_pe, ckv, kpe), "q_nope is NoneType"),
    ):
        with pytest.raises((ValueError, TypeError, IndexError), match=message):
            wrapper.run(*given)
    check(wrapper.run(*batch.q, *batch.caches, return_lse=True), expect_turned(batch))
    with pytest.raises(UnsupportedConfig, match="head_dim_ckv"):
        wrapper.plan(*batch.indices[1:3], last_page_len(batch.case), 16, 128, 64, DEEPSEEK_SCALE)


def test_torch_compile(device: torch.device) -> None:
    batch, wrapper = make_batch(Case("compiled"), device), make(device)
    plan(wrapper, batch)
    compiled = torch.compile(lambda *given: wrapper.run(*given), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*batch.q, *batch.caches), wrapper.run(*batch.q, *batch.caches))
