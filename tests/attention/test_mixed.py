"""Prefill and decode in one call, on both targets against the FP64 oracle, request by request."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.attention.mixed import BatchPODWithPagedKVCacheWrapper, PODWithPagedKVCacheWrapper
from flashinfer.attention.prefill.plan import MixedPlan, PrefillPlan
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention import prefill as families
from flashinfer.host import memo
from tests.attention.named_cases import named
from tests.attention.prefill_kit import (
    BF16,
    CAUSAL,
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
from tests.oracles.attention import attention

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
def test_mixed_batches_have_a_kernel_of_two_consumers_on_hopper(axes: dict[str, Any]) -> None:
    plain = {"q_dtype": "bf16", "kv_dtype": "bf16", "head_dim": 128, "page_size": 16, **axes}
    spec = families.prefill("sm_90a", **plain, mixed=True)
    assert families.prefill("sm_90a", **plain) != spec
    config = families.PREFILL.implementation(spec).config(spec)
    assert config.constants["kMixes"] is True and config.constants["kBlockM"] == 128
    assert config.launch.num_threads == 3 * 128


def test_a_few_queries_more_than_one_each_are_prompts() -> None:
    plan = make_plan(MixedPlan, 65, (0, 0), None)  # of 4 query heads a KV head
    assert [plan.queries_of(n) for n in (65, 4 * 65, 4 * 65 + 1, 64 + 512)] == ["short", "short", "medium", "medium"]
    assert make_plan(PrefillPlan, 65, (0, 0), None).queries_of(64 + 512) == "short"


@pytest.mark.parametrize(
    ("target", "axes"),
    [
        ("sm_80", {}), ("sm_100f", {}), ("x86-64-v3", {}), ("sm_90a", {"queries": "short"}),
        ("sm_90a", {"queries": "long"}), ("sm_90a", {"pos_encoding": "rope"}),
    ],
)  # fmt: skip
def test_no_kernel_of_their_own_where_it_would_be_the_same(target: str, axes: dict[str, Any]) -> None:
    plain = {"q_dtype": "bf16", "kv_dtype": "bf16", "head_dim": 128, "page_size": 16, **axes}
    assert families.prefill(target, **plain, mixed=True) == families.prefill(target, **plain)


# ------------------------------------------------------------------------------------------------------------------ POD


def workspace(device: torch.device) -> Tensor:
    return torch.full(((64 << 20) if device.type == "cuda" else 8,), 255, dtype=torch.uint8, device=device)


PREFILLED = Case("prefilled", qo_lens=(33, 130, 300), kv_lens=(33, 1000, 300))
DECODED = Case("decoded", qo_lens=(1,) * 5, kv_lens=(70, 4000, 1, 0, 513), options={})
APPENDED = replace(DECODED, qo_lens=(1, 3, 0, 2, 1))


def plan_pod(wrapper: Any, batches: tuple[Batch, Batch], where: torch.device, **options: Any) -> None:
    given = [x.to(where) for batch in batches for x in batch.indices]
    case = batches[0].case
    types = {"q_data_type": case.q_dtype, "kv_data_type": case.kv_dtype}
    wrapper.plan(*given, *case.heads, case.head_dim, case.page_size, **types, **options)


@pytest.mark.parametrize("decoded", [DECODED, APPENDED], ids=["decoded", "appended"])
@pytest.mark.parametrize("on_host", [True, False], ids=["on_host", "on_device"])
def test_batch_pod(decoded: Case, on_host: bool, device: torch.device) -> None:
    batches = make_batch(PREFILLED, device), make_batch(decoded, device, seed=1)
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(device))
    assert not wrapper.is_cuda_graph_enabled
    where = torch.device("cpu") if on_host else device
    for _ in range(2):
        plan_pod(wrapper, batches, where)
        for causal in (True, False, True):
            (out_p, out_d), (lse_p, lse_d) = wrapper.run(
                batches[0].q, batches[0].kv, batches[1].q, batches[1].kv, causal_p=causal, return_lse=True
            )
            check((out_p, lse_p), expect(batches[0], causal=causal))
            check((out_d, lse_d), expect(batches[1]))
    out_p, out_d = wrapper.run(batches[0].q, batches[0].kv, batches[1].q, batches[1].kv, k_scale=0.5, v_scale=3.0)
    check((out_p, expect(batches[0])[1]), (expect(batches[0], causal=False)[0], expect(batches[0])[1]))
    expected = expect(batches[1], k_scale=0.5, v_scale=3.0)
    check((out_d, expected[1]), expected)


@pytest.mark.parametrize("on_host", [True, False], ids=["on_host", "on_device"])
def test_batch_pod_of_one_batch_is_one_launch(
    on_host: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of one tensor of queries, one cache, and pages that no request has behind those of the first kind."""
    case = Case("both", qo_lens=(33, 130, 300, 1, 1, 1), kv_lens=(33, 1000, 300, 70, 4000, 1))
    batch, num_pages, num_rows = make_batch(case, device), 3 + 63 + 19, 33 + 130 + 300
    qo_indptr, kv_indptr, pages, last = batch.indices
    first = (qo_indptr[:4], kv_indptr[:4], torch.cat([pages[:num_pages], pages[-2:] * 0 + 1]), last[:3])
    second = (torch.arange(4, dtype=torch.int32), kv_indptr[3:] - num_pages, pages[num_pages:], last[3:])
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(device))
    monkeypatch.setattr(wrapper, "_joins", True)  # on the CPU too
    launches, run_both = [], wrapper._run_both
    monkeypatch.setattr(wrapper, "_run_both", lambda *args: launches.append(args) or run_both(*args))
    q_p, q_d = batch.q[:num_rows], batch.q[num_rows:]
    for _ in range(2):
        where = torch.device("cpu") if on_host else device
        given = [x.to(where) for x in first] + [second[0], *(x.to(where) for x in second[1:])]
        wrapper.plan(*given, *case.heads, case.head_dim, case.page_size, q_data_type=BF16)
        with monkeypatch.context() as capturing:  # a planner would be captured, and not run: two launches
            capturing.setattr(memo, "is_capturing", lambda tensor: True)
            outs, lses = wrapper.run(q_p, batch.kv, q_d, batch.kv, causal_p=True, return_lse=True)
            check((torch.cat(outs), torch.cat(lses)), expect(batch, causal=True))
        assert not launches
        for causal in (True, False, True):
            outs, lses = wrapper.run(q_p, batch.kv, q_d, batch.kv, causal_p=causal, return_lse=True)
            check((torch.cat(outs), torch.cat(lses)), expect(batch, causal=causal))
        out_p, out_d = wrapper.run(q_p, batch.kv, q_d, batch.kv, causal_p=True)
        assert torch.equal(out_p, outs[0]) and torch.equal(out_d, outs[1])
        assert len(launches) == 4
        wrapper.run(q_p.clone(), batch.kv, q_d, batch.kv)
        wrapper.run(q_p, batch.kv, q_d, batch.kv, v_scale=2.0)
        assert len(launches) == 4
        padded = torch.cat([q_p, q_p[:5], q_d])  # rows of no request between the two
        outs, lses = wrapper.run(padded[:-3], batch.kv, padded[-3:], batch.kv, causal_p=True, return_lse=True)
        assert not outs[0][num_rows:].any() and len(launches) == 5
        found = torch.cat([outs[0][:num_rows], outs[1]]), torch.cat([lses[0][:num_rows], lses[1]])
        check(found, expect(batch, causal=True))
        launches.clear()


def test_batch_pod_under_a_mask(device: torch.device) -> None:
    batches = make_batch(replace(PREFILLED, mask="bool", options={}), device), make_batch(DECODED, device, seed=1)
    assert batches[0].masks is not None
    mask = torch.cat([mask.flatten() for mask in batches[0].masks]).to(device)
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(device))
    plan_pod(wrapper, batches, torch.device("cpu"), window_left=100)
    given = (batches[0].q, batches[0].kv, batches[1].q, batches[1].kv)
    expected = expect(batches[0], window_left=100)
    (out, _), (lse, _) = wrapper.run(*given, custom_mask_p=mask, return_lse=True)
    check((out, lse), expected)
    (out, out_d), (lse, lse_d) = wrapper.run(*given, causal_p=True, return_lse=True)
    plain = replace(batches[0], masks=None)
    check((out, lse), expect(plain, causal=True, window_left=100))
    check((out_d, lse_d), expect(batches[1], window_left=100))


def test_a_plan_of_batch_pod_that_fails_changes_nothing() -> None:
    device = torch.device("cpu")
    batches = make_batch(PREFILLED, device), make_batch(DECODED, device, seed=1)
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(device))
    given = (batches[0].q, batches[0].kv, batches[1].q, batches[1].kv)
    with pytest.raises(ValueError, match="before plan"):
        wrapper.run(*given)
    plan_pod(wrapper, batches, device)
    before = wrapper.run(*given, causal_p=True)
    shorter = make_batch(replace(PREFILLED, qo_lens=(3, 3, 3)), device)
    wrong = replace(batches[1], indices=(*batches[1].indices[:3], batches[1].indices[3] + 100))
    with pytest.raises(ValueError, match="last_page_len"):
        plan_pod(wrapper, (shorter, wrong), device)
    after = wrapper.run(*given, causal_p=True)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pod(layout: str, device: torch.device) -> None:
    batch, generator = make_batch(DECODED, device), torch.Generator().manual_seed(4)
    wrapper = PODWithPagedKVCacheWrapper(workspace(device))
    assert not wrapper.is_cuda_graph_enabled
    types = {"q_data_type": BF16, "kv_data_type": BF16}
    wrapper.plan(*batch.indices[1:], 8, 2, 128, 16, sm_scale=0.11, **types)
    expected = expect(batch, sm_scale=0.11)
    for qo_len, kv_len, options in (
        (70, 700, CAUSAL), (70, 700, {}), (5, 9, {"window_left": 3, "causal": True}), (70, 700, {"sm_scale": 0.3}),
    ):  # fmt: skip
        q, k, v = (
            torch.randn(n, h, 128, generator=generator).to(BF16) for n, h in ((qo_len, 8), (kv_len, 2), (kv_len, 2))
        )
        rows = [x if layout == "NHD" else x.transpose(0, 1).contiguous() for x in (k, v)]
        given = [x.to(device) for x in (q, *rows)]
        named_p = {f"{name}_p": value for name, value in options.items()}
        out_p, out_d = wrapper.run(*given, batch.q, batch.kv, kv_layout_p=layout, sm_scale_d=0.11, **named_p)
        out, lse = attention(q, k, v, **options)
        check((out_p, lse), (out, lse))
        check((out_d, expected[1]), expected)
        mask = torch.rand(qo_len, kv_len, generator=generator) < 0.5
        out_p, _ = wrapper.run(*given, batch.q, batch.kv, kv_layout_p=layout, custom_mask_p=mask.to(device))
        out, lse = attention(q, k, v, custom_mask=mask)
        check((out_p, lse), (out, lse))


def test_pod_refuses() -> None:
    device = torch.device("cpu")
    batch, wrapper = make_batch(DECODED, device), PODWithPagedKVCacheWrapper(workspace(device))
    given = (batch.q, *torch.zeros(2, 20, 2, 128, dtype=BF16), batch.q, batch.kv)
    with pytest.raises(ValueError, match="before plan"):
        wrapper.run(*given)
    wrapper.plan(*batch.indices[1:], 8, 2, 128, 16, window_left=20, q_data_type=BF16)
    wrapper.run(*given, window_left_d=20)
    for options, message in (
        ({"window_left_d": 5}, r"window_left_d is 5; expected -1 or what was planned, 20"),
        ({"pos_encoding_mode_d": "ALIBI"}, "pos_encoding_mode_d is 'ALIBI'"),
        ({"custom_mask_d": batch.q}, "custom_mask_d is tensor"),
    ):
        with pytest.raises(UnsupportedConfig, match=message):
            wrapper.run(*given, **options)
    with pytest.raises(UnsupportedConfig, match="jit_args"):
        PODWithPagedKVCacheWrapper(workspace(device), jit_args=["x"])
