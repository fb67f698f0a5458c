# SPDX-License-Identifier: Apache-2.0
"""Operators fused for serving, against the FP64 oracles of their parts, on both targets."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import flashinfer
from flashinfer.activation import silu_and_mul_quant
from flashinfer.errors import UnsupportedConfig
from flashinfer.norm import fused_add_rmsnorm_quant, rmsnorm_quant
from flashinfer.rope import fused_qk_rmsnorm_rope, rope_append_paged_kv_cache
from tests.oracles import activation as activation_oracle
from tests.oracles import norm as norm_oracle
from tests.oracles import page as page_oracle
from tests.oracles import rope as rope_oracle
from tests.tolerances import assert_close

FP8_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_fp8_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the rounding of the FP64 value, but for values next to a tie, where fp32 may fall to the other side.

    `expected` is FP64, not yet rounded or clamped.
    """
    largest = torch.finfo(actual.dtype).max
    got, expected = actual.cpu().double(), expected.cpu().double().clamp(-largest, largest)
    mantissa_bits, smallest = (3, 2.0**-9) if actual.dtype == torch.float8_e4m3fn else (2, 2.0**-16)
    ulp = (2.0 ** torch.floor(torch.log2(expected.abs().clamp_min(1e-30)))) * 2.0**-mantissa_bits
    ulp = ulp.clamp_min(smallest)
    # Half an ulp, and 1e-5 of the value for what fp32 adds before the rounding.
    assert ((got - expected).abs() <= 0.5 * ulp + 1e-5 * expected.abs() + 1e-12).all()


# ------------------------------------------------------------------------------------------------- quantized outputs

ROWS = {"ordinary": (7, 4096), "one row": (1, 2048), "odd": (5, 111), "short": (33, 128), "empty": (0, 256)}


def make_scale(kind: str, value: float, device: torch.device) -> float | torch.Tensor:
    return value if kind == "number" else torch.tensor([value], device=device)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("out_dtype", FP8_DTYPES)
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_rmsnorm_quant(device: torch.device, name: str, dtype: torch.dtype, out_dtype: torch.dtype, kind: str) -> None:
    x, weight = make(ROWS[name], dtype, device, 0), make(ROWS[name][1:], dtype, device, 1)
    out = torch.full(ROWS[name], float("nan")).to(device, out_dtype)
    assert rmsnorm_quant(out, x, weight, make_scale(kind, 0.03, device), 1e-5) is out
    assert_fp8_close(out, norm_oracle.rmsnorm(x, weight, 1e-5) / 0.03)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_fused_add_rmsnorm_quant(device: torch.device, name: str, kind: str) -> None:
    x, residual = make(ROWS[name], torch.bfloat16, device, 0), make(ROWS[name], torch.bfloat16, device, 2)
    weight = make(ROWS[name][1:], torch.bfloat16, device, 1)
    total, before = x.cpu().double() + residual.cpu().double(), x.clone()
    out = torch.full(ROWS[name], float("nan")).to(device, torch.float8_e4m3fn)
    assert fused_add_rmsnorm_quant(out, x, residual, weight, make_scale(kind, 0.02, device), 1e-5) is None
    assert_close(residual, total)
    assert torch.equal(x, before)
    assert_fp8_close(out, norm_oracle.rmsnorm(total, weight, 1e-5) / 0.02)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("out_dtype", FP8_DTYPES)
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_silu_and_mul_quant(
    device: torch.device, name: str, dtype: torch.dtype, out_dtype: torch.dtype, kind: str
) -> None:
    num_rows, hidden_size = ROWS[name]
    x = make((num_rows, 2 * hidden_size), dtype, device, 0)
    out = torch.full(ROWS[name], float("nan")).to(device, out_dtype)
    assert silu_and_mul_quant(out, x, make_scale(kind, 0.05, device)) is out
    assert_fp8_close(out, activation_oracle.act_and_mul("silu", x) / 0.05)


def test_quantized_outputs_saturate_and_keep_nan(device: torch.device) -> None:
    x = make((3, 256), torch.float32, device, 0)
    x[1] = float("nan")
    out = torch.zeros(3, 256, device=device).to(torch.float8_e4m3fn)
    rmsnorm_quant(out, x, torch.ones(256, device=device), 1e-4)
    assert out.float()[[0, 2]].abs().max() == 448 and out.float()[1].isnan().all()


def test_quantized_output_between_other_rows(device: torch.device) -> None:
    """Vectors of the output are shorter than those of the input, and start at any element."""
    x, weight = make((4, 256), torch.bfloat16, device, 0), make((256,), torch.bfloat16, device, 1)
    for offset in (0, 1, 8):
        wide = torch.zeros(4, 300, device=device).to(torch.float8_e4m3fn)
        rmsnorm_quant(wide[:, offset : offset + 256], x, weight, 0.1)
        assert_fp8_close(wide[:, offset : offset + 256], norm_oracle.rmsnorm(x, weight, 1e-6) / 0.1)
        assert wide.float()[:, offset + 256 :].eq(0).all()


def test_errors_of_quantized_outputs(device: torch.device) -> None:
    x, weight = make((4, 64), torch.bfloat16, device, 0), make((64,), torch.bfloat16, device, 1)
    out = torch.zeros(4, 64, device=device).to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedConfig, match=r"out is torch.bfloat16; expected float8_e4m3fn or float8_e5m2"):
        rmsnorm_quant(torch.empty_like(x), x, weight, 1.0)
    with pytest.raises(ValueError, match=r"out has shape \[3, 64\]; expected \[4, 64\], the shape of input"):
        rmsnorm_quant(out[:3], x, weight, 1.0)
    with pytest.raises(ValueError, match=r"scale is torch.float32 of shape \[2\]; expected a number or one float32"):
        rmsnorm_quant(out, x, weight, torch.ones(2, device=device))
    with pytest.raises(UnsupportedConfig, match=r"out is torch.bfloat16; expected float8_e4m3fn or float8_e5m2"):
        silu_and_mul_quant(torch.empty_like(x[:, :32]), x, 1.0)


# ------------------------------------------------------------------------------------------------------ rope and append


class AppendCase(NamedTuple):
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    page_size: int


APPEND_CASES = {
    "llama": AppendCase(32, 8, 128, 128, 16),
    "group of 7, page size 1": AppendCase(28, 4, 128, 128, 1),
    "partial": AppendCase(8, 2, 128, 64, 4),
    "head_dim 64": AppendCase(10, 2, 64, 64, 8),
    "head_dim 96": AppendCase(6, 3, 96, 96, 8),
}
APPEND_INDPTR, SEQ_LENS, NUM_TOKENS = [0, 5, 5, 6, 14], [20, 0, 17, 8], 16  # the last two rows are padding


@pytest.mark.parametrize("name", APPEND_CASES)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *FP8_DTYPES])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("interleave", [False, True])
def test_rope_append(
    device: torch.device, name: str, cache_dtype: torch.dtype, kv_layout: str, interleave: bool
) -> None:
    case = APPEND_CASES[name]
    num_heads = case.num_qo_heads + 2 * case.num_kv_heads
    qkv = make((NUM_TOKENS, num_heads, case.head_dim), torch.bfloat16, device, 0)
    q, k, v = qkv.split([case.num_qo_heads, case.num_kv_heads, case.num_kv_heads], dim=1)
    tensor = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    batch_indices, positions = flashinfer.get_batch_indices_positions(
        tensor(APPEND_INDPTR), tensor(SEQ_LENS), NUM_TOKENS
    )
    counts = [-(-length // case.page_size) for length in SEQ_LENS]
    num_pages = sum(counts) + 2
    kv_indptr = tensor([sum(counts[:i]) for i in range(len(counts) + 1)])
    kv_indices = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).int().to(device)
    cache = torch.full((num_pages, 2, case.page_size, case.num_kv_heads, case.head_dim), float("nan"))
    cache = cache.to(device, cache_dtype)
    if kv_layout == "HND":
        cache = cache.transpose(2, 3).contiguous()
    scales = {} if cache_dtype == torch.bfloat16 else {"k_scale": 0.5, "v_scale": torch.tensor([2.0], device=device)}

    before = qkv.clone()
    q_out = rope_append_paged_kv_cache(
        q,
        k,
        v,
        batch_indices,
        positions,
        cache,
        kv_indices,
        kv_indptr,
        None,
        kv_layout,
        rotary_dim=case.rotary_dim,
        interleave=interleave,
        rope_theta=5e5,
        **scales,
    )
    assert torch.equal(qkv, before)
    angles = rope_oracle.angles_of(positions, rope_oracle.frequencies(case.rotary_dim, 1.0, 5e5))
    assert_close(q_out, rope_oracle.rotate(q, angles, interleave))

    if kv_layout == "HND":
        cache = cache.transpose(2, 3)
    empty = torch.full(cache[:, 0].shape, float("nan"), dtype=torch.float64)
    arguments = (batch_indices, positions, kv_indices, kv_indptr)
    expected_k = page_oracle.append(rope_oracle.rotate(k, angles, interleave), empty, *arguments)
    expected_v = page_oracle.append(v.cpu().double(), empty, *arguments)
    if cache_dtype == torch.bfloat16:
        assert_close(cache[:, 0], expected_k)
        assert_close(cache[:, 1], expected_v)
        return
    written = ~expected_k.isnan()
    assert torch.equal(~cache.cpu().float().isnan()[:, 0], written)
    assert_fp8_close(cache[:, 0].cpu()[written], expected_k[written] / 0.5)
    assert_fp8_close(cache[:, 1].cpu()[written], expected_v[written] / 2.0)


@pytest.mark.sanitizer
def test_rope_append_in_place_with_a_table(device: torch.device) -> None:
    """Queries turned in place; positions in the cache and positions to turn by may differ; int64 indices."""
    q, k, v = (make((6, heads, 64), torch.float16, device, heads) for heads in (4, 2, 1))
    v = v.expand(6, 2, 64).contiguous()
    table_angles = rope_oracle.angles_of(torch.arange(100), rope_oracle.frequencies(64))
    table = torch.cat([table_angles.cos(), table_angles.sin()], 1).float().to(device)
    pos_ids = torch.tensor([5, 99, 0, 3, 3, 50], device=device)
    batch_indices, positions = torch.zeros(6, dtype=torch.int64, device=device), torch.arange(6, device=device)
    cache = torch.zeros(2, 2, 4, 2, 64, dtype=torch.float16, device=device)
    expected_q = rope_oracle.rotate(q, table_angles[pos_ids.cpu()])
    out = rope_append_paged_kv_cache(
        q,
        k,
        v,
        batch_indices,
        positions,
        cache,
        torch.tensor([1, 0], device=device),
        torch.tensor([0, 2], device=device),
        q_out=q,
        pos_ids=pos_ids,
        cos_sin_cache=table,
    )
    assert out is q
    assert_close(q, expected_q)
    rows = cache[[1, 0], 0].flatten(0, 1)[:6]
    assert_close(rows, rope_oracle.rotate(k, table_angles[pos_ids.cpu()]))
    assert torch.equal(cache[[1, 0], 1].flatten(0, 1)[:6], v)


def test_rope_append_llama31(device: torch.device) -> None:
    q, k = make((3, 4, 128), torch.float32, device, 0), make((3, 2, 128), torch.float32, device, 1)
    positions = torch.tensor([0, 9000, 131071], dtype=torch.int32, device=device)
    indices = torch.zeros(1, dtype=torch.int32, device=device)
    out = rope_append_paged_kv_cache(
        q,
        k,
        k,
        torch.zeros_like(positions),
        torch.arange(3, dtype=torch.int32, device=device),
        torch.zeros(1, 2, 4, 2, 128, device=device),
        indices,
        torch.tensor([0, 1], dtype=torch.int32, device=device),
        pos_ids=positions,
        rope_scale=8.0,
        rope_theta=5e5,
        old_context_len=8192,
    )
    angles = rope_oracle.angles_of(positions, rope_oracle.llama31_frequencies(128))
    assert_close(out, rope_oracle.rotate(q, angles))


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("angles_from", ["frequencies", "table"])
def test_programmatic_dependent_launches(captured: bool, angles_from: str) -> None:
    """Each launch reads what the one before it wrote, and is let in before that one has written it: norm and rope, then
    rope and append in place, several times over, then a copy by torch. Many more blocks than fit the GPU at a time."""
    device, num_tokens, page_size, eps = torch.device("cuda"), 2048, 16, 1e-6
    start = make((num_tokens, 48, 128), torch.float32, device, 0)
    weight = make((128,), torch.float32, device, 1)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
    indices = torch.arange(num_tokens // page_size, device=device).int().flip(0)
    indptr = torch.tensor([0, len(indices)], device=device).int()
    angles = rope_oracle.angles_of(positions, rope_oracle.frequencies(128))
    table = torch.cat([angles.cos(), angles.sin()], 1).float().to(device) if angles_from == "table" else None
    qkv, result = torch.empty_like(start), torch.empty_like(start)
    cache = torch.empty(len(indices), 2, page_size, 8, 128, device=device)
    options = {"cos_sin_cache": table, "enable_pdl": True}

    def chain() -> None:
        qkv.copy_(start)
        cache.fill_(torch.nan)
        q, k, v = qkv.split([32, 8, 8], dim=1)
        for _ in range(4):
            fused_qk_rmsnorm_rope(qkv, weight, weight, positions, 32, 8, eps, **options)
            rope_append_paged_kv_cache(
                q, k, v, torch.zeros_like(positions), positions, cache, indices, indptr, q_out=q, **options
            )
        result.copy_(qkv)

    run = chain
    if captured:
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        run = graph.replay
    q, k, v = start.cpu().double().split([32, 8, 8], dim=1)
    for _ in range(4):
        q, k = (rope_oracle.rotate(norm_oracle.rmsnorm(x, weight, eps), angles) for x in (q, k))
        q = rope_oracle.rotate(q, angles)
    for _ in range(3):
        result.fill_(torch.nan)
        run()
        # Eight turns of q, one upon the other, each by a sine and cosine good to 2^-21.
        assert_close(result, torch.cat([q, k, v], 1), scale=8)
        keys, values = (x.flatten(0, 1) for x in cache[indices.long()].unbind(1))
        assert_close(keys, rope_oracle.rotate(k, angles), scale=8)
        assert_close(values, v)


# --------------------------------------------------------------------------------------------------- qk norm and rope

QK_NORM_CASES = {
    "qwen3": (32, 8, 128, 128),
    "qwen3 235b": (64, 4, 128, 128),
    "odd heads": (5, 1, 64, 64),
    "partial": (8, 2, 128, 32),
    "head_dim 256": (8, 4, 256, 256),
    "head_dim 96": (3, 2, 96, 96),
}


@pytest.mark.parametrize("name", QK_NORM_CASES)
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("flat", [False, True])
def test_qk_norm_rope(device: torch.device, name: str, interleave: bool, dtype: torch.dtype, flat: bool) -> None:
    num_qo_heads, num_kv_heads, head_dim, rotary_dim = QK_NORM_CASES[name]
    num_tokens = 9
    qkv = make((num_tokens, num_qo_heads + 2 * num_kv_heads, head_dim), dtype, device, 0)
    qkv[4] = 0  # a row of zeros stays zero
    q_weight, k_weight = make((head_dim,), dtype, device, 1), make((head_dim,), dtype, device, 2)
    positions = torch.tensor([0, 1, 131071, 5, 6, 131072, 7, 99999, 2], device=device)
    angles = rope_oracle.angles_of(positions, rope_oracle.frequencies(rotary_dim, 1.0, 1e6))
    before = qkv.clone()
    q, k = before[:, :num_qo_heads], before[:, num_qo_heads : num_qo_heads + num_kv_heads]
    bias = 1.0 if name == "odd heads" else 0.0
    normed = [norm_oracle.rmsnorm(x, w, 1e-6, gemma=bias == 1.0) for x, w in ((q, q_weight), (k, k_weight))]
    fused_qk_rmsnorm_rope(
        qkv.flatten(1) if flat else qkv,
        q_weight,
        k_weight,
        positions,
        num_qo_heads,
        num_kv_heads,
        1e-6,
        weight_bias=bias,
        rotary_dim=rotary_dim,
        interleave=interleave,
        rope_theta=1e6,
    )
    assert_close(qkv[:, :num_qo_heads], rope_oracle.rotate(normed[0], angles, interleave))
    assert_close(qkv[:, num_qo_heads : num_qo_heads + num_kv_heads], rope_oracle.rotate(normed[1], angles, interleave))
    assert torch.equal(qkv[:, num_qo_heads + num_kv_heads :], before[:, num_qo_heads + num_kv_heads :])


@pytest.mark.sanitizer
def test_qk_norm_rope_with_a_table(device: torch.device) -> None:
    qkv = make((4, 6, 64), torch.bfloat16, device, 0)
    weight = make((64,), torch.bfloat16, device, 1)
    table_angles = rope_oracle.angles_of(torch.arange(10), rope_oracle.frequencies(64))
    table = torch.cat([table_angles.cos(), table_angles.sin()], 1).float().to(device)
    positions = torch.tensor([3, 9, 0, 1], dtype=torch.int32, device=device)
    expected = rope_oracle.rotate(norm_oracle.rmsnorm(qkv[:, :5], weight, 1e-5), table_angles[positions.cpu()])
    fused_qk_rmsnorm_rope(qkv, weight, weight, positions, 4, 1, 1e-5, cos_sin_cache=table)
    assert_close(qkv[:, :5], expected)


def test_errors_name_the_argument(device: torch.device) -> None:
    qkv, weight = make((4, 6, 64), torch.bfloat16, device, 0), make((64,), torch.bfloat16, device, 1)
    positions = torch.arange(4, device=device)
    with pytest.raises(ValueError, match=r"qkv has 6 heads of 64; expected at least 5 \+ 2 \(q and k\)"):
        fused_qk_rmsnorm_rope(qkv, weight, weight, positions, 5, 2)
    with pytest.raises(ValueError, match=r"k_weight is torch.float32; expected torch.bfloat16, the dtype of qkv"):
        fused_qk_rmsnorm_rope(qkv, weight, weight.float(), positions, 4, 1)
    cache, index = torch.zeros(2, 2, 4, 2, 64, dtype=torch.bfloat16, device=device), torch.zeros(4, device=device).int()
    with pytest.raises(ValueError, match=r"v has shape \[4, 1, 64\]; expected \[4, 2, 64\], the shape of k"):
        rope_append_paged_kv_cache(qkv[:, :4], qkv[:, 4:], qkv[:, :1], index, index, cache, index[:2], index[:2])
