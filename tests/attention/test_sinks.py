# SPDX-License-Identifier: Apache-2.0
"""Attention sinks on both targets against the FP64 oracle: one more term of a row's denominator, whatever else happens
to its scores, and however many parts its keys are cut into."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.attention import decode_kit, fp8_kit, prefill_kit
from tests.attention.decode_kit import BF16, E4M3, E5M2, FP16
from tests.attention.named_cases import named
from tests.attention.prefill_kit import CAUSAL
from tests.oracles.attention import LOG2_E, attention


def draw_sinks(num_heads: int, seed: int = 5) -> Tensor:
    """From logits that weigh next to nothing to such that outweigh thousands of keys: a sink that is left out, that
    enters twice, or that a scale or a soft cap is applied to, shows."""
    sinks = torch.rand(num_heads, generator=torch.Generator().manual_seed(seed)) * 14 - 2
    sinks[0] = -math.inf
    return sinks


# --------------------------------------------------------------------------------------------------------------- decode

Decode = decode_kit.Case
GPT_OSS = {"heads": (16, 2), "head_dim": 64}
DECODE_CASES = [
    Decode("ordinary"),
    Decode("gpt_oss", **GPT_OSS),
    Decode("gpt_oss_window", **GPT_OSS, kv_lens=(33, 1, 0, 640, 4000), options={"window_left": 127}),
    Decode("gpt_oss_e4m3", **GPT_OSS, kv_dtype=E4M3, options={"k_scale": 0.5, "v_scale": 2.0}),
    Decode("fp16_hnd_page_1", q_dtype=FP16, layout="HND", page_size=1),
    Decode("one_long_request", kv_lens=(9000,)),
    Decode("short_among_long", kv_lens=(4000, 3, 2500, 1, 1, 3000)),
    Decode("merged_in_groups", kv_lens=(9000, 0, 8500, 40, 2), heads=(8, 1)),
    Decode("no_kv", kv_lens=(0, 5, 0, 0, 300, 0)),
    Decode("only_no_kv", kv_lens=(0, 0, 0)),
    Decode("empty_batch", kv_lens=()),
    Decode("group_11", heads=(22, 2)),
    Decode("group_40", heads=(40, 1)),
    Decode("head_dim_256", head_dim=256, kv_lens=(12000, 700), heads=(3, 1)),
    Decode("window_0", options={"window_left": 0}),
    Decode("scale_soft_cap", options={"logits_soft_cap": 3.0, "sm_scale": 0.3, "q_scale": 0.5}),
    Decode("alibi", options={"pos_encoding_mode": "ALIBI"}, heads=(6, 2)),
    Decode("rope_e5m2", kv_dtype=E5M2, options={"pos_encoding_mode": "ROPE_LLAMA"}),
]
SANITIZED = {"gpt_oss_window", "merged_in_groups", "no_kv"}


@pytest.mark.parametrize("case", named(DECODE_CASES, sanitized=SANITIZED))
def test_decode(case: Decode, device: torch.device) -> None:
    batch, sinks = decode_kit.Batch(case, device), draw_sinks(case.heads[0])
    wrapper = decode_kit.make_wrapper(device, case.layout)
    batch.plan(wrapper)
    for _ in range(2):  # counters are back at zero
        actual = batch.run(wrapper, sinks=sinks.to(device))
        decode_kit.check(actual, batch.expected(sinks=sinks), case)
    decode_kit.check(batch.run(wrapper), batch.expected(), case)


@pytest.mark.parametrize("kv_len", [0, 1, 77, 9000])
@pytest.mark.parametrize("window_left", [-1, 127])
def test_single_decode(kv_len: int, window_left: int, device: torch.device) -> None:
    generator, sinks = torch.Generator().manual_seed(1), draw_sinks(16)
    q, k, v = (decode_kit.random_rows(size, BF16, generator) for size in ((16, 64), (kv_len, 2, 64), (kv_len, 2, 64)))
    expected = attention(q[None], k, v, window_left=window_left, sinks=sinks)
    given = [x.to(device) for x in (q, k, v)]
    for _ in range(2):
        out, lse = flashinfer.single_decode_with_kv_cache(
            *given, window_left=window_left, return_lse=True, sinks=sinks.to(device)
        )
        decode_kit.check((out[None], lse[None]), expected, Decode("single"))


# -------------------------------------------------------------------------------------------------------------- prefill

Prefill = prefill_kit.Case
LONG: dict[str, Any] = {"qo_lens": (700, 1, 300), "kv_lens": (900, 1000, 300)}
SHORT: dict[str, Any] = {"qo_lens": (16, 1, 5, 0, 9), "kv_lens": (1500, 900, 5, 70, 3)}
WINDOW = {"causal": True, "window_left": 127}
PREFILL_CASES = [
    Prefill("ordinary"),
    Prefill("ragged", storage="ragged"),
    Prefill("gpt_oss", **LONG, **GPT_OSS),
    Prefill("gpt_oss_window", **LONG, **GPT_OSS, options=WINDOW),
    Prefill("gpt_oss_page_1", **LONG, **GPT_OSS, page_size=1, options=WINDOW),
    Prefill("gpt_oss_ragged", **LONG, **GPT_OSS, storage="ragged"),
    Prefill("gpt_oss_e4m3", **LONG, **GPT_OSS, kv_dtype=E4M3, options=WINDOW),
    Prefill("gpt_oss_short", **SHORT, **GPT_OSS),
    Prefill("gpt_oss_short_e4m3", **SHORT, **GPT_OSS, kv_dtype=E4M3),
    Prefill("gpt_oss_short_window", **SHORT, **GPT_OSS, options=WINDOW),
    Prefill("far_apart", (300, 400), (900, 400), options={"causal": True, "sm_scale": 1.0}),
    Prefill("mla_shapes", head_dim=192, head_dim_vo=128, heads=(4, 4), storage="ragged"),
    Prefill("head_dim_96_group_7", head_dim=96, heads=(14, 2), q_dtype=FP16),
    Prefill("head_dim_256", **LONG, head_dim=256),
    Prefill("soft_cap", options={"causal": True, "logits_soft_cap": 8.0}),
    Prefill("alibi", options={"causal": True, "pos_encoding_mode": "ALIBI"}),
    Prefill("rope", options={"causal": True, "pos_encoding_mode": "ROPE_LLAMA"}),
    Prefill("custom_mask", mask="bool", options={}),
    *prefill_kit.LENGTHS_AND_HEADS,
]


def run_prefill(case: Prefill, device: torch.device) -> tuple[prefill_kit.Batch, tuple[Tensor, Tensor], Tensor]:
    batch, sinks = prefill_kit.make_batch(case, device), draw_sinks(case.heads[0])
    wrapper = prefill_kit.make_wrapper(case, device)
    prefill_kit.plan(wrapper, batch)
    actual = prefill_kit.run(wrapper, batch, sinks=sinks.to(device))
    again = prefill_kit.run(wrapper, batch, sinks=sinks.to(device))
    assert torch.equal(actual[0], again[0]) and torch.equal(actual[1], again[1])
    return batch, actual, sinks


@pytest.mark.parametrize("case", named(PREFILL_CASES, sanitized={"gpt_oss_window", "gpt_oss_short", "many_splits"}))
def test_prefill(case: Prefill, device: torch.device) -> None:
    batch, actual, sinks = run_prefill(case, device)
    prefill_kit.check(actual, prefill_kit.expect(batch, sinks=sinks), prefill_kit.tolerance_of(case, device))


FP8: dict[str, Any] = {"q_dtype": E4M3, "kv_dtype": E4M3, "o_dtype": BF16}
FP8_CASES = [
    Prefill("gpt_oss", **LONG, **GPT_OSS, **FP8, options=WINDOW),
    Prefill("ragged", **LONG, **FP8, storage="ragged"),
    Prefill("many_splits", qo_lens=(3,), kv_lens=(20000,), heads=(4, 1), **FP8),
]


@pytest.mark.parametrize("case", FP8_CASES, ids=lambda case: case.name)
def test_fp8_queries(case: Prefill, device: torch.device) -> None:
    batch, actual, sinks = run_prefill(case, device)
    fp8_kit.check(device, batch, actual, sinks=sinks)


@pytest.mark.parametrize("lengths", [(77, 150), (3, 4000), (0, 5), (6, 0), (9, 4)], ids=str)
@pytest.mark.parametrize("options", [CAUSAL, WINDOW, {}], ids=["causal", "window", "not causal"])
def test_single_prefill(lengths: tuple[int, int], options: dict[str, Any], device: torch.device) -> None:
    generator, sinks = torch.Generator().manual_seed(1), draw_sinks(16)
    sizes = (lengths[0], 16, 64), (lengths[1], 2, 64), (lengths[1], 2, 64)
    q, k, v = (torch.randn(size, generator=generator).to(device, BF16) for size in sizes)
    expected = attention(q, k, v, **options, sinks=sinks)
    for _ in range(2):
        given = {**options, "sinks": sinks.to(device)}
        prefill_kit.check(flashinfer.single_prefill_with_kv_cache_return_lse(q, k, v, **given), expected)


def test_a_sink_enters_once_however_keys_are_split(device: torch.device) -> None:
    """In the merge of partial results, and not in each."""
    case = Prefill("split", qo_lens=(3, 1), kv_lens=(20000, 9000), **GPT_OSS)
    batch, sinks = prefill_kit.make_batch(case, device), torch.full((16,), 9.0, device=device)
    wrapper, results = prefill_kit.make_wrapper(case, device), []
    for disable_split_kv in (False, True):
        prefill_kit.plan(wrapper, batch, disable_split_kv=disable_split_kv)
        results.append(prefill_kit.run(wrapper, batch, sinks=sinks))
        prefill_kit.check(results[-1], prefill_kit.expect(batch, sinks=sinks))
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------------- their values

KINDS = ("decode", "decode split", "prefill", "prefill short", "prefill split")


class Layer:
    """One call of a planned wrapper, whose sinks are to change."""

    def __init__(self, kind: str, device: torch.device) -> None:
        kv_lens = (9000, 40) if "split" in kind else (300, 40)
        if "decode" in kind:
            batch = decode_kit.Batch(Decode(kind, kv_lens=kv_lens, **GPT_OSS), device)
            wrapper = decode_kit.make_wrapper(device)
            batch.plan(wrapper)
            self.run = lambda **extra: batch.run(wrapper, **extra)
            self.check = lambda actual, sinks: decode_kit.check(actual, batch.expected(sinks=sinks), batch.case)
        else:
            case = Prefill(kind, (3, 2) if "s" in kind.split()[-1] else (200, 30), kv_lens, **GPT_OSS)
            whole = prefill_kit.make_batch(case, device)
            planned = prefill_kit.make_wrapper(case, device)
            prefill_kit.plan(planned, whole)
            self.run = lambda **extra: prefill_kit.run(planned, whole, **extra)
            self.check = lambda actual, sinks: prefill_kit.check(actual, prefill_kit.expect(whole, sinks=sinks))


@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinity_is_no_sink(kind: str, device: torch.device) -> None:
    layer = Layer(kind, device)
    plain, with_none = layer.run(), layer.run(sinks=torch.full((16,), -math.inf, device=device))
    assert torch.equal(plain[0], with_none[0]) and torch.equal(plain[1], with_none[1])


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_sinks(kind: str, device: torch.device) -> None:
    """None of them spills over into another head."""
    layer, sinks = Layer(kind, device), draw_sinks(16).to(device)
    ordinary = layer.run(sinks=sinks)
    extreme = {3: math.inf, 5: math.nan, 7: 3e38, 9: -3e38, 11: 100.0, 13: -100.0}
    for head, value in extreme.items():
        sinks[head] = value
    out, lse = layer.run(sinks=sinks)
    others = [head for head in range(16) if head not in extreme]
    assert torch.equal(out[:, others], ordinary[0][:, others]) and torch.equal(lse[:, others], ordinary[1][:, others])
    assert not out[:, [3, 7, 11]].any() and out[:, 5].isnan().all() and lse[:, 5].isnan().all()
    assert (lse[:, [3, 7]] == math.inf).all()  # 3e38 nepers are more than fp32 holds in bits
    torch.testing.assert_close(lse[:, 11], torch.full_like(lse[:, 11], 100.0 * LOG2_E))
    plain = layer.run()
    none = [9, 13]
    assert torch.equal(out[:, none], plain[0][:, none]) and torch.equal(lse[:, none], plain[1][:, none])


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_has_its_own(kind: str, device: torch.device) -> None:
    """Of one signature, so that one prepared launch serves them; they are read when a run is, not planned."""
    layer = Layer(kind, device)
    layers = [draw_sinks(16, seed).to(device) for seed in range(3)]
    for sinks in (*layers, None, *layers):
        layer.check(layer.run() if sinks is None else layer.run(sinks=sinks), sinks)
    layers[0].copy_(layers[1])
    layer.check(layer.run(sinks=layers[0]), layers[1])


# ----------------------------------------------------------------------------------------------------- upstream's names


def sink_wrapper(case: Any, device: torch.device, **options: Any) -> Any:
    size = (64 << 20) if device.type == "cuda" else 0
    name = (
        "BatchDecodeWithAttentionSinkWrapper" if isinstance(case, Decode) else "BatchAttentionWithAttentionSinkWrapper"
    )
    kind = getattr(flashinfer, name)
    given = {"q_data_type": BF16, "kv_data_type": BF16, "head_dim_qk": 64, "head_dim_vo": 64, "window_left": 127}
    return kind(torch.empty(size, dtype=torch.uint8, device=device), case.layout, backend="auto", **given, **options)


def test_prefill_wrapper(device: torch.device) -> None:
    case = Prefill("wrapper", **LONG, **GPT_OSS, options=WINDOW)
    batch, sinks = prefill_kit.make_batch(case, device), draw_sinks(16)
    wrapper = sink_wrapper(case, device)
    assert isinstance(wrapper, flashinfer.BatchPrefillWithPagedKVCacheWrapper)
    prefill_kit.plan(wrapper, batch)
    out = torch.empty_like(batch.q)
    # As vLLM calls it.
    assert wrapper.run(batch.q, batch.kv, sinks.to(device), 0.2, v_scale=0.5, k_scale=1.5, out=out) is out
    expected = prefill_kit.expect(batch, sinks=sinks, sm_scale=0.2, v_scale=0.5, k_scale=1.5)
    again, lse = wrapper.run_return_lse(batch.q, batch.kv, sinks.to(device), 0.2, v_scale=0.5, k_scale=1.5)
    assert torch.equal(again, out)
    prefill_kit.check((out, lse), expected)
    prefill_kit.check(prefill_kit.run(wrapper, batch, sinks=sinks.to(device)), prefill_kit.expect(batch, sinks=sinks))


def test_decode_wrapper(device: torch.device) -> None:
    case = Decode("wrapper", **GPT_OSS, options={"window_left": 127})
    batch, sinks = decode_kit.Batch(case, device), draw_sinks(16)
    wrapper = sink_wrapper(case, device, use_cuda_graph=False)
    assert isinstance(wrapper, flashinfer.BatchDecodeWithPagedKVCacheWrapper)
    batch.plan(wrapper)
    out, lse = wrapper.run(batch.q.to(device), batch.cache, sinks.to(device), 0.2, return_lse=True, window_left=30)
    decode_kit.check((out, lse), batch.expected(sinks=sinks, sm_scale=0.2, window_left=30), case)
    decode_kit.check(batch.run(wrapper, sinks=sinks.to(device)), batch.expected(sinks=sinks), case)


@pytest.mark.parametrize(
    "case", [Decode("wrapper", **GPT_OSS), Prefill("wrapper", **GPT_OSS)], ids=["decode", "prefill"]
)
def test_wrappers_for_sinks_want_them(case: Any) -> None:
    cpu = torch.device("cpu")
    wrapper = sink_wrapper(case, cpu)
    if isinstance(case, Decode):
        batch = decode_kit.Batch(case, cpu)
        batch.plan(wrapper)
        given: tuple[Any, ...] = batch.q, batch.cache
    else:
        whole = prefill_kit.make_batch(case, cpu)
        prefill_kit.plan(wrapper, whole)
        given = whole.q, whole.kv
    assert wrapper._plan.variant.has_sinks  # so a capture finds the kernel loaded
    for call in (wrapper.run, wrapper.forward, wrapper.run_return_lse):
        with pytest.raises(TypeError, match="sinks is missing or None; expected a tensor"):
            call(*given)
    with pytest.raises(TypeError, match="by keyword"):
        wrapper.run(*given, draw_sinks(16), 0.1, 1.0)


@pytest.mark.parametrize("storage", ["paged", "ragged"])
def test_sinks_that_an_engine_assigns(storage: str, device: torch.device) -> None:
    """vLLM leaves them on prefill wrappers."""
    batch, sinks = prefill_kit.make_batch(Prefill("assigned", storage=storage), device), draw_sinks(8)
    wrapper = prefill_kit.make_wrapper(batch.case, device)
    prefill_kit.plan(wrapper, batch)
    wrapper._sinks = sinks.to(device)
    prefill_kit.check(prefill_kit.run(wrapper, batch), prefill_kit.expect(batch, sinks=sinks))
    own = draw_sinks(8, seed=6)
    prefill_kit.check(prefill_kit.run(wrapper, batch, sinks=own.to(device)), prefill_kit.expect(batch, sinks=own))


def test_position_encodings_are_planned() -> None:
    with pytest.raises(UnsupportedConfig, match=r"pos_encoding_mode is 'ROPE_LLAMA'.* Next step: give it to plan\(\)"):
        sink_wrapper(Prefill("rope"), torch.device("cpu"), pos_encoding_mode="ROPE_LLAMA")


# --------------------------------------------------------------------------------------------------- graphs and compile


@pytest.mark.gpu
def test_captured_prefill_reads_them_when_it_is_replayed() -> None:
    device, sinks = torch.device("cuda"), torch.zeros(16, device="cuda")
    case = Prefill("graph", qo_lens=(5, 40, 0, 19), kv_lens=(4000, 700, 0, 90), **GPT_OSS, options=WINDOW)
    batch = prefill_kit.make_batch(case, device)
    wrapper = prefill_kit.graph_wrapper(case, device, 600)
    prefill_kit.plan(wrapper, batch)
    wrapper.run(batch.q, batch.kv, sinks=sinks)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = wrapper.run(batch.q, batch.kv, return_lse=True, sinks=sinks)
    for seed in range(3):
        sinks.copy_(draw_sinks(16, seed))
        for poisoned in result:
            poisoned.fill_(math.nan)
        graph.replay()
        prefill_kit.check(result, prefill_kit.expect(batch, sinks=sinks))


@pytest.mark.gpu
def test_captured_decode_reads_them_when_it_is_replayed() -> None:
    device, sinks = torch.device("cuda"), torch.zeros(16, device="cuda")
    batch = decode_kit.Batch(Decode("graph", kv_lens=(5000, 3, 0, 900), **GPT_OSS), device)
    buffers = [x.to(device).clone() for x in (batch.indptr, batch.indices, batch.last_page_len)]
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace, *buffers)
    batch.plan(wrapper)
    batch.run(wrapper, sinks=sinks)
    q = batch.q.to(device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = wrapper.run(q, batch.cache, return_lse=True, sinks=sinks)
    for seed in range(3):
        sinks.copy_(draw_sinks(16, seed))
        for poisoned in result:
            poisoned.fill_(math.nan)
        graph.replay()
        decode_kit.check(result, batch.expected(sinks=sinks), batch.case)


def test_torch_compile(device: torch.device) -> None:
    """Traced without a graph break, with the same result."""
    paged, ragged, decode = Prefill("paged"), Prefill("ragged", storage="ragged"), Decode("compiled")
    wrapper, rows, sinks = (
        sink_wrapper(paged, device),
        prefill_kit.make_wrapper(ragged, device),
        draw_sinks(8).to(device),
    )
    of_decode = decode_kit.make_wrapper(device)
    batch, of_rows, tokens = prefill_kit.make_batch(paged, device), prefill_kit.make_batch(ragged, device), None
    tokens = decode_kit.Batch(decode, device)
    prefill_kit.plan(wrapper, batch)
    prefill_kit.plan(rows, of_rows)
    tokens.plan(of_decode)

    def layer(sinks: Tensor, q: Tensor, cache: Tensor, k: Tensor, v: Tensor, x: Tensor, pages: Tensor) -> list[Tensor]:
        results = [
            wrapper.run(q, cache, sinks * 2, 0.1, return_lse=True),
            rows.run(q, k, v, return_lse=True, sinks=sinks),
            of_decode.run(x, pages, return_lse=True, sinks=sinks),
            flashinfer.single_prefill_with_kv_cache(q[:33], k[:33], v[:33], return_lse=True, sinks=sinks),
            flashinfer.single_decode_with_kv_cache(q[0], k[:33], v[:33], return_lse=True, sinks=sinks),
        ]
        return [part + 1 for result in results for part in result]

    given = (batch.q, batch.kv, *of_rows.kv, tokens.q.to(device), tokens.cache)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        sinks = draw_sinks(8, seed).to(device)
        for ours, eager in zip(compiled(sinks, *given), layer(sinks, *given)):
            assert torch.equal(ours, eager)


# ------------------------------------------------------------------------------------------------------------ bad input


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (torch.zeros(7), ValueError, r"sinks is torch.float32 \[7\] .*expected torch.float32 \[8\]"),
    "axes": (torch.zeros(8, 1), ValueError, r"sinks is torch.float32 \[8, 1\]"),
    "empty": (torch.zeros(0), ValueError, r"sinks is torch.float32 \[0\]|without memory"),
    "dtype": (torch.zeros(8, dtype=BF16), ValueError, "sinks is torch.bfloat16.* Next step: convert it once"),
    "expanded": (torch.zeros(1).expand(8), ValueError, "contiguous"),
    "strided": (torch.zeros(16)[::2], ValueError, "contiguous"),
    "meta": (torch.zeros(8, device="meta"), UnsupportedConfig, "sinks is a Tensor on meta"),
    "sparse": (torch.zeros(8).to_sparse(), (UnsupportedConfig, ValueError, TypeError), "sinks"),  # type: ignore[dict-item]
    "list": ([0.0] * 8, TypeError, "sinks is list; expected a tensor"),
    "number": (0.5, TypeError, "sinks is float; expected a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str, device: torch.device) -> None:
    given, error, message = BAD[name]
    if isinstance(given, Tensor) and name != "meta":
        given = given.to(device) if name != "expanded" else torch.zeros(1, device=device).expand(8)
        given = torch.zeros(16, device=device)[::2] if name == "strided" else given
    batch, tokens = prefill_kit.make_batch(Prefill("bad"), device), decode_kit.Batch(Decode("bad"), device)
    wrapper, of_decode = prefill_kit.make_wrapper(batch.case, device), decode_kit.make_wrapper(device)
    prefill_kit.plan(wrapper, batch)
    tokens.plan(of_decode)
    q, k, v = batch.q, batch.k[2].to(device), batch.v[2].to(device)
    out = torch.full_like(q, 7.0)
    calls = {
        "paged": lambda: wrapper.run(q, batch.kv, out=out, sinks=given),
        "decode": lambda: of_decode.run(tokens.q.to(device), tokens.cache, sinks=given),
        "single prefill": lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, sinks=given),
        "single decode": lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v, sinks=given),
    }
    for call in calls.values():
        with pytest.raises(error, match=message):
            call()
    assert (out == 7).all()


@pytest.mark.gpu
def test_sinks_on_another_device() -> None:
    device = torch.device("cuda")
    batch = prefill_kit.make_batch(Prefill("device"), device)
    wrapper = prefill_kit.make_wrapper(batch.case, device)
    prefill_kit.plan(wrapper, batch)
    with pytest.raises(ValueError, match="sinks is on cpu; expected cuda"):
        wrapper.run(batch.q, batch.kv, sinks=torch.zeros(8))


def test_plans_take_none() -> None:
    """Which are of a batch, where sinks are of a layer."""
    batch = prefill_kit.make_batch(Prefill("plan"), torch.device("cpu"))
    wrapper = prefill_kit.make_wrapper(batch.case, torch.device("cpu"))
    with pytest.raises(
        UnsupportedConfig, match=r"sinks asks for attention sinks.* run\(\) of decode and prefill takes"
    ):
        prefill_kit.plan(wrapper, replace(batch), sinks=torch.zeros(8))
