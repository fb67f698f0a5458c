# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode in one call, on both targets against the FP64 oracle, request by request."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.attention.beside import MixedPlan
from flashinfer.attention.prefill.plan import PrefillPlan
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention import prefill as families
from tests.attention.named_cases import named
from tests.attention.prefill_kit import (
    BF16,
    E4M3,
    FP16,
    LENGTHS_AND_HEADS,
    Batch,
    Case,
    check,
    expect,
    make_batch,
    make_plan,
    offsets,
)

# Requests of few rows among requests of many.
MIXED: dict[str, Any] = {
    "qo_lens": (1, 300, 1, 1, 130, 1, 7, 1, 0, 1),
    "kv_lens": (700, 300, 5000, 1, 1000, 33, 60, 0, 90, 129),
}
CASES = (
    Case("mixed", **MIXED),
    Case("mixed_page_1", **MIXED, page_size=1),
    Case("mixed_hnd", **MIXED, layout="HND", q_dtype=FP16),
    Case("mixed_full", **MIXED, options={}),
    Case("mixed_mha", **MIXED, heads=(2, 2)),
    Case("mixed_group_8", **MIXED, heads=(16, 2)),
    Case("mixed_head_dim_64", **MIXED, head_dim=64),
    Case("mixed_head_dim_256", **MIXED, head_dim=256, heads=(4, 2)),
    Case("mixed_wide_keys", **MIXED, head_dim=192, head_dim_vo=128, heads=(4, 4)),
    Case("mixed_fp8_kv", **MIXED, kv_dtype=E4M3),
    Case("mixed_soft_cap", **MIXED, options={"causal": True, "logits_soft_cap": 5.0, "sm_scale": 0.2}),
    Case("one_decode_among_many", qo_lens=(200, 190, 1, 180), kv_lens=(200, 190, 30000, 180), heads=(4, 1)),
    Case("one_prefill_among_many", qo_lens=(*[1] * 40, 900), kv_lens=(*range(100, 4100, 100), 900), heads=(4, 1)),
    Case("decodes", qo_lens=(1,) * 9, kv_lens=(1, 4000, 70, 0, 16, 17, 128, 2000, 5)),
    *[case for case in LENGTHS_AND_HEADS if case.storage == "paged"],
)
SANITIZED = {"mixed", "one_decode_among_many"}


def lengths(case: Case) -> Tensor:
    return torch.tensor(case.kv_lens, dtype=torch.int32)


def plan_attention(wrapper: Any, batch: Batch, where: torch.device | None = None) -> None:
    case = batch.case
    qo_indptr, kv_indptr, pages, _ = batch.indices
    given = [x if where is None else x.to(where) for x in (qo_indptr, kv_indptr, pages, lengths(case))]
    wrapper.plan(
        *given, *case.heads, case.head_dim, case.head_dim_vo or case.head_dim, case.page_size,
        q_data_type=case.q_dtype, kv_data_type=case.kv_dtype or case.q_dtype, **case.options,
    )  # fmt: skip


@pytest.mark.parametrize("case", named(CASES, sanitized=SANITIZED))
def test_batch_attention(case: Case, device: torch.device) -> None:
    batch = make_batch(case, device)
    wrapper = flashinfer.BatchAttention(case.layout, str(device))
    plan_attention(wrapper, batch)
    out = torch.full((*batch.q.shape[:2], case.head_dim_vo or case.head_dim), math.nan, dtype=case.q_dtype).to(device)
    lse = torch.full(batch.q.shape[:2], math.nan, device=device)
    for _ in range(2):  # counters are back at zero
        result = wrapper.run(batch.q, batch.kv, out, lse)
        assert result[0] is out and result[1] is lse
        check((out, lse), expect(batch))
        out.fill_(math.nan)
    plan_attention(wrapper, batch, device)
    check(wrapper.run(batch.q, batch.kv), expect(batch))


@pytest.mark.gpu
def test_captured() -> None:
    """Plan and run in one graph, replayed for prompts where there were requests to decode, and the other way round."""
    device = torch.device("cuda")
    first = Case("first", qo_lens=(200, 1, 1, 62, 1), kv_lens=(900, 3000, 1, 62, 700))
    second = replace(first, qo_lens=(1, 1, 260, 1, 2), kv_lens=(4000, 5, 300, 0, 300))
    batches = make_batch(first, device), make_batch(second, device, seed=1)
    num_pages = max(len(batch.kv) for batch in batches)
    cache = torch.zeros(num_pages, *batches[0].kv[0].shape, dtype=BF16, device=device)
    q, wrapper = batches[0].q.clone(), flashinfer.BatchAttention()
    indices = [torch.zeros(size, dtype=torch.int32, device=device) for size in (6, 6, num_pages, 5)]

    def load(batch: Batch) -> None:
        assert isinstance(batch.kv, Tensor)
        cache[: len(batch.kv)].copy_(batch.kv)
        q.copy_(batch.q)
        for target, source in zip(indices, (*batch.indices[:3], lengths(batch.case))):
            target[: len(source)].copy_(source)

    def both() -> Any:
        wrapper.plan(*indices, *first.heads, 128, 128, first.page_size, causal=True)
        return wrapper.run(q, cache)

    load(batches[0])
    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = both()
    for batch in (batches[1], batches[0], batches[1]):
        load(batch)
        for poisoned in result:
            poisoned.fill_(math.nan)
        graph.replay()
        check(result, expect(batch))


def test_pages_beyond_the_length_are_not_read(device: torch.device) -> None:
    """As where an engine reserves pages ahead, which hold anything."""
    case = Case("reserved", qo_lens=(1, 40, 1), kv_lens=(30, 60, 100))
    batch = make_batch(case, device)
    qo_indptr, kv_indptr, pages, _ = batch.indices
    assert isinstance(batch.kv, Tensor)
    nan_pages = [int(page) for page in range(len(batch.kv)) if batch.kv[page].isnan().all()]
    lists = [
        [*pages[begin:end].tolist(), *nan_pages[: i + 1]]
        for i, (begin, end) in enumerate(zip(kv_indptr.tolist(), kv_indptr[1:].tolist()))
    ]
    batch.indices = (
        qo_indptr, offsets(tuple(map(len, lists))),
        torch.tensor([page for row in lists for page in row], dtype=torch.int32), batch.indices[3],
    )  # fmt: skip
    wrapper = flashinfer.BatchAttention(device=device)
    plan_attention(wrapper, batch)
    check(wrapper.run(batch.q, batch.kv), expect(batch))


def test_scales_and_a_soft_cap_of_the_run(device: torch.device) -> None:
    case = Case("scaled", **MIXED, kv_dtype=E4M3)
    batch, wrapper = make_batch(case, device), flashinfer.BatchAttention(device=device)
    plan_attention(wrapper, batch)
    result = wrapper.run(batch.q, batch.kv, k_scale=0.5, v_scale=2.0, logits_soft_cap=4.0)
    check(result, expect(batch, k_scale=0.5, v_scale=2.0, logits_soft_cap=4.0))
    check(wrapper.run(batch.q, batch.kv), expect(batch))


def test_the_prefill_wrapper_over_the_same_batch(device: torch.device) -> None:
    from tests.attention.prefill_kit import make_wrapper, plan, run

    for case in (CASES[0], replace(CASES[0], mask="bool", options={})):
        batch = make_batch(case, device)
        wrapper = make_wrapper(case, device)
        plan(wrapper, batch)
        check(run(wrapper, batch), expect(batch))
        plan(wrapper, batch, disable_split_kv=True)
        check(run(wrapper, batch), expect(batch))
        plan(wrapper, batch, fixed_split_size=8)
        check(run(wrapper, batch), expect(batch))


def test_refusals() -> None:
    batch, wrapper = make_batch(CASES[0], torch.device("cpu")), flashinfer.BatchAttention(device="cpu")
    with pytest.raises(ValueError, match="before plan"):
        wrapper.run(batch.q, batch.kv)
    with pytest.raises(ValueError, match="nothing is planned"):
        wrapper.prewarm_paged_kv_stride_variant()
    qo_indptr, kv_indptr, pages, _ = batch.indices
    shapes = (8, 2, 128, 128, 16)
    with pytest.raises(UnsupportedConfig, match="use_profiler"):
        wrapper.plan(qo_indptr, kv_indptr, pages, lengths(CASES[0]), *shapes, use_profiler=True)
    with pytest.raises(ValueError, match=r"kv_len_arr\[0\] is 900; expected 0 to 704"):
        wrapper.plan(qo_indptr, kv_indptr, pages, lengths(CASES[0]) + 200, *shapes)
    plan_attention(wrapper, batch)
    wrapper.prewarm_paged_kv_stride_variant()
    with pytest.raises(UnsupportedConfig, match="kv_cache_sf is given"):
        wrapper.run(batch.q, batch.kv, kv_cache_sf=batch.q)


@pytest.mark.parametrize("axes", [{}, {"head_dim": 64}, {"head_dim": 256}, {"page_size": 1}, {"kv_dtype": "fp8_e4m3"}])
def test_prefill_beside_decode_has_its_own_tile(axes: dict[str, Any]) -> None:
    def config(**more: Any) -> Any:
        shape = {"q_dtype": "bf16", "kv_dtype": "bf16", "head_dim": 128, "page_size": 16, **axes}
        spec = families.prefill("sm_90a", **shape, **more)
        return families.PREFILL.implementation(spec).config(spec)

    mixed, alone = config(mixed=True), config()
    assert mixed.launch == alone.launch and mixed.constants == {**alone.constants, "kIsMixed": True}
    assert config(mixed=True, queries="short") == config(queries="short")


def test_one_launch_where_no_request_can_have_many_rows() -> None:
    plan = make_plan(MixedPlan, 65, (0, 0), None)  # of 4 query heads a KV head
    # 16 tokens are 64 rows: 65 requests of one token each, or one of 16 among 64.
    assert [plan.queries_of(n) for n in (65, 64 + 16, 64 + 17, 64 + 512)] == ["short", "short", "medium", "medium"]
    assert make_plan(PrefillPlan, 65, (0, 0), None).queries_of(64 + 512) == "short"


@pytest.mark.parametrize(
    ("target", "axes"), [("sm_80", {}), ("sm_100f", {}), ("x86-64-v3", {}), ("sm_90a", {"pos_encoding": "rope"})]
)
def test_kernels_that_do_not_run_beside_others_are_those_of_prefill(target: str, axes: dict[str, Any]) -> None:
    plain = {"q_dtype": "bf16", "kv_dtype": "bf16", "head_dim": 128, "page_size": 16, **axes}
    assert families.prefill(target, **plain, mixed=True) == families.prefill(target, **plain)
