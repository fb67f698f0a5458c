# SPDX-License-Identifier: Apache-2.0
"""Functions of scores and masks in the kernels, on both targets against themselves on tensors in FP64."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashinfer
from examples import attention_variants as examples
from flashinfer.errors import UnsupportedConfig
from flashinfer.variants import Function, tanh, where
from tests.attention import decode_kit, prefill_kit
from tests.attention.named_cases import skip_elsewhere
from tests.attention.prefill_kit import BF16, E4M3, FP16, FP32, Case
from tests.attention.variant_kit import BATCH, bound, given, of_names, run_decode, run_prefill
from tests.oracles.attention import attention

# A score and a mask each, in one kernel.
PAIRS = [
    (examples.t5, examples.causal),
    (examples.alibi, examples.window_and_first),
    (examples.soft_cap, examples.prefix_lm),
    (examples.head_scale, examples.documents),
    (examples.key_bias, examples.documents_from),
    (examples.t5,),
    (examples.chunked,),
    (examples.some_heads_local,),
]


# Of the kernels for every GPU and for Hopper, long queries and short ones.
PREFILLS = [
    Case("paged", options={}),
    Case("ragged_fp16_head_dim_64", options={}, storage="ragged", q_dtype=FP16, head_dim=64, cuda_only=True),
    Case("short", options={}, qo_lens=(3, 1, 7, 16)),
]


@pytest.mark.parametrize("case", PREFILLS, ids=of_names)
@pytest.mark.parametrize("functions", PAIRS, ids=of_names)
def test_prefill(functions: tuple[Function, ...], case: Case, device: torch.device) -> None:
    skip_elsewhere(case, device)
    run_prefill(case, device, **given(device, *functions))


MORE_PREFILLS = [
    Case("head_dim_256", options={}, head_dim=256, cuda_only=True),
    Case("head_dim_96", options={}, head_dim=96, cuda_only=True),  # of no Hopper kernel
    Case("head_dim_192_128", options={}, head_dim=192, head_dim_vo=128, storage="ragged", cuda_only=True),
    Case("page_1", options={}, page_size=1),
    Case("fp8_kv", options={}, kv_dtype=E4M3),
    Case("split", options={}, qo_lens=(3, 0, 1, 2), kv_lens=(4900, 0, 4000, 5)),
    Case("queries_beyond_kv", options={}, qo_lens=(50, 200, 0, 9), kv_lens=(20, 130, 4, 0)),
    Case("causal_and_window", options={"causal": True, "window_left": 100}),
    Case("rope", options={"pos_encoding_mode": "ROPE_LLAMA"}, q_dtype=FP32),
]


@pytest.mark.parametrize("case", MORE_PREFILLS, ids=of_names)
def test_prefill_of_both(case: Case, device: torch.device) -> None:
    skip_elsewhere(case, device)
    if case.q_dtype == FP32 and device.type == "cuda":
        pytest.skip("rotated operands are rounded again: test_rope_on_the_fly.py")
    for functions in ((examples.t5, examples.window_and_first), (examples.soft_cap, examples.prefix_lm)):
        run_prefill(case, device, **given(device, *functions))


@pytest.mark.parametrize("functions", PAIRS, ids=of_names)
def test_decode(functions: tuple[Function, ...], device: torch.device) -> None:
    case = decode_kit.Case("", kv_lens=(33, 700, 0, 4000), options=given(device, *functions))
    run_decode(case, device)


@pytest.mark.parametrize(
    "case",
    [
        decode_kit.Case("group_16", kv_lens=(33, 700, 1, 4000), heads=(32, 2)),
        decode_kit.Case("head_dim_256", kv_lens=(33, 700, 1, 4000), head_dim=256),
        decode_kit.Case("fp8_kv", kv_lens=(33, 700, 1, 4000), kv_dtype=E4M3),
        decode_kit.Case("merged_in_groups", kv_lens=(4900, 0, 4500, 40), heads=(8, 1)),
    ],
    ids=of_names,
)
def test_decode_of_both(case: decode_kit.Case, device: torch.device) -> None:
    functions = given(device, examples.t5, examples.window_and_first, heads=case.heads[0])
    run_decode(replace(case, options=functions), device)


def test_decode_of_several_queries(device: torch.device) -> None:
    """By the kernels of prefill: a tree of drafts, whose words say what each sees."""
    q_len, kv_lens = 5, (40, 9, 300, 77)
    ancestors = torch.tensor([0b00001, 0b00011, 0b00101, 0b01011, 0b10101], dtype=torch.int32)
    words = ancestors.expand(BATCH, -1).contiguous().to(device)
    seen = torch.tensor([n - q_len for n in kv_lens], dtype=torch.int32, device=device)
    case = Case("", qo_lens=(q_len,) * BATCH, kv_lens=kv_lens, options={"causal": False})
    mask = examples.tree(num_seen=seen, ancestors=words)
    run_prefill(case, device, mask=mask)
    batch = prefill_kit.make_batch(replace(case, options={"mask": mask, "causal": True}), device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(64 << 20 if device.type == "cuda" else 8, dtype=torch.uint8, device=device)
    )
    wrapper.plan(*batch.indices[1:], *case.heads, 128, 16, q_data_type=BF16, q_len_per_req=q_len, mask=mask)
    actual = wrapper.run(batch.q, batch.kv, return_lse=True)
    prefill_kit.check(actual, prefill_kit.expect(batch))


@pytest.mark.parametrize("kv_len", [1, 100, 3000])
def test_single_calls(kv_len: int, device: torch.device) -> None:
    q, k, v = (torch.randn(n, heads, 128).to(device, BF16) for n, heads in ((30, 8), (kv_len, 2), (kv_len, 2)))
    for functions in ((examples.t5, examples.chunked), (examples.alibi, examples.documents_from)):
        options = given(device, *functions, batch=1)
        evaluated = {name: function.evaluate for name, function in options.items()}
        actual = flashinfer.single_prefill_with_kv_cache(q, k, v, return_lse=True, **options)
        prefill_kit.check(actual, attention(q, k, v, **evaluated))
        out, lse = flashinfer.single_decode_with_kv_cache(q[0], k, v, return_lse=True, **options)
        expected = attention(q[:1], k, v, **evaluated)
        prefill_kit.check((out[None], lse[None]), expected)


def test_by_hand_as_built_in(device: torch.device) -> None:
    """ALiBi, a soft cap, a causal mask and a window as functions are what the options are."""

    @flashinfer.mask(size=int)
    def window(b, h, q, k, x):
        return (k <= q) & (k >= q - x.size)

    alibi = {"variant": bound(examples.alibi, device), "mask": examples.causal}
    cap = {"variant": bound(examples.soft_cap, device), "mask": window(size=60)}
    pairs = [
        (alibi, {"pos_encoding_mode": "ALIBI", "causal": True}),
        (cap, {"logits_soft_cap": 3.0, "causal": True, "window_left": 60}),
    ]
    for ours, theirs in pairs:
        case = Case("", options=ours)
        batch = prefill_kit.make_batch(case, device)
        results = []
        for options in (ours, theirs):
            wrapper = prefill_kit.make_wrapper(case, device)
            prefill_kit.plan(wrapper, replace(batch, case=replace(case, options=options)))
            results.append(prefill_kit.run(wrapper, batch))
        for a, b in zip(*results):
            torch.testing.assert_close(
                a, b, atol=2e-2 if a.dtype == BF16 else 2e-4, rtol=1e-2 if a.dtype == BF16 else 1e-4
            )


def test_differential_attention(device: torch.device) -> None:
    """Two calls and a subtraction (Ye et al. 2024): a softmax of either half of q and k, over the same values."""
    q1, q2, k1, k2 = (torch.randn(50, heads, 64).to(device, FP16) for heads in (8, 8, 2, 2))
    v = torch.randn(50, 2, 64).to(device, FP16)
    weight = 0.3
    first, second = (
        flashinfer.single_prefill_with_kv_cache(q, k, v, mask=examples.causal) for q, k in ((q1, k1), (q2, k2))
    )
    expected = attention(q1, k1, v, causal=True)[0] - weight * attention(q2, k2, v, causal=True)[0]
    torch.testing.assert_close((first - weight * second).double().cpu(), expected, atol=4e-3, rtol=4e-3)


def test_numbers_and_tensors_are_no_part_of_a_kernel(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values, other names, another module: the kernel is the same."""
    from flashinfer.jit import default_resolver

    @flashinfer.variant(shift=int, table="f32[num_heads, n]", unused=int)
    def other(logit, request, head, query, key, extra):
        """As examples.t5, in other words."""
        length = extra.shift
        distance = clamp(query - key, -length, length)  # noqa: F821
        return logit + extra.table[head, distance + length]

    case = Case("", options={}, head_dim=64)
    run_prefill(case, torch.device("cpu"), variant=bound(examples.t5, torch.device("cpu")))
    before = set(default_resolver().answered_by)
    for length in (1, 3):
        table = torch.randn(8, 2 * length + 1)
        run_prefill(case, torch.device("cpu"), variant=other(shift=length, table=table, unused=0))
    made = [spec for spec in set(default_resolver().answered_by) - before]
    # "int > 0" of the example is part of what the text says; "int" is another one, made once.
    assert len(made) == 1 and "x1: int;" in made[0].arg("variant")


def test_extras_change_in_place(device: torch.device) -> None:
    case = Case("", options=given(device, examples.key_bias))
    batch, wrapper = prefill_kit.make_batch(case, device), prefill_kit.make_wrapper(case, device)
    prefill_kit.plan(wrapper, batch)
    prefill_kit.run(wrapper, batch)
    case.options["variant"].values["bias"].neg_()
    prefill_kit.check(prefill_kit.run(wrapper, batch), prefill_kit.expect(batch))


def test_values_that_differ_are_planned_again(device: torch.device) -> None:
    case = Case("", options={})
    batch, wrapper = prefill_kit.make_batch(case, device), prefill_kit.make_wrapper(case, device)
    for chunk in (16, 100, 16, 10**9):
        options = {"mask": examples.chunked(chunk=chunk)}
        planned = replace(batch, case=replace(case, options=options))
        prefill_kit.plan(wrapper, planned)
        prefill_kit.check(prefill_kit.run(wrapper, planned), prefill_kit.expect(planned))


def test_nothing_is_read_outside_of_extras(device: torch.device) -> None:
    """An index outside stands for the entry nearest to it, and a mask may hide everything."""

    @flashinfer.variant(table="f32[n]", few="i32[m]")
    def outside(score, b, h, q, k, x):
        return score + x.table[1000 * (k - 5) + x.few[q * q]]

    @flashinfer.mask(limit=int)
    def nothing(b, h, q, k, x):
        return (k > x.limit) & ((k ^ q) >= 0)

    table = torch.randn(30, device=device)
    few = torch.tensor([3, 4], dtype=torch.int32, device=device)
    for limit in (-1, 100, 10**9):
        run_prefill(Case("", options={}), device, variant=outside(table=table, few=few), mask=nothing(limit=limit))
        options = {"variant": outside(table=table, few=few), "mask": nothing(limit=limit)}
        run_decode(decode_kit.Case("", kv_lens=(33, 700, 0, 4000), options=options), device)


@flashinfer.variant(a=float, n="int > 0", words="i32[w]", flags="bool[f]")
def everything(score, b, h, q, k, x):
    s = where((q % x.n == 2) ^ (k // 3 > h), score, -score) * 0.5 + abs(q - k) / (1 + x.n)
    t = exp2(-abs(s)) + exp(-abs(s)) + log2(2 + s * s) - log(3 + s * s) + sqrt(1 + s * s) - rsqrt(1 + s * s)  # noqa: F821
    bits = (x.words[k % 4] >> (q & 31)) & 1 | (x.words[0] << 2) & 4 ^ 3
    u = min(t, 5.0) + max(q - k, -7) % 5 - clamp(bits, 1, 6) + float(int(s * 3.0)) + int(x.flags[k % 3])  # noqa: F821
    return tanh(u * x.a) * 2 - (-q) // x.n * 1e-3 + where(~x.flags[q % 3] & (b != 1), 0, 1)


def test_all_of_the_grammar(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (4,), generator=generator).int().to(device)
    variant = everything(a=0.4, n=3, words=words, flags=torch.tensor([True, False, True], device=device))
    case = Case("", options={"causal": True, "variant": variant}, q_dtype=FP32 if device.type == "cpu" else FP16)
    batch, wrapper = prefill_kit.make_batch(case, device), prefill_kit.make_wrapper(case, device)
    if device.type == "cuda":
        batch.q.zero_()  # int() jumps, and a product of 16 bits might fall on either side
    prefill_kit.plan(wrapper, batch)
    prefill_kit.check(prefill_kit.run(wrapper, batch), prefill_kit.expect(batch))


@pytest.mark.gpu
def test_captured() -> None:
    device = torch.device("cuda")
    case = Case("", options=given(device, examples.key_bias, examples.documents_from))
    prefill_kit.replay_other_lengths(case, lambda batch, result: prefill_kit.check(result, prefill_kit.expect(batch)))


def test_compiled(device: torch.device) -> None:
    """The graph holds the wrapper's call, whatever it planned; single calls say where to plan instead."""
    case = Case("", options=given(device, examples.t5, examples.prefix_lm))
    batch, wrapper = prefill_kit.make_batch(case, device), prefill_kit.make_wrapper(case, device)
    prefill_kit.plan(wrapper, batch)
    run = torch.compile(lambda q, kv: wrapper.run(q, kv, return_lse=True), fullgraph=True, backend="eager")
    prefill_kit.check(run(batch.q, batch.kv), prefill_kit.expect(batch))


def test_tensors_of_earlier_plans_are_let_go(device: torch.device) -> None:
    case = Case("", options={}, kv_lens=(33, 90, 20, 51), qo_lens=(33, 9, 20, 5))
    batch, wrapper = prefill_kit.make_batch(case, device), prefill_kit.make_wrapper(case, device)
    q, k, v = (torch.randn(9, heads, 128).to(device, BF16) for heads in (8, 2, 2))
    held = []
    for _ in range(3):
        bias = torch.randn(4, 100).to(device)
        held.append(weakref.ref(bias))
        functions = {"variant": examples.key_bias(bias=bias)}
        planned = replace(batch, case=replace(case, options=functions))
        prefill_kit.plan(wrapper, planned)
        prefill_kit.run(wrapper, planned)
        flashinfer.single_prefill_with_kv_cache(q, k, v, variant=examples.key_bias(bias=bias[:1]))
        flashinfer.single_decode_with_kv_cache(q[0], k, v, variant=examples.key_bias(bias=bias[:1]))
        del bias, functions, planned
    assert [each() is not None for each in held[:2]] == [False, False]


def test_refusals() -> None:
    cpu = torch.device("cpu")
    case = Case("", options={})
    batch, wrapper = prefill_kit.make_batch(case, cpu), prefill_kit.make_wrapper(case, cpu)

    def plan(**options: Any) -> None:
        prefill_kit.plan(wrapper, batch, **options)

    t5 = bound(examples.t5, cpu)
    for options, error, said in (
        ({"variant": examples.causal}, TypeError, "variant is a mask"),
        ({"mask": t5}, TypeError, "mask is a variant"),
        ({"mask": torch.ones(2)}, TypeError, "custom_mask takes tensors"),
        ({"variant": examples.t5}, TypeError, "L, bias is missing"),
        ({"variant": t5, "logits_soft_cap": 3.0}, UnsupportedConfig, "soft cap"),
        ({"variant": t5, "pos_encoding_mode": "ALIBI"}, UnsupportedConfig, "ALIBI"),
        ({"variant": bound(examples.t5, cpu, heads=4)}, ValueError, r"expected \[8, 11\]"),
        ({"mask": bound(examples.prefix_lm, cpu, batch=3)}, ValueError, r"expected \[4\]"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            plan(**options)
    latent = flashinfer.mla.BatchMLAPagedAttentionWrapper(torch.empty(8, dtype=torch.uint8))
    indptr = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(UnsupportedConfig, match="function of scores"):
        latent.plan(indptr, indptr, indptr[:1], indptr[1:], 4, 512, 64, 1, True, 1.0, BF16, BF16, variant=t5)
    with pytest.raises(TypeError, match="extra is not declared"):
        examples.t5(bias=torch.zeros(8, 11), L=5, extra=1)
    with pytest.raises(ValueError, match="at least 1"):
        examples.chunked(chunk=0)
    with pytest.raises(ValueError, match="above 0"):
        examples.soft_cap(cap=-math.pi)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        examples.alibi(slopes=torch.zeros(8, dtype=torch.float64))


def test_evaluate() -> None:
    """In the precision of its arguments."""
    score = examples.soft_cap(cap=2.0).evaluate(torch.tensor([4.0], dtype=torch.float64), 0, 0, 0, 0)
    assert abs(score.item() - 2 * math.tanh(2.0)) < 1e-15
    seen = examples.documents_from(start=torch.tensor([[0, 0, 2]], dtype=torch.int32)).evaluate(
        0, 0, torch.arange(3)[:, None], torch.arange(3)
    )
    assert seen.tolist() == [[True, False, False], [True, True, False], [False, False, True]]
