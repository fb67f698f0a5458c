# SPDX-License-Identifier: Apache-2.0
"""Decode on both targets against the FP64 oracle: every option, awkward shapes, hostile memory, bad input."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer import target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention import decode as families
from tests.attention.decode_kit import BF16, E4M3, E5M2, FP16, FP32, Batch, Case, check, make_wrapper, random_rows
from tests.attention.named_cases import named
from tests.oracles.attention import attention, paged_request
from tests.tolerances import assert_close

FP8: dict[str, Any] = {"q_dtype": E4M3, "o_dtype": BF16}
CASES = [
    Case("ordinary"),
    Case("fp16", q_dtype=FP16),
    Case("hnd", layout="HND"),
    Case("page_1", page_size=1),
    Case("page_3", page_size=3),
    Case("page_7_hnd_tuple", page_size=7, layout="HND", cache="tuple"),
    Case("last_page_full", kv_lens=(16, 32, 160)),
    Case("one_long_request", kv_lens=(9000,)),
    Case("short_among_long", kv_lens=(4000, 3, 2500, 1, 1, 3000)),
    Case("merged_in_groups", kv_lens=(9000, 0, 8500, 40, 2), heads=(8, 1)),
    Case("merged_in_groups_head_dim_96", kv_lens=(12000,), heads=(4, 1), head_dim=96),
    Case("merged_in_groups_head_dim_256", kv_lens=(12000, 700), heads=(3, 1), head_dim=256),
    Case("merged_in_groups_e4m3_head_dim_64", kv_lens=(20000,), heads=(4, 1), head_dim=64, kv_dtype=E4M3),
    Case("many_short", kv_lens=tuple(range(1, 120))),
    Case("no_kv", kv_lens=(0, 5, 0, 0, 300, 0)),
    Case("only_no_kv", kv_lens=(0, 0, 0)),
    Case("empty_batch", kv_lens=()),
    Case("tuple", cache="tuple"),
    Case("strided", cache="strided"),
    Case("strided_hnd", cache="strided", layout="HND"),
    Case("mha", heads=(4, 4)),
    Case("mqa", heads=(8, 1)),
    Case("group_5", heads=(10, 2)),
    Case("group_7", heads=(28, 4)),
    Case("group_8", heads=(16, 2)),
    Case("group_11", heads=(22, 2)),
    Case("group_16", heads=(32, 2)),
    Case("group_40", heads=(40, 1)),
    Case("more_heads_than_sms", heads=(150, 150), head_dim=32),
    Case("head_dim_32", head_dim=32),
    Case("head_dim_64", head_dim=64),
    Case("head_dim_96", head_dim=96),
    Case("head_dim_192", head_dim=192),
    Case("head_dim_256", head_dim=256),
    Case("head_dim_256_group_12", head_dim=256, heads=(12, 1)),
    Case("e4m3", kv_dtype=E4M3, options={"k_scale": 0.5, "v_scale": 2.0}),
    Case("e5m2", kv_dtype=E5M2, options={"k_scale": 0.5, "v_scale": 2.0}),
    Case("fp16_e4m3", q_dtype=FP16, kv_dtype=E4M3, options={"v_scale": 0.25}),
    Case("fp16_e5m2", q_dtype=FP16, kv_dtype=E5M2),
    Case("e4m3_head_dim_32", kv_dtype=E4M3, head_dim=32),
    Case("e4m3_head_dim_96", kv_dtype=E4M3, head_dim=96, page_size=1),
    Case("e4m3_head_dim_256", kv_dtype=E4M3, head_dim=256),
    Case("fp8_queries", **FP8, options={"q_scale": 0.7, "k_scale": 0.5, "v_scale": 2.0}),
    Case("fp8_queries_fp16_out", **{**FP8, "o_dtype": FP16}),
    Case("fp8_queries_hnd_page_7", **FP8, layout="HND", page_size=7),
    Case("fp8_queries_page_1", **FP8, page_size=1),
    *[Case(f"fp8_queries_head_dim_{dim}", **FP8, head_dim=dim) for dim in (32, 64, 96, 192, 256)],
    Case("fp8_queries_group_11", **FP8, heads=(22, 2)),
    Case("fp8_queries_strided", **FP8, cache="strided"),
    Case("fp8_queries_merged_in_groups", **FP8, kv_lens=(9000, 0, 8500, 40, 2), heads=(8, 1)),
    Case("fp8_queries_no_kv", **FP8, kv_lens=(0, 5, 0)),
    Case("fp8_queries_rope", **FP8, options={"pos_encoding_mode": "ROPE_LLAMA"}),
    Case("fp8_queries_alibi_soft_cap_window", **FP8, options={
        "pos_encoding_mode": "ALIBI", "logits_soft_cap": 8.0, "window_left": 100}),
    Case("mixed_16_bit", q_dtype=BF16, kv_dtype=FP16),
    Case("window", options={"window_left": 50}),
    Case("window_0", options={"window_left": 0}),
    Case("soft_cap", options={"logits_soft_cap": 3.0}),
    Case("alibi", options={"pos_encoding_mode": "ALIBI"}, heads=(6, 2)),
    Case("alibi_soft_cap_window", options={"pos_encoding_mode": "ALIBI", "logits_soft_cap": 8.0, "window_left": 100}),
    Case("rope", options={"pos_encoding_mode": "ROPE_LLAMA"}),
    Case("rope_scaled_window", options={
        "pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 5e5, "window_left": 64, "sm_scale": 0.2}),
    Case("rope_head_dim_96", head_dim=96, options={"pos_encoding_mode": "ROPE_LLAMA"}),
    Case("rope_e4m3", kv_dtype=E4M3, options={"pos_encoding_mode": "ROPE_LLAMA"}),
    Case("scales", options={"q_scale": 0.5, "k_scale": 1.5, "v_scale": 3.0, "sm_scale": 0.1}),
]  # fmt: skip
CPU_CASES = [
    Case("fp32", q_dtype=FP32),
    Case("fp32_rope_soft_cap", q_dtype=FP32, options={"pos_encoding_mode": "ROPE_LLAMA", "logits_soft_cap": 5.0}),
    Case("fp32_head_dim_256_group_9", q_dtype=FP32, head_dim=256, heads=(9, 1)),
]


SANITIZED = {"ordinary", "page_1", "one_long_request", "short_among_long", "group_16", "head_dim_64"}
SANITIZED |= {"merged_in_groups", "e4m3_head_dim_96", "fp8_queries", "fp8_queries_head_dim_32"}


@pytest.mark.parametrize("case", named(CASES, sanitized=SANITIZED))
def test_batch(case: Case, device: torch.device) -> None:
    batch = Batch(case, device)
    wrapper = make_wrapper(device, case.layout)
    batch.plan(wrapper)
    check(batch.run(wrapper), batch.expected(), case)


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_batch_fp32(case: Case) -> None:
    test_batch(case, torch.device("cpu"))


SINGLE_NAMES = {"ordinary", "fp16", "mqa", "group_7", "group_40", "head_dim_96", "head_dim_256", "e4m3"}
SINGLE_NAMES |= {"window", "soft_cap", "alibi", "rope", "fp8_queries"}
SINGLE_CASES = [case for case in CASES if case.name in SINGLE_NAMES]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("case", SINGLE_CASES, ids=lambda case: case.name)
def test_single(case: Case, layout: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    for kv_len in (0, 1, 77, 3000, 9000):
        q = random_rows((case.heads[0], case.head_dim), case.q_dtype, generator)
        k, v = (
            random_rows((kv_len, case.heads[1], case.head_dim), case.kv_dtype or case.q_dtype, generator) for _ in "kv"
        )
        expected = attention(q[None], k, v, **case.options)
        if layout == "HND":
            k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
        for _ in range(2):  # counters must be back at zero
            actual = flashinfer.single_decode_with_kv_cache(
                q.to(device), k.to(device), v.to(device), layout, return_lse=True, o_dtype=case.o_dtype, **case.options
            )
            check((actual[0][None], actual[1][None]), expected, case)


def test_the_output_of_fp8_queries_needs_a_dtype(device: torch.device) -> None:
    batch = Batch(Case("dtype", q_dtype=E4M3), device)
    wrapper = make_wrapper(device)
    with pytest.raises(UnsupportedConfig, match=r"the output would be torch.float8_e4m3fn.*o_data_type"):
        batch.plan(wrapper)
    q, k = batch.q[0].to(device), torch.zeros(10, 2, 128, device=device).to(E4M3)
    with pytest.raises(UnsupportedConfig, match=r"the output would be torch.float8_e4m3fn.*o_dtype"):
        flashinfer.single_decode_with_kv_cache(q, k, k)
    with pytest.raises(UnsupportedConfig, match="output would be"):
        flashinfer.single_decode_with_kv_cache(q, k, k, o_dtype=E4M3)


@pytest.mark.parametrize("kv_dtype", [BF16, FP16, E5M2], ids=str)
def test_fp8_queries_over_another_dtype_are_refused(device: torch.device, kv_dtype: torch.dtype) -> None:
    batch = Batch(Case("mixed", q_dtype=E4M3, kv_dtype=kv_dtype, o_dtype=BF16), device)
    with pytest.raises(UnsupportedConfig, match=r"decode: q is fp8_e4m3 and KV .*expected fp8 queries"):
        batch.plan(make_wrapper(device))
    k = torch.zeros(10, 2, 128, device=device).to(kv_dtype)
    with pytest.raises(UnsupportedConfig, match=r"decode: q is fp8_e4m3 and KV .*leave q in 16 bits"):
        flashinfer.single_decode_with_kv_cache(batch.q[0].to(device), k, k, o_dtype=BF16)


def test_the_dtype_of_q_is_the_planned_one(device: torch.device) -> None:
    """A cache of one dtype under queries of two: each wants its plan."""
    case = Case("planned", **FP8)
    batch, wrapper = Batch(case, device), make_wrapper(device)
    batch.plan(wrapper)
    with pytest.raises(ValueError, match=r"q is torch.bfloat16; planned with q_data_type torch.float8_e4m3fn"):
        wrapper.run(batch.q.to(device, BF16), batch.cache)
    with pytest.raises(ValueError, match=r"out is torch.float8_e4m3fn .*expected torch.bfloat16"):
        wrapper.run(batch.q.to(device), batch.cache, out=torch.empty_like(batch.q, device=device))
    check(batch.run(wrapper), batch.expected(), case)


def test_value_head_dim_of_its_own(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (random_rows(shape, BF16, generator) for shape in ((8, 192), (500, 2, 192), (500, 2, 128)))
    out = flashinfer.single_decode_with_kv_cache(q.to(device), k.to(device), v.to(device))
    assert_close(out[None], attention(q[None], k, v)[0])


def test_replanning_and_rerunning(device: torch.device) -> None:
    """One wrapper, batch after batch: nothing of a plan or a run leaks into the next."""
    wrapper = make_wrapper(device)
    for seed, kv_lens in enumerate([(5000, 4), (3,), (100, 0, 2000), (9000, 40), (5000, 4)]):
        batch = Batch(Case("replan", kv_lens=kv_lens), device, seed)
        batch.plan(wrapper)
        for _ in range(3):
            check(batch.run(wrapper), batch.expected(), batch.case)


FORWARD_OPTIONS = [
    {"sm_scale": 0.3, "window_left": 40, "logits_soft_cap": 4.0},
    {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 5e5, "window_left": 100},
    {},
]


@pytest.mark.parametrize("options", FORWARD_OPTIONS, ids=["scale_window_cap", "rope", "defaults"])
@pytest.mark.parametrize("planned", FORWARD_OPTIONS, ids=["plan_scale_window_cap", "plan_rope", "plan_defaults"])
def test_forward_overrides_what_was_planned(
    planned: dict[str, Any], options: dict[str, Any], device: torch.device
) -> None:
    """Defaults included, as the serving engines' older calls expect it; `run` goes by the plan before and after."""
    batch = Batch(Case("forward"), device)
    wrapper = make_wrapper(device)
    wrapper.begin_forward(
        *(x.to(device) for x in (batch.indptr, batch.indices, batch.last_page_len)), 8, 2, 128, 16,
        data_type="bfloat16", **planned,
    )  # fmt: skip
    as_planned, as_given = Case("planned", options=planned), Case("given", options=options)
    check(batch.run(wrapper), batch.expected(**planned), as_planned)
    out, lse = wrapper.forward_return_lse(batch.q.to(device), batch.cache, **options)
    check((out, lse), batch.expected(**options), as_given)
    assert torch.equal(wrapper.forward(batch.q.to(device), batch.cache, **options), out)
    wrapper.end_forward()
    check(batch.run(wrapper), batch.expected(**planned), as_planned)


def test_window_given_to_run_may_widen_the_planned_one(device: torch.device) -> None:
    batch = Batch(Case("wider", kv_lens=(1000, 70, 3)), device)
    wrapper = make_wrapper(device)
    batch.plan(wrapper, window_left=20)
    for window_left in (5, 300, 20, -1):
        check(batch.run(wrapper, window_left=window_left), batch.expected(window_left=window_left), batch.case)


def test_index_tensors_may_be_on_the_cpu(device: torch.device) -> None:
    batch = Batch(Case("uploaded"), device)
    wrapper = make_wrapper(device)
    batch.plan(wrapper, index_device="cpu")
    check(batch.run(wrapper), batch.expected(), batch.case)


def test_strided_q_and_out(device: torch.device) -> None:
    batch = Batch(Case("strided_q"), device)
    wrapper = make_wrapper(device)
    batch.plan(wrapper)
    wide = torch.full((5, 12, 160), math.nan, dtype=BF16, device=device)
    wide[:, :8, :128] = batch.q.to(device)
    out = torch.full((5, 10, 144), math.nan, dtype=BF16, device=device)
    wrapper.run(wide[:, :8, :128], batch.cache, out=out[:, :8, :128])
    assert_close(out[:, :8, :128], batch.expected()[0])
    assert torch.isnan(out[:, 8:]).all() and torch.isnan(out[:, :, 128:]).all(), "wrote outside its output"


def test_result_does_not_depend_on_the_batch(device: torch.device) -> None:
    lone = Batch(Case("lone", kv_lens=(700,)), device)
    wrapper = make_wrapper(device)
    lone.plan(wrapper)
    out, _ = lone.run(wrapper)
    crowd = Batch(Case("crowd", kv_lens=(700, 3000, 12)), device)
    crowd.q[0] = lone.q[0]
    k, v = paged_request(lone.cache, "NHD", lone.pages[0], int(lone.last_page_len[0]))
    assert isinstance(crowd.cache, Tensor)
    for i, page in enumerate(crowd.pages[0]):
        rows = slice(16 * i, min(16 * i + 16, 700))
        crowd.cache[page, 0, : rows.stop - rows.start] = k[rows].to(device)
        crowd.cache[page, 1, : rows.stop - rows.start] = v[rows].to(device)
    crowd.plan(wrapper)
    assert_close(crowd.run(wrapper)[0][:1], out.double())


@pytest.mark.gpu
def test_cuda_graph_of_plan_and_run() -> None:
    """Capture plan and run with short KV at the largest batch; replay with long KV and with fewer requests."""
    replay_other_lengths(BF16)


@pytest.mark.gpu
def test_cuda_graph_of_plan_and_run_of_fp8_queries() -> None:
    replay_other_lengths(E4M3)


def replay_other_lengths(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    max_batch, max_pages = 6, 2000
    buffers = [torch.zeros(n, dtype=torch.int32, device=device) for n in (max_batch + 1, max_pages, max_batch)]
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace, *buffers)
    assert wrapper.is_cuda_graph_enabled
    cache = torch.randn(max_pages, 2, 16, 2, 128, device=device).to(dtype)
    q = torch.randn(max_batch, 8, 128, device=device).to(dtype)
    out = torch.empty_like(q, dtype=BF16)
    lse = torch.empty(max_batch, 8, device=device)

    def step() -> None:
        wrapper.plan(*buffers, 8, 2, 128, 16, q_data_type=dtype, o_data_type=BF16)
        for _ in range(2):
            wrapper.run(q, cache, out=out, lse=lse, return_lse=True)

    def lengths(*kv_lens: int) -> None:
        pages = torch.tensor([-(-n // 16) for n in kv_lens])
        order = torch.randperm(max_pages)[: int(pages.sum())]
        buffers[0].copy_(torch.cat([torch.zeros(1), pages.cumsum(0)]).int())
        buffers[1][: order.numel()].copy_(order.int())
        buffers[2].copy_(torch.tensor([(n - 1) % 16 + 1 if n else 0 for n in kv_lens]).int())

    lengths(1, 1, 1, 1, 1, 1)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for kv_lens in [(5000, 3, 900, 17, 2000, 64), (8000, 0, 0, 0, 0, 0), (1, 2, 3, 0, 4, 0), (0, 0, 0, 0, 0, 12000)]:
        lengths(*kv_lens)
        out.fill_(math.nan)
        graph.replay()
        for i, n in enumerate(kv_lens):
            begin, end = buffers[0][i : i + 2].tolist()
            k, v = paged_request(cache, "NHD", buffers[1][begin:end].tolist(), int(buffers[2][i]))
            assert k.shape[0] == n
            check((out[i : i + 1], lse[i : i + 1]), attention(q[i : i + 1], k, v), Case("graph"))
    with pytest.raises(ValueError, match="batch size 6, indptr is for 5"):
        wrapper.plan(buffers[0][:6], buffers[1], buffers[2][:5], 8, 2, 128, 16, q_data_type=dtype, o_data_type=BF16)


@pytest.mark.gpu
def test_kv_written_by_the_kernel_before() -> None:
    """A launch that overlaps the one before reads the cache ahead of it, but computes with what that one writes."""
    device = torch.device("cuda", 0)
    num_tokens = 20000
    batch = Batch(Case("overwritten", kv_lens=(num_tokens,)), device)
    wrapper = make_wrapper(device)
    batch.plan(wrapper)
    q, (cache, indices) = batch.q.to(device), (batch.cache, batch.indices.to(device))
    indptr, last_page_len = batch.indptr.to(device), batch.last_page_len.to(device)
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=device)
    request = torch.zeros_like(tokens)
    rows = torch.randn(3, 2, num_tokens, 2, 128, device=device).to(BF16)
    outs = torch.empty(12, 1, 8, 128, dtype=BF16, device=device)

    def steps() -> None:
        for i, out in enumerate(outs):
            k, v = rows[i % 3]
            flashinfer.append_paged_kv_cache(k, v, request, tokens, cache, indices, indptr, last_page_len)
            wrapper.run(q, cache, out=out)

    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    outs.fill_(math.nan)
    for _ in range(3):
        graph.replay()
    for i, out in enumerate(outs):
        assert_close(out, attention(q, *rows[i % 3])[0])


@pytest.mark.gpu
def test_plan_does_not_synchronize() -> None:
    device = torch.device("cuda", 0)
    batch = Batch(Case("no_sync"), device)
    wrapper = make_wrapper(device)
    batch.plan(wrapper)
    batch.run(wrapper)
    indices = [x.to(device) for x in (batch.indptr, batch.indices, batch.last_page_len)]
    uploaded = [x.pin_memory() for x in (batch.indptr, batch.indices, batch.last_page_len)]
    q = batch.q.to(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tensors in (indices, uploaded):
            wrapper.plan(*tensors, 8, 2, 128, 16, q_data_type=BF16)
            wrapper.run(q, batch.cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_combinations(seed: int, device: torch.device) -> None:
    """Legal options together, drawn at random."""
    draw = random.Random(seed)
    num_kv_heads, q_dtype = draw.choice([1, 2, 3, 8]), draw.choice([BF16, FP16])
    options: dict[str, Any] = {"pos_encoding_mode": draw.choice(["NONE", "NONE", "ROPE_LLAMA", "ALIBI"])}
    if draw.random() < 0.4:
        options["window_left"] = draw.choice([0, 7, 100, 5000])
    if draw.random() < 0.4:
        options["logits_soft_cap"] = draw.choice([1.0, 30.0])
    if draw.random() < 0.5:
        options |= {"sm_scale": draw.uniform(0.02, 0.3), "v_scale": draw.uniform(0.1, 3)}
    case = Case(
        f"random_{seed}",
        kv_lens=tuple(draw.choice([0, 1, 15, 16, 17, draw.randint(1, 300), draw.randint(1, 5000)]) for _ in range(7)),
        heads=(num_kv_heads * draw.choice([1, 2, 3, 4, 5, 7, 8, 9, 16]), num_kv_heads),
        head_dim=draw.choice([32, 64, 96, 128, 192, 256]),
        page_size=draw.choice([1, 2, 5, 16, 64, 128]),
        q_dtype=q_dtype,
        kv_dtype=draw.choice([None, None, E4M3, E5M2]),
        layout=draw.choice(["NHD", "HND"]),
        cache=draw.choice(["one", "tuple"]),
        options=options,
    )
    batch = Batch(case, device, seed)
    wrapper = make_wrapper(device, case.layout)
    batch.plan(wrapper)
    for _ in range(2):
        check(batch.run(wrapper), batch.expected(), case)


def test_torch_compile(device: torch.device) -> None:
    """Traced without a graph break, with the same result; a new plan needs no new trace."""
    batch = Batch(Case("compiled"), device)
    wrapper = make_wrapper(device)
    q, cache = batch.q.to(device), batch.cache
    k, v = torch.randn(2, 300, 2, 128, device=device).to(BF16)

    def layer(q: Tensor, cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = wrapper.run(q * 2, cache, return_lse=True, v_scale=0.5)
        single = flashinfer.single_decode_with_kv_cache(q[0] * 2, k, v, window_left=20)
        return out + 1, lse, single

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        batch = Batch(Case("compiled"), device, seed)
        batch.plan(wrapper)
        q, cache = batch.q.to(device), batch.cache
        for ours, eager in zip(compiled(q, cache), layer(q, cache)):
            assert torch.equal(ours, eager)


# ------------------------------------------------------------------------------------------------------------- compiler


def test_every_target_has_legal_tiles() -> None:
    from flashinfer.jit import source

    for arch in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a", target.host()):
        for head_dim in families.HEAD_DIMS:
            for kv_dtype in ("bf16", "fp8_e4m3"):
                for group_size in (1, 16):
                    spec = families.decode(
                        arch, q_dtype="bf16", kv_dtype=kv_dtype, head_dim=head_dim, group_size=group_size
                    )
                    assert source.render(spec).text
