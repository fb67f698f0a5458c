# SPDX-License-Identifier: Apache-2.0
"""Planned decode of several queries a request (q_len_per_req), against the FP64 oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from tests.attention.prefill_kit import BF16, E4M3, FP16, Batch, Case, check, expect, make_batch, tolerance_of


def drafts(name: str, q_len: int, **options: Any) -> Case:
    case = Case(name, **{"kv_lens": (33, 90, 200, 517), **options})
    return replace(case, qo_lens=(q_len,) * len(case.kv_lens))


def wrapper_for(case: Case, device: torch.device, **options: Any) -> flashinfer.BatchDecodeWithPagedKVCacheWrapper:
    workspace = torch.full((64 << 20 if device.type == "cuda" else 8,), 255, dtype=torch.uint8, device=device)
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, case.layout, **options)


def plan(wrapper: flashinfer.BatchDecodeWithPagedKVCacheWrapper, batch: Batch, **options: Any) -> None:
    case = batch.case
    shared = {name: value for name, value in case.options.items() if name != "causal"}
    wrapper.plan(
        *batch.indices[1:], *case.heads, case.head_dim, case.page_size, q_data_type=case.q_dtype,
        kv_data_type=case.kv_dtype or case.q_dtype, o_data_type=case.o_dtype,
        q_len_per_req=case.qo_lens[0] if case.qo_lens else 2, **shared, **options,
    )  # fmt: skip


def causal(**options: Any) -> dict[str, Any]:
    return {"causal": True, **options}


CASES = [
    drafts("two", 2),
    drafts("long_and_empty", 4, kv_lens=(20000, 0, 4, 3, 4000)),
    drafts("many", 70, kv_lens=(70, 71, 400)),
    drafts("hnd", 5, layout="HND", head_dim=64, heads=(4, 4)),
    drafts("page_size_1", 3, page_size=1, q_dtype=FP16),
    drafts("fp8_cache", 3, kv_dtype=E4M3),
    drafts("window", 4, options=causal(window_left=30)),
    drafts("soft_cap", 4, options=causal(logits_soft_cap=5.0)),
    drafts("alibi", 4, options=causal(pos_encoding_mode="ALIBI")),
    drafts("rope", 4, options=causal(pos_encoding_mode="ROPE_LLAMA")),
    drafts("no_requests", 2, kv_lens=()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_oracle(device: torch.device, case: Case) -> None:
    batch, wrapper = make_batch(case, device), wrapper_for(case, device)
    plan(wrapper, batch)
    out, lse = torch.full_like(batch.q, math.nan), torch.full(batch.q.shape[:2], math.nan, device=device)
    result = wrapper.run(batch.q, batch.kv, out=out, lse=lse, return_lse=True)
    assert result[0] is out and result[1] is lse
    check((out, lse), expect(batch), tolerance_of(case, device))
    again = wrapper.run_return_lse(batch.q, batch.kv, window_left=20)
    check((again[0], again[1]), expect(batch, window_left=20), tolerance_of(case, device))


def test_other_plans_before_and_after(device: torch.device) -> None:
    """One query, several, one again; and planned by the function that engines put in the place of plan()."""
    wrapper = wrapper_for(CASES[0], device)
    for q_len in (1, 3, 1, 80, 2):
        batch = make_batch(drafts("again", q_len), device, seed=q_len)
        plan(wrapper, batch)
        check(wrapper.run(batch.q, batch.kv, return_lse=True), expect(batch))
    flashinfer.fast_decode_plan(wrapper, *batch.indices[1:], 8, 2, 128, 16, q_data_type=BF16, q_len_per_req=2)
    check(wrapper.run(batch.q, batch.kv, return_lse=True), expect(batch))


@pytest.mark.parametrize("q_len", [1, 3])
def test_queries_in_fp8(device: torch.device, q_len: int) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    case = drafts("fp8", q_len, q_dtype=E4M3, kv_dtype=E4M3, o_dtype=BF16)
    batch, wrapper = make_batch(case, device), wrapper_for(case, device)
    plan(wrapper, batch)
    out = wrapper.run(batch.q, batch.kv)
    assert isinstance(out, Tensor) and out.dtype == BF16
    expected, _ = expect(batch)
    error = (out.cpu().double() - expected).norm() / expected.norm()
    assert error < (0.04 if device.type == "cuda" else 0.005)


def test_compiled(device: torch.device) -> None:
    batch, wrapper = make_batch(CASES[0], device), wrapper_for(CASES[0], device)
    plan(wrapper, batch)

    def run(q: Tensor) -> Any:
        return wrapper.run(q, batch.kv, return_lse=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(batch.q)
    assert all(torch.equal(one, other) for one, other in zip(compiled, run(batch.q)))


@pytest.mark.gpu
def test_captured_and_replayed_for_other_lengths() -> None:
    device = torch.device("cuda")
    lengths = [(100, 100, 100, 100), (20000, 0, 100, 517), (4, 5, 6, 7)]
    batches = [make_batch(drafts("graph", 4, kv_lens=kv_lens), device, seed=3) for kv_lens in lengths]

    def int32(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    wrapper = wrapper_for(
        batches[0].case, device, use_cuda_graph=True, paged_kv_indptr_buffer=int32(5),
        paged_kv_indices_buffer=int32(1400), paged_kv_last_page_len_buffer=int32(4),
    )  # fmt: skip
    cache = torch.zeros(max(len(batch.kv) for batch in batches), 2, 16, 2, 128, dtype=BF16, device=device)
    q = batches[0].q.clone()

    def load(batch: Batch) -> None:
        assert isinstance(batch.kv, Tensor)
        cache[: len(batch.kv)].copy_(batch.kv)
        q.copy_(batch.q)
        plan(wrapper, batch)

    load(batches[0])
    wrapper.run(q, cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = wrapper.run(q, cache, return_lse=True)
    for batch in (*batches, batches[1]):
        load(batch)
        for poisoned in result:
            assert isinstance(poisoned, Tensor)
            poisoned.fill_(math.nan)
        graph.replay()
        check((result[0], result[1]), expect(batch))


def test_errors() -> None:
    batch, wrapper = make_batch(CASES[0], torch.device("cpu")), wrapper_for(CASES[0], torch.device("cpu"))
    plan(wrapper, batch)
    with pytest.raises(ValueError, match="q has 4 tokens; planned for 8, 2 of each of 4 requests"):
        wrapper.run(batch.q[:4], batch.kv)
    with pytest.raises(ValueError, match=r"q has shape \[8, 1024\]"):
        wrapper.run(batch.q.flatten(1), batch.kv)
    with pytest.raises(TypeError, match=r"q_len_per_req is 1\.5; expected an integer"):
        plan(wrapper, replace(batch, case=replace(batch.case, qo_lens=(1.5,) * 4)))  # type: ignore[arg-type]
