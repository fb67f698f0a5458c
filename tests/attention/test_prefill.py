# SPDX-License-Identifier: Apache-2.0
"""Prefill on both targets against the FP64 oracle: every option, awkward shapes, hostile memory, graphs, bad input."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention import prefill as families
from flashinfer.jit import default_resolver
from tests.attention.named_cases import named, skip_elsewhere
from tests.attention.prefill_kit import (
    BF16,
    CAUSAL,
    E4M3,
    E5M2,
    FP16,
    FP32,
    LENGTHS_AND_HEADS,
    Case,
    arguments,
    check,
    expect,
    make_batch,
    make_wrapper,
    plan,
    replay_other_lengths,
    run,
    tolerance_of,
)
from tests.oracles.attention import attention
from tests.tolerances import assert_close

SHORT, SHORT_KV = (16, 1, 5, 0, 9), (1500, 900, 5, 70, 3)
LONG = ((700, 1, 300), (900, 1000, 300))
CASES = [
    Case("ordinary"),
    Case("ragged", storage="ragged"),
    Case("not_causal", options={}),
    Case("ragged_not_causal", storage="ragged", options={}),
    # Several tiles of queries and of KV each, the last of both partly filled.
    *[
        Case(f"long_{storage}_{dim}", *LONG, (4, 2), dim, storage=storage, options=options)
        for dim in (64, 128, 256)
        for storage, options in (("paged", CAUSAL), ("ragged", {}))
    ],
    # Logits far apart: the running maximum rises all the time, and the output is rescaled.
    Case("far_apart", (300, 400), (900, 400), options={"causal": True, "sm_scale": 1.0}),
    Case("far_apart_64", (300, 400), (900, 400), head_dim=64, options={"causal": True, "sm_scale": 1.0}),
    # By 2^32 and more, so that on Hopper a tile's scores do not go by the maximum of those before.
    Case("farther_apart", (300, 400), (900, 400), options={"causal": True, "sm_scale": 4.0}),
    Case("farther_apart_fp16_64", (300, 400), (900, 400), (4, 2), 64, q_dtype=FP16, options={"sm_scale": 4.0}),
    Case("farther_apart_256", (300, 400), (900, 400), (4, 2), 256, options={"causal": True, "sm_scale": 2.0}),
    Case("farther_apart_page_1", (300,), (900,), page_size=1, options={"causal": True, "sm_scale": 4.0}),
    Case("farther_apart_window", (400,), (900,), options={"causal": True, "sm_scale": 4.0, "window_left": 350}),
    *[Case(f"page_{size}", (200, 70), (600, 70), page_size=size) for size in (8, 24, 64, 256)],
    Case("window_long", (700, 300), (900, 300), options={"causal": True, "window_left": 150}),
    # At most 64 query rows a request, on average: a tile of its own.
    Case("short", SHORT, SHORT_KV),
    Case("short_ragged", SHORT, SHORT_KV, storage="ragged"),
    Case("short_64", SHORT, SHORT_KV, head_dim=64, page_size=1),
    Case("short_256", SHORT, SHORT_KV, (4, 1), 256, page_size=3),
    Case("short_192_128", SHORT, SHORT_KV, (4, 4), 192, 128, storage="ragged"),
    Case("short_64_merged", (3,), (30000,), (4, 1), 64),
    Case("short_fp16_hnd", SHORT, SHORT_KV, q_dtype=FP16, layout="HND"),
    Case("short_not_causal_strided", SHORT, SHORT_KV, options={}, strided=True),
    Case("short_window", SHORT, SHORT_KV, options={"causal": True, "window_left": 150}),
    Case("short_custom_mask", SHORT, SHORT_KV, mask="packed", options={}),
    Case("short_alibi", SHORT, SHORT_KV, options={"causal": True, "pos_encoding_mode": "ALIBI"}),
    Case("short_soft_cap", SHORT, SHORT_KV, storage="ragged", options={"logits_soft_cap": 8.0}),
    Case("short_far_apart", SHORT, SHORT_KV, options={"causal": True, "sm_scale": 1.0}),
    Case("short_but_for_one", (150, *[1] * 40), (400, *[50] * 40)),
    Case("fp16", q_dtype=FP16),
    Case("hnd", layout="HND"),
    Case("ragged_hnd", layout="HND", storage="ragged"),
    Case("page_1", page_size=1),
    Case("page_3", page_size=3),
    Case("last_page_full", qo_lens=(16, 3), kv_lens=(64, 160)),
    *LENGTHS_AND_HEADS,
    Case("one_long_request", qo_lens=(700,), kv_lens=(900,)),
    # The planner takes 36 heads at a time on an H100, and the other 28 after them.
    Case("many_heads", qo_lens=(500, 700, 300), kv_lens=(500, 900, 300), heads=(64, 64), head_dim=64, cuda_only=True),
    Case("group_5", heads=(10, 2)),
    Case("group_7", heads=(14, 2), storage="ragged"),
    Case("head_dim_32", head_dim=32),
    Case("head_dim_64", head_dim=64),
    Case("head_dim_96", head_dim=96),
    Case("head_dim_192", head_dim=192),
    Case("head_dim_256", head_dim=256),
    Case("mla_shapes", head_dim=192, head_dim_vo=128, heads=(4, 4), storage="ragged"),
    Case("rows_see_less_than_their_unit", (200, 65, 1), (170, 65, 300), (3, 3), head_dim=192, head_dim_vo=128),
    Case("minilm", head_dim=32, heads=(12, 12), storage="ragged", options={}),
    Case("window", options={"causal": True, "window_left": 50}),
    Case("window_0", options={"causal": True, "window_left": 0}),
    Case("window_not_causal", options={"window_left": 33}, storage="ragged"),
    Case("soft_cap", options={"causal": True, "logits_soft_cap": 8.0}),
    Case("alibi", options={"causal": True, "pos_encoding_mode": "ALIBI"}),
    Case("alibi_not_causal", options={"pos_encoding_mode": "ALIBI"}, heads=(6, 2)),
    Case("rope", options={"causal": True, "pos_encoding_mode": "ROPE_LLAMA"}),
    Case(
        "rope_scaled", head_dim=64, storage="ragged",
        options={"causal": True, "pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 4.0, "rope_theta": 5e5},
    ),
    Case("sm_scale", options={"causal": True, "sm_scale": 0.3}),
    Case("custom_mask", mask="bool", options={}),
    Case("custom_mask_ragged_window", mask="bool", storage="ragged", options={"window_left": 60}),
    Case("packed_mask", mask="packed", options=CAUSAL),
    Case("window_soft_cap", options={"causal": True, "window_left": 40, "logits_soft_cap": 20.0}, storage="ragged"),
    Case("fp8_e4m3", kv_dtype=E4M3),
    Case("fp8_e5m2_fp16", q_dtype=FP16, kv_dtype=E5M2, storage="ragged"),
    Case("fp8_e4m3_fp16_d64", q_dtype=FP16, kv_dtype=E4M3, head_dim=64),
    Case("fp8_e5m2_d96", kv_dtype=E5M2, head_dim=96),
    Case("fp8_rope", kv_dtype=E4M3, options={"causal": True, "pos_encoding_mode": "ROPE_LLAMA"}),
    Case("fp8_d256", kv_dtype=E4M3, head_dim=256),
    # On Hopper, keys and values are widened on the way to the tensor cores.
    *[
        Case(f"fp8_long_{storage}_{dim}", *LONG, (4, 2), dim, storage=storage, options=options, kv_dtype=E4M3)
        for dim in (64, 128, 256)
        for storage, options in (("paged", CAUSAL), ("ragged", {}))
    ],
    Case("fp8_far_apart", (300, 400), (900, 400), options={"causal": True, "sm_scale": 1.0}, kv_dtype=E4M3),
    *[Case(f"fp8_page_{size}", (200, 70), (600, 70), page_size=size, kv_dtype=E4M3) for size in (1, 3, 8, 24, 64, 256)],
    Case("fp8_page_1_head_dim_64", *LONG, (4, 2), 64, page_size=1, kv_dtype=E4M3),
    Case("fp8_page_1_head_dim_256", *LONG, (4, 2), 256, page_size=1, kv_dtype=E4M3),
    Case("fp8_page_1_alibi", page_size=1, options={"causal": True, "pos_encoding_mode": "ALIBI"}, kv_dtype=E4M3),
    Case("fp8_window", (700, 300), (900, 300), options={"causal": True, "window_left": 150}, kv_dtype=E4M3),
    Case("fp8_hnd", layout="HND", kv_dtype=E4M3),
    Case("fp8_ragged_hnd", layout="HND", storage="ragged", kv_dtype=E4M3),
    Case("fp8_e5m2", kv_dtype=E5M2),
    Case("fp8_e5m2_long", *LONG, (4, 2), q_dtype=FP16, kv_dtype=E5M2),
    Case("fp8_soft_cap", options={"causal": True, "logits_soft_cap": 8.0}, kv_dtype=E4M3),
    Case("fp8_alibi", options={"causal": True, "pos_encoding_mode": "ALIBI"}, kv_dtype=E4M3),
    Case("fp8_custom_mask", mask="bool", options={}, kv_dtype=E4M3),
    *[replace(case, name=f"fp8_{case.name}", kv_dtype=E4M3) for case in LENGTHS_AND_HEADS],
]  # fmt: skip


SANITIZED = {"ordinary", "ragged", "page_1", "many_splits", "many_short", "no_kv", "mla_shapes", "minilm"}
SANITIZED |= {"many_heads", "head_dim_64", "head_dim_256", "window_soft_cap", "packed_mask", "rope"}
SANITIZED |= {"fp8_e4m3", "fp8_e5m2", "fp8_page_1"}


@pytest.mark.parametrize("case", named(CASES, sanitized=SANITIZED))
def test_against_the_oracle(device: torch.device, case: Case) -> None:
    skip_elsewhere(case, device)
    batch = make_batch(case, device)
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch)
    check(run(wrapper, batch), expect(batch), tolerance_of(case, device))


@pytest.mark.parametrize("storage", ["paged", "ragged"])
def test_fp32_on_the_cpu(storage: str) -> None:
    case = Case("fp32", q_dtype=FP32, storage=storage, head_dim=64)
    batch = make_batch(case, torch.device("cpu"))
    wrapper = make_wrapper(case, torch.device("cpu"))
    plan(wrapper, batch)
    out, lse = run(wrapper, batch)
    expected = expect(batch)
    assert_close(out, expected[0], scale=2.0)  # sums of 500 products in fp32
    assert_close(lse, expected[1], scale=2.0)


def test_scales(device: torch.device) -> None:
    case = Case("scales", kv_dtype=E4M3)
    batch = make_batch(case, device)
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch)
    scales = {"q_scale": 0.5, "k_scale": 0.7, "v_scale": 1.7}
    check(run(wrapper, batch, **scales), expect(batch, **scales))


@pytest.mark.parametrize("storage", ["paged", "ragged"])
def test_options_at_forward_time(device: torch.device, storage: str) -> None:
    """As serving engines call it: begin_forward with shapes, forward with causal, sm_scale, window and soft cap."""
    case = Case("forward", storage=storage, options={})
    batch = make_batch(case, device)
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch)
    for options in (
        {"causal": True},
        {"causal": False},
        {"causal": True, "window_left": 40, "sm_scale": 0.2},
        {"causal": True, "logits_soft_cap": 10.0},
        {"causal": True},
    ):
        out, lse = wrapper.forward_return_lse(*arguments(batch), **options)
        check((out, lse), expect(batch, **options))
    wrapper.end_forward()


@pytest.mark.parametrize("storage", ["paged", "ragged"])
def test_forward_overrides_what_was_planned(device: torch.device, storage: str) -> None:
    """Defaults included, as the serving engines' older calls expect it; `run` goes by the plan before and after."""
    planned = {"causal": True, "window_left": 20, "logits_soft_cap": 4.0, "pos_encoding_mode": "ALIBI", "sm_scale": 0.3}
    case = Case("overridden", storage=storage, options=planned)
    batch = make_batch(case, device)
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch)
    check(run(wrapper, batch), expect(batch))
    plain = replace(batch, case=replace(case, options={}))
    check(wrapper.forward_return_lse(*arguments(batch)), expect(plain))
    check(wrapper.forward_return_lse(*arguments(batch), causal=True), expect(plain, causal=True))
    check(run(wrapper, batch), expect(batch))


def test_what_shares_the_batch_does_not_matter(device: torch.device) -> None:
    case = Case("alone", qo_lens=(20, 300, 5), kv_lens=(2000, 300, 4000))
    batch = make_batch(case, device)
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch)
    together = run(wrapper, batch)
    begin = 0
    for i, qo_len in enumerate(case.qo_lens):
        alone = replace(case, qo_lens=(qo_len,), kv_lens=case.kv_lens[i : i + 1])
        single = make_batch(alone, device, seed=1)
        single.q, single.k, single.v = batch.q[begin : begin + qo_len], batch.k[i : i + 1], batch.v[i : i + 1]
        out, lse = flashinfer.single_prefill_with_kv_cache_return_lse(
            single.q, batch.k[i].to(device), batch.v[i].to(device), causal=True
        )
        assert_close(together[0][begin : begin + qo_len], out.double(), scale=1.0)
        torch.testing.assert_close(together[1][begin : begin + qo_len], lse, atol=1e-4, rtol=1e-5)
        begin += qo_len


def test_same_result_every_time(device: torch.device) -> None:
    """Whichever block takes an item or merges it last, the sums run in one order."""
    case = Case("repeat", qo_lens=(3, 40), kv_lens=(6000, 3000))
    batch = make_batch(case, device)
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch)
    first = run(wrapper, batch)
    for _ in range(5):
        again = run(wrapper, batch)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


SINGLES = {
    "ordinary": {"causal": True},
    "not_causal": {},
    "hnd": {"causal": True, "kv_layout": "HND"},
    "window": {"causal": True, "window_left": 20},
    "mask": {"mask": "bool"},
    "packed": {"mask": "packed"},
    "soft_cap": {"logits_soft_cap": 5.0},
    "alibi": {"causal": True, "pos_encoding_mode": "ALIBI"},
}


@pytest.mark.parametrize("lengths", [(77, 150), (3, 4000), (1, 1), (0, 5), (6, 0), (9, 4)], ids=str)
@pytest.mark.parametrize("name", SINGLES)
def test_single(device: torch.device, name: str, lengths: tuple[int, int]) -> None:
    options = dict(SINGLES[name])
    generator = torch.Generator().manual_seed(1)
    (qo_len, kv_len), heads, kv_heads, dim = lengths, 6, 2, 64
    q = torch.randn(qo_len, heads, dim, generator=generator).to(device, FP16)
    k, v = (torch.randn(kv_len, kv_heads, dim, generator=generator).to(device, FP16) for _ in range(2))
    kind, oracle_options = options.pop("mask", ""), {}
    if kind:
        mask = torch.rand(qo_len, kv_len, generator=generator) < 0.5
        oracle_options["custom_mask"] = mask
        packed = flashinfer.packbits(mask.flatten().to(device), bitorder="little")
        options.update({"custom_mask": mask.to(device)} if kind == "bool" else {"packed_custom_mask": packed})
    oracle_options.update({key: value for key, value in options.items() if "mask" not in key and key != "kv_layout"})
    expected = attention(q, k, v, **oracle_options)
    if options.get("kv_layout") == "HND":
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    check(flashinfer.single_prefill_with_kv_cache_return_lse(q, k, v, **options), expected)
    out = flashinfer.single_prefill_with_kv_cache(q, k, v, **options)
    assert isinstance(out, Tensor)
    assert_close(out, expected[0])


@pytest.mark.parametrize("lengths", [(50, 20), (20, 50)], ids=str)
def test_window_wider_than_any_sequence(device: torch.device, lengths: tuple[int, int]) -> None:
    """Hides nothing, also from queries before the first key, whose position is negative."""
    generator = torch.Generator().manual_seed(2)
    (qo_len, kv_len), dim = lengths, 64
    q = torch.randn(qo_len, 2, dim, generator=generator).to(device, FP16)
    k, v = (torch.randn(kv_len, 2, dim, generator=generator).to(device, FP16) for _ in range(2))
    out = flashinfer.single_prefill_with_kv_cache_return_lse(q, k, v, window_left=2**31 - 2)
    check(out, attention(q, k, v))


# --------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.gpu
@pytest.mark.parametrize(("kv_dtype", "heads"), [(None, (8, 2)), (E4M3, (16, 2))], ids=["bf16", "fp8 KV"])
def test_graph_captured_short_and_replayed_long(kv_dtype: torch.dtype | None, heads: tuple[int, int]) -> None:
    case = Case("graph", heads=heads, kv_dtype=kv_dtype)
    replay_other_lengths(case, lambda batch, actual: check(actual, expect(batch)))


@pytest.mark.gpu
def test_plan_does_not_wait() -> None:
    device = torch.device("cuda")
    case = Case("plan", storage="ragged")
    batch = make_batch(case, device)
    batch = replace(batch, indices=tuple(x.to(device) for x in batch.indices))
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan(wrapper, batch)
        result = wrapper.run(*arguments(batch), return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(result, expect(batch))


def test_torch_compile(device: torch.device) -> None:
    """Traced without a graph break, with the same result; a new plan needs no new trace."""
    paged, ragged = Case("compiled"), Case("compiled", storage="ragged")
    wrappers = [make_wrapper(case, device) for case in (paged, ragged)]

    def layer(q: Tensor, cache: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = wrappers[0].run(q * 2, cache, return_lse=True, v_scale=0.5)
        other, other_lse = wrappers[1].forward_return_lse(q, k, v, causal=True, sm_scale=0.1)
        merged, merged_lse = flashinfer.merge_state(out, lse, other, other_lse)
        flashinfer.merge_state_in_place(merged, merged_lse, other, other_lse)
        both = flashinfer.merge_states(torch.stack([out, other], 1), torch.stack([lse, other_lse], 1))
        single = flashinfer.single_prefill_with_kv_cache(q[:33], k[:33], v[:33], causal=True)
        return out + 1, lse, merged, merged_lse, *both, single

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        batches = [make_batch(case, device, seed) for case in (paged, ragged)]
        for wrapper, batch in zip(wrappers, batches):
            plan(wrapper, batch)
        given = (batches[0].q, batches[0].kv, *batches[1].kv)
        for ours, eager in zip(compiled(*given), layer(*given)):
            assert torch.equal(ours, eager)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_errors_name_the_argument(device: torch.device) -> None:
    case = Case("errors")
    batch = make_batch(case, device)
    wrapper = make_wrapper(case, device)
    with pytest.raises(UnsupportedConfig, match="jit_args"):
        make_wrapper(case, device, jit_args=["a_module"])
    with pytest.raises(ValueError, match=r"run\(\) before plan"):
        wrapper.run(batch.q, batch.kv)
    plan(wrapper, batch)
    with pytest.raises(ValueError, match="q has shape"):
        wrapper.run(batch.q[:, :4], batch.kv)
    with pytest.raises(ValueError, match="page_size"):
        wrapper.run(batch.q, batch.kv[:, :, :8])
    with pytest.raises(ValueError, match="out is"):
        wrapper.run(batch.q, batch.kv, out=batch.q[:5])
    with pytest.raises(ValueError, match=r"lse is torch\.bfloat16"):
        wrapper.run(batch.q, batch.kv, lse=batch.q[..., 0].contiguous(), return_lse=True)
    if device.type == "cuda":
        with pytest.raises(ValueError, match="lse is on cpu"):
            wrapper.run(batch.q, batch.kv, lse=torch.empty(batch.q.shape[:2]), return_lse=True)
    with pytest.raises(ValueError, match="qo_indptr"):
        wrapper.plan(torch.tensor([0, 5, 3], dtype=torch.int32), *batch.indices[1:], 8, 2, 128, 16)
    with pytest.raises(UnsupportedConfig, match="multiple"):
        plan(wrapper, replace(batch, case=replace(case, heads=(7, 2))))
    with pytest.raises(UnsupportedConfig, match="head_dim"):
        plan(wrapper, replace(batch, case=replace(case, head_dim=80)))
    with pytest.raises(UnsupportedConfig, match="pos_encoding_mode"):
        plan(wrapper, batch, pos_encoding_mode="SPIRAL")
    with pytest.raises(TypeError, match="no_such_argument"):
        plan(wrapper, batch, no_such_argument=1)
    with pytest.raises(TypeError, match="by keyword"):
        wrapper.run(batch.q, batch.kv, 0.5)


@pytest.mark.parametrize("scale", [0.0, -0.5, math.nan, math.inf])
def test_a_scale_that_is_not_positive_is_refused(device: torch.device, scale: float) -> None:
    batch = make_batch(Case("scale"), device)
    wrapper = make_wrapper(batch.case, device)
    with pytest.raises(ValueError, match=r"sm_scale is .*; expected a positive number"):
        plan(wrapper, batch, sm_scale=scale)
    plan(wrapper, batch)
    with pytest.raises(ValueError, match=r"sm_scale is .*; expected a positive number"):
        wrapper.forward(*arguments(batch), sm_scale=scale)
    with pytest.raises(ValueError, match=r"q_scale \* k_scale is .*; expected a positive number"):
        wrapper.run(*arguments(batch), q_scale=scale)
    with pytest.raises(ValueError, match=r"sm_scale is .*; expected a positive number"):
        flashinfer.single_prefill_with_kv_cache(batch.q, batch.k[0].to(device), batch.v[0].to(device), sm_scale=scale)


# -------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"])
def test_every_option_compiles(target: str) -> None:
    for case in CASES:
        if case.q_dtype == FP32:
            continue
        q_dtype = "bf16" if case.q_dtype == BF16 else "fp16"
        pos_encodings = {"ROPE_LLAMA": "rope", "ALIBI": "alibi"}
        spec = families.prefill(
            target,
            q_dtype=q_dtype,
            kv_dtype={E4M3: "fp8_e4m3", E5M2: "fp8_e5m2", None: q_dtype}[case.kv_dtype],
            head_dim=case.head_dim,
            head_dim_vo=case.head_dim_vo,
            kv_storage=case.storage,
            mask="custom" if case.mask else "causal" if case.options.get("causal") else "none",
            pos_encoding=pos_encodings.get(case.options.get("pos_encoding_mode", ""), "none"),
            has_window="window_left" in case.options,
            has_soft_cap="logits_soft_cap" in case.options,
        )
        default_resolver().load(spec)


@pytest.mark.slow
def test_random_sweep(device: torch.device) -> None:
    """Legal combinations of options, lengths, shapes and dtypes, drawn with a fixed seed."""
    draw = random.Random(7)
    for i in range(60 if device.type == "cuda" else 20):
        batch_size = draw.randint(1, 9)
        kv_lens = tuple(draw.choice((0, 1, 15, 64, 65, 200, 1500)) + draw.randint(0, 3) for _ in range(batch_size))
        qo_lens = tuple(draw.choice((0, 1, 2, 17, 64, 130)) for _ in range(batch_size))
        kv_heads = draw.choice((1, 2, 3))
        options: dict[str, Any] = {"causal": draw.random() < 0.5}
        if draw.random() < 0.3:
            options["window_left"] = draw.choice((0, 7, 64, 300))
        if draw.random() < 0.3:
            options["logits_soft_cap"] = draw.choice((5.0, 30.0))
        if draw.random() < 0.4:
            options["pos_encoding_mode"] = draw.choice(("ALIBI", "ROPE_LLAMA"))
        q_dtype = draw.choice((BF16, FP16))
        case = Case(
            f"sweep {i}", qo_lens, kv_lens, (kv_heads * draw.choice((1, 3, 4, 8)), kv_heads), draw.choice((64, 128)),
            page_size=draw.choice((1, 5, 16, 64)), q_dtype=q_dtype, kv_dtype=draw.choice((None, None, E4M3, E5M2)),
            layout=draw.choice(("NHD", "HND")), storage=draw.choice(("paged", "ragged")),
            mask=draw.choice(("", "", "", "bool")), options=options,
        )  # fmt: skip
        batch = make_batch(case, device, seed=i)
        wrapper = make_wrapper(case, device)
        plan(wrapper, batch)
        try:
            check(run(wrapper, batch), expect(batch), tolerance_of(case, device))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
