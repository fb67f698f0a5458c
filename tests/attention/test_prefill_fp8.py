# SPDX-License-Identifier: Apache-2.0
"""Prefill of fp8 (e4m3) queries over KV of that dtype: on the CPU and by the kernel for every GPU, which widen
everything, and on Hopper, whose tensor cores multiply in 8 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.attention import prefill_kit as kit
from tests.attention.fp8_kit import check
from tests.attention.named_cases import named
from tests.attention.prefill_kit import BF16, E4M3, FP16


def Case(name: str, *args: Any, **fields: Any) -> kit.Case:  # noqa: N802
    return kit.Case(name, *args, **{"q_dtype": E4M3, "o_dtype": BF16, **fields})


LONG: dict[str, Any] = {"qo_lens": (700, 1, 300), "kv_lens": (900, 1000, 300), "heads": (4, 2)}
CASES = [
    Case("ordinary"),
    Case("ragged", storage="ragged"),
    Case("long", **LONG),
    Case("long_ragged_not_causal", **LONG, storage="ragged", options={}),
    # Logits far apart: the running maximum rises all the time, and the output is rescaled.
    Case("far_apart", (300, 400), (900, 400), options={"causal": True, "sm_scale": 0.5}),
    *[Case(f"page_{size}", (200, 70), (600, 70), page_size=size) for size in (1, 3, 8, 24, 64, 256)],
    Case("page_5", (200, 70), (600, 70), page_size=5),
    *[Case(f"head_dim_{dim}", **LONG, head_dim=dim) for dim in (32, 96, 192)],
    *[Case(f"head_dim_256_page_{size}", **LONG, head_dim=256, page_size=size) for size in (1, 3, 5)],
    Case("rope", options={"causal": True, "pos_encoding_mode": "ROPE_LLAMA"}),
    Case("rope_head_dim_64", **LONG, head_dim=64, options={"causal": True, "pos_encoding_mode": "ROPE_LLAMA"}),
    Case("head_dim_256_page_1_many_splits", (3,), (20000,), (4, 1), head_dim=256, page_size=1),
    Case("page_1_head_dim_64", **LONG, head_dim=64, page_size=1),
    Case("page_1_mla_shapes", **LONG, head_dim=192, head_dim_vo=128, page_size=1),
    Case("page_1_many_splits", (3,), (20000,), (4, 1), page_size=1),
    Case("page_1_alibi", page_size=1, options={"causal": True, "pos_encoding_mode": "ALIBI"}),
    Case("window", (700, 300), (900, 300), options={"causal": True, "window_left": 150}),
    Case("window_0", storage="ragged", options={"causal": True, "window_left": 0}),
    Case("fp16", o_dtype=FP16),
    Case("hnd", layout="HND"),
    Case("ragged_hnd", layout="HND", storage="ragged"),
    *(replace(case, q_dtype=E4M3, o_dtype=BF16) for case in kit.LENGTHS_AND_HEADS),
    Case("group_7", heads=(14, 2), storage="ragged"),
    Case("head_dim_256", **LONG, head_dim=256),
    Case("head_dim_256_ragged_not_causal", **LONG, head_dim=256, storage="ragged", options={}),
    Case("head_dim_64", **LONG, head_dim=64),
    Case("head_dim_64_ragged_not_causal", **LONG, head_dim=64, storage="ragged", options={}),
    Case("head_dim_64_many_splits", (3,), (20000,), (4, 1), head_dim=64),
    Case("mla_shapes", **LONG, head_dim=192, head_dim_vo=128),
    Case("mla_shapes_ragged", head_dim=192, head_dim_vo=128, heads=(4, 4), storage="ragged"),
    Case("soft_cap", options={"causal": True, "logits_soft_cap": 8.0}),
    Case("alibi", options={"causal": True, "pos_encoding_mode": "ALIBI"}),
    Case("custom_mask", mask="bool", options={}),
]

SANITIZED = {"ordinary", "ragged", "many_splits", "no_kv", "head_dim_64", "head_dim_256", "mla_shapes_ragged", "page_1"}
SANITIZED |= {"head_dim_96", "head_dim_256_page_1", "rope"}


@pytest.mark.parametrize("case", named(CASES, sanitized=SANITIZED))
def test_against_the_oracle(device: torch.device, case: kit.Case) -> None:
    batch = kit.make_batch(case, device)
    wrapper = kit.make_wrapper(case, device)
    kit.plan(wrapper, batch)
    check(device, batch, kit.run(wrapper, batch))


@pytest.mark.parametrize("storage", ["paged", "ragged"])
def test_scales(device: torch.device, storage: str) -> None:
    case = Case("scales", storage=storage)
    batch = kit.make_batch(case, device)
    wrapper = kit.make_wrapper(case, device)
    kit.plan(wrapper, batch)
    scales = {"q_scale": 0.5, "k_scale": 0.7, "v_scale": 1.7}
    check(device, batch, kit.run(wrapper, batch, **scales), **scales)


@pytest.mark.parametrize("lengths", [(77, 150), (3, 4000), (1, 1), (0, 5), (6, 0)], ids=str)
def test_single(device: torch.device, lengths: tuple[int, int]) -> None:
    case = Case("single", lengths[:1], lengths[1:], storage="ragged")
    batch = kit.make_batch(case, device)
    k, v = batch.kv
    options: dict[str, Any] = {"causal": True, "o_dtype": BF16, "scale_q": 0.5, "scale_k": 0.7, "scale_v": 1.7}
    actual = flashinfer.single_prefill_with_kv_cache_return_lse(batch.q, k, v, **options)
    assert actual[0].dtype == BF16
    check(device, batch, actual, q_scale=0.5, k_scale=0.7, v_scale=1.7)


@pytest.mark.gpu
def test_what_accumulates_over_long_kv() -> None:
    """Of 8-bit products the tensor cores keep no more than some 13 bits below their sum so far, which over all of these
    keys, alike, loses 26% of their mean. Over a tile of 128 it is 0.3%: each has its own sum."""
    device = torch.device("cuda")
    case = Case("accumulated", (100,), (16384,), (2, 1), storage="ragged", options={})
    batch = kit.make_batch(case, device)
    batch.v[0].copy_((torch.randn(16384, 1, 128, generator=torch.Generator().manual_seed(2)) * 0.1 + 1).to(E4M3))
    batch.kv[1].copy_(batch.v[0])
    wrapper = kit.make_wrapper(case, device)
    kit.plan(wrapper, batch, disable_split_kv=True)
    out, lse = kit.run(wrapper, batch)
    ratio = out.cpu().double() / kit.expect(batch)[0]
    assert 0.995 < ratio.mean() < 1.001, ratio.mean()
    check(device, batch, (out, lse))


GRAPHS = [
    Case("fp8"),
    Case("fp8_page_1", page_size=1),
    Case("fp8_page_5", page_size=5),
    Case("fp8_head_dim_256_page_1", head_dim=256, page_size=1),
    Case("fp8_rope", options={"causal": True, "pos_encoding_mode": "ROPE_LLAMA"}),
    Case("bf16_over_fp8", q_dtype=BF16, kv_dtype=E4M3),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: case.name)
def test_plan_and_run_in_one_graph(case: kit.Case) -> None:
    device = torch.device("cuda")
    kit.replay_other_lengths(case, lambda batch, actual: check(device, batch, actual))


@pytest.mark.gpu
def test_agrees_with_the_cpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    case = Case("twins", (100, 7), (300, 900))
    results = []
    for device in (cpu, cuda):
        batch = kit.make_batch(case, device)
        wrapper = kit.make_wrapper(case, device)
        kit.plan(wrapper, batch)
        results.append(kit.run(wrapper, batch))
    expected, lse = (x.double() for x in results[0])
    check(cuda, batch, results[1], expected=(expected, lse))


@pytest.mark.parametrize("lengths", [((200, 70), (600, 70)), ((3, 1), (130, 1))], ids=["long", "short"])
@pytest.mark.parametrize("q_dtype", [E4M3, BF16], ids=["fp8", "bf16"])
def test_rows_around_those_of_the_batch_are_not_read(
    device: torch.device, q_dtype: torch.dtype, lengths: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    case = Case("surrounded", *lengths, storage="ragged", q_dtype=q_dtype, kv_dtype=E4M3)
    batch = kit.make_batch(case, device)
    batch.kv = kit.surround(batch)
    wrapper = kit.make_wrapper(case, device)
    kit.plan(wrapper, batch)
    check(device, batch, kit.run(wrapper, batch))


def test_the_output_needs_a_dtype(device: torch.device) -> None:
    case = Case("dtype", o_dtype=None)
    batch = kit.make_batch(case, device)
    wrapper = kit.make_wrapper(case, device)
    with pytest.raises(UnsupportedConfig, match=r"the output would be torch.float8_e4m3fn.*o_data_type"):
        kit.plan(wrapper, batch)
        kit.run(wrapper, batch)
    k, v = (x.to(device) for x in (batch.k[0], batch.v[0]))
    with pytest.raises(UnsupportedConfig, match=r"the output would be torch.float8_e4m3fn.*o_dtype"):
        flashinfer.single_prefill_with_kv_cache(batch.q[:33], k, v)


def test_what_is_not_fp8_throughout_is_refused(device: torch.device) -> None:
    case = Case("mixed")
    batch = kit.make_batch(case, device)
    q, k, v = batch.q[:33], batch.k[0].to(device), batch.v[0].to(device)
    with pytest.raises(UnsupportedConfig, match="expected fp8 queries over KV of their dtype"):
        flashinfer.single_prefill_with_kv_cache(q, k.to(BF16), v.to(BF16), o_dtype=BF16)
    with pytest.raises(UnsupportedConfig, match="expected the dtype of q"):
        flashinfer.single_prefill_with_kv_cache(q.to(BF16), k, v, o_dtype=FP16)
