# SPDX-License-Identifier: Apache-2.0
"""Latent attention on both targets against the FP64 oracle: lengths, pages, head counts, dtypes, bad input."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention import mla as families
from flashinfer.jit import default_resolver
from tests.attention.mla_kit import (
    DEEPSEEK_SCALE,
    SCALED,
    Case,
    check,
    check_scaled,
    each_kernel,
    expect,
    make_batch,
    make_wrapper,
    pack_rows,
    plan,
    run,
    unpack_rows,
)
from tests.attention.named_cases import named, skip_elsewhere
from tests.attention.prefill_kit import BF16, E4M3, FP16, FP32
from tests.tolerances import assert_close

APPEND = (3, 1, 70, 2)  # queries of the four requests

CASES = [
    Case("decode"),
    Case("not_causal", qo_lens=APPEND, causal=False),
    *[Case(f"heads_{count}", num_heads=count) for count in (1, 3, 20, 32, 64, 128)],
    *[Case(f"page_{size}", page_size=size) for size in (1, 3, 8, 16, 32, 48, 128)],
    Case("page_1_heads_128", num_heads=128, page_size=1),
    Case("last_page_full", kv_lens=(64, 128, 320, 1)),
    # Several tokens a request, which see each other causally.
    Case("two_tokens", qo_lens=(2, 2, 2, 2), num_heads=128),
    Case("draft", qo_lens=(5, 4, 1, 3), num_heads=20, page_size=1),
    Case("append", qo_lens=APPEND, num_heads=20),
    Case("append_heads_128", qo_lens=(9, 40), kv_lens=(300, 40), num_heads=128),
    Case("queries_beyond_kv", qo_lens=(50, 9), kv_lens=(20, 3), num_heads=3),
    # Long KV under few rows, whose splits are merged, many of them in two steps.
    Case("long_kv", qo_lens=(1, 2, 1), kv_lens=(3000, 5000, 200)),
    Case("many_splits", qo_lens=(1,), kv_lens=(20000,), num_heads=4),
    Case("many_splits_page_1", qo_lens=(2,), kv_lens=(20000,), num_heads=4, page_size=1),
    Case("many_short", qo_lens=(1,) * 70, kv_lens=tuple(i % 40 + 7 for i in range(70)), page_size=16),
    Case("empty_requests", qo_lens=(0, 1, 0, 3, 1), kv_lens=(7, 9, 0, 300, 0)),
    Case("no_kv", qo_lens=(4, 1), kv_lens=(0, 0)),
    Case("no_queries", qo_lens=(0, 0), kv_lens=(5, 70)),
    Case("empty_batch", qo_lens=(), kv_lens=()),
    Case("far_apart", qo_lens=(1, 3), kv_lens=(900, 400), sm_scale=1.0),
    # Memory.
    Case("two_caches", rows="two"),
    Case("wide_rows", qo_lens=APPEND, rows="wide"),
    Case("wide_rows_page_1", rows="wide", page_size=1, num_heads=128),
    Case("shared_pages", num_shared_pages=3, kv_lens=(200, 193, 400, 192), qo_lens=(1, 2, 1, 1)),
    Case("spare_pages", spare_pages=2, kv_lens=(33, 0, 64, 517)),
    Case("spare_pages_1", spare_pages=5, page_size=1),
    # Dimensions and dtypes.
    Case("dims_256_64", dims=(256, 64), qo_lens=APPEND),
    Case("dims_512_0", dims=(512, 0), qo_lens=APPEND),
    Case("dims_512_0_page_1", dims=(512, 0), page_size=1, num_heads=64),
    Case("dims_256_0", dims=(256, 0), rows="two"),
    Case("fp16", q_dtype=FP16, qo_lens=APPEND),
    Case("fp16_heads_128", q_dtype=FP16, num_heads=128),
    Case("fp8", kv_dtype=E4M3, qo_lens=APPEND),
    Case("fp8_heads_128", kv_dtype=E4M3, num_heads=128),
    # Many heads, of which Hopper has a kernel that widens the cache as it comes in.
    Case("fp8_heads_64_fp16", kv_dtype=E4M3, q_dtype=FP16, num_heads=64, page_size=16),
    Case("fp8_heads_128_splits", kv_dtype=E4M3, qo_lens=(1, 2), kv_lens=(5000, 900), num_heads=128, cuda_only=True),
    Case("fp8_heads_128_page_1", kv_dtype=E4M3, qo_lens=(1, 3, 1), kv_lens=(400, 129, 0), num_heads=128, page_size=1),
    Case("fp8_heads_128_two_caches", kv_dtype=E4M3, num_heads=128, rows="two"),
    Case("fp8_heads_128_dims_512_0", kv_dtype=E4M3, num_heads=128, dims=(512, 0)),
    Case("fp8_heads_128_dims_256_64", kv_dtype=E4M3, num_heads=128, dims=(256, 64), causal=False),
    Case("fp8_page_1_fp16", kv_dtype=E4M3, q_dtype=FP16, page_size=1),
    Case("fp8_dims_256_64", kv_dtype=E4M3, dims=(256, 64), page_size=16),
    # Rows with scales of their own, in the tile for few rows and in that for many.
    Case("scaled", kv_dtype=SCALED),
    Case("scaled_append", kv_dtype=SCALED, qo_lens=APPEND, num_heads=20),
    Case("scaled_heads_128", kv_dtype=SCALED, num_heads=128),
    Case("scaled_splits", kv_dtype=SCALED, qo_lens=(1, 2), kv_lens=(5000, 900), num_heads=128, cuda_only=True),
    Case("scaled_splits_short", kv_dtype=SCALED, qo_lens=(1,), kv_lens=(20000,), num_heads=4),
    Case("scaled_page_1", kv_dtype=SCALED, qo_lens=(1, 3, 1), kv_lens=(400, 129, 0), num_heads=128, page_size=1),
    Case("scaled_page_3_short", kv_dtype=SCALED, page_size=3, num_heads=7),
    Case("scaled_wide", kv_dtype=SCALED, rows="wide", causal=False),
    Case("scaled_shared_pages", kv_dtype=SCALED, num_shared_pages=3, kv_lens=(200, 193, 400, 192), num_heads=64),
]
SANITIZED = {"decode", "heads_128", "page_1", "page_3", "append", "many_splits", "no_kv", "spare_pages_1", "wide_rows"}
SANITIZED |= {"dims_512_0", "dims_256_64", "fp8", "fp8_page_1_fp16", "scaled", "scaled_wide"}


device = each_kernel  # in place of that of conftest.py


@pytest.mark.parametrize("case", named(CASES, sanitized=SANITIZED))
def test_against_the_oracle(device: torch.device, case: Case) -> None:
    skip_elsewhere(case, device)
    batch = make_batch(case, device)
    wrapper = make_wrapper(device)
    plan(wrapper, batch)
    if case.kv_dtype == SCALED:
        num_rows = case.num_heads * sum(case.qo_lens) // len(case.qo_lens)
        check_scaled(run(wrapper, batch), expect(batch), num_rows, device)
    else:
        check(run(wrapper, batch), expect(batch))


@pytest.mark.parametrize("dims", [(512, 64), (512, 0)], ids=str)
def test_fp32_on_the_cpu(dims: tuple[int, int]) -> None:
    batch = make_batch(Case("fp32", qo_lens=APPEND, q_dtype=FP32, dims=dims, page_size=3), torch.device("cpu"))
    wrapper = make_wrapper(torch.device("cpu"))
    plan(wrapper, batch)
    out, lse = run(wrapper, batch)
    expected = expect(batch)
    assert_close(out, expected[0], scale=2.0)  # sums of 500 products in fp32
    assert_close(lse, expected[1], scale=2.0)


@pytest.mark.gpu
def test_blocks_that_start_late() -> None:
    """Launches on two streams: blocks of one wait for places that those of the other have, and may find their work
    done."""
    device = torch.device("cuda")
    cases = [
        Case("few_heads", qo_lens=(1, 1), kv_lens=(20000, 9000)),
        Case("many_heads", qo_lens=(1,), kv_lens=(9000,), num_heads=128),
    ]
    batches, streams = [make_batch(case, device) for case in cases], [torch.cuda.Stream() for _ in cases]
    wrappers = [make_wrapper(device) for _ in cases]
    for wrapper, batch in zip(wrappers, batches):
        plan(wrapper, batch)
    alone = [run(wrapper, batch) for wrapper, batch in zip(wrappers, batches)]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(30):
        for wrapper, batch, stream, found in zip(wrappers, batches, streams, results):
            with torch.cuda.stream(stream):
                found.append(run(wrapper, batch))
    torch.cuda.synchronize()
    for batch, expected, found in zip(batches, alone, results):
        check(expected, expect(batch))
        assert all(torch.equal(x, y) for result in found for x, y in zip(result, expected))


@pytest.mark.parametrize("given", [{"ckv_scale": 0.7}, {"ckv_scale": 1.7, "kpe_scale": 1.7}], ids=str)
def test_scale_of_a_quantized_cache(device: torch.device, given: dict[str, float]) -> None:
    batch = make_batch(Case("scale", qo_lens=(1, 2, 1, 5), kv_dtype=E4M3), device)
    wrapper = make_wrapper(device)
    plan(wrapper, batch)
    check(run(wrapper, batch, **given), expect(batch, given["ckv_scale"]))
    check(run(wrapper, batch), expect(batch))


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("kind", ["tiny", "huge", "rising", "falling", "zero"])
def test_scales_of_any_magnitude(device: torch.device, kind: str, num_heads: int) -> None:
    """Scales beyond the range of 16 bits, and scales that change from tile to tile; logits stay as small as ever."""
    batch = make_batch(Case("magnitude", kv_lens=(40, 300, 517, 130), kv_dtype=SCALED, num_heads=num_heads), device)
    (cache,), size = batch.caches, batch.case.page_size
    for i, length in enumerate(batch.case.kv_lens):
        exponents = torch.linspace(-24, 0, length).round()
        factor = {
            "tiny": torch.full((length,), 2.0**-30),
            "huge": torch.full((length,), 2.0**40),
            "zero": torch.zeros(length),
            "rising": 2**exponents,
            "falling": 2 ** exponents.flip(0),
        }[kind][:, None]
        packed = pack_rows(torch.randn(length, 576, generator=torch.Generator().manual_seed(i)), torch.Generator())
        packed[:, 512:528] = (packed[:, 512:528].contiguous().view(torch.float32) * factor).view(torch.uint8)
        pages = batch.indices[2][batch.indices[1][i] : batch.indices[1][i + 1]].long()
        for page, piece in zip(pages.tolist(), packed.split(size)):
            cache[page, : len(piece)] = piece.to(device)
        batch.kv[i] = unpack_rows(packed)[:, None]
    unit = {"huge": 2.0**40, "tiny": 2.0**-30}.get(kind, 1.0)  # exact in bf16
    batch = replace(batch, case=replace(batch.case, sm_scale=DEEPSEEK_SCALE / max(unit, 1.0)))
    wrapper = make_wrapper(device)
    plan(wrapper, batch)
    (out, lse), (expected_out, expected_lse) = run(wrapper, batch), expect(batch)
    check_scaled((out / unit, lse), (expected_out / unit, expected_lse), num_heads, device)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_splits_of_any_magnitude(device: torch.device, num_heads: int) -> None:
    """What splits leave is stored in fewer bits than it is summed in: rows of any magnitude; columns of one row, and
    splits of one request, far from each other."""
    length, exponents = 700, (100, -100, 0, 0)
    batch = make_batch(Case("magnitude", kv_lens=(length,) * 4, num_heads=num_heads), device)
    batch.q[0].zero_()  # values are of no matter to the logits
    factors = torch.tensor([2.0**e for e in exponents])[:, None, None].repeat(1, length, 512)
    factors[2, :, 1::2] = 2.0**-20
    factors[3, 300:] = 2.0**-20
    (ckv, _), size = batch.caches, batch.case.page_size
    for i, rows in enumerate(batch.kv):
        rows[..., :512] *= factors[i, :, None]
        pages = batch.indices[2][batch.indices[1][i] : batch.indices[1][i + 1]].long()
        for page, piece in zip(pages.tolist(), rows[:, 0, :512].split(size)):
            ckv[page, : len(piece)] = piece.to(device)
    wrapper = make_wrapper(device)
    plan(wrapper, batch)
    (out, lse), (expected_out, expected_lse) = run(wrapper, batch), expect(batch)
    # What brings every element of the results near one; exact in bf16, but for the square root.
    units = torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)[:, None, None].repeat(1, 1, 512)
    units[2, :, 1::2] = 2.0**20
    units *= length**0.5
    check(((out.cpu().double() * units).to(BF16), lse), (expected_out * units, expected_lse))


def test_rows_with_scales_say_what_they_need(device: torch.device) -> None:
    batch = make_batch(Case("scaled", kv_dtype=SCALED), device)
    wrapper = make_wrapper(device)
    plan(wrapper, batch)
    (cache,), q = batch.caches, batch.q
    uneven = torch.zeros(*cache.shape[:2], 664, dtype=SCALED, device=device)[..., 8:]
    for message, error, given, options in (
        (r"dim 2 \(head_dim\) is 576", ValueError, (cache[..., :576],), {}),
        ("kpe_cache is a tensor beside", ValueError, (cache, cache[..., 528:]), {}),
        ("scale of a cache whose rows have their own", UnsupportedConfig, (cache,), {"ckv_scale": 0.5}),
        (r"ckv_cache is torch\.bfloat16", ValueError, (torch.zeros_like(cache, dtype=BF16),), {}),
        ("multiples of 16 bytes", ValueError, (uneven,), {}),
    ):
        with pytest.raises(error, match=message):
            wrapper.run(*q, *given, **options)
    for changed in ({"q_data_type": FP16}, {"head_dim_ckv": 256}, {"head_dim_kpe": 0}):
        with pytest.raises(UnsupportedConfig, match=r"expected bf16 and 512 \+ 64"):
            plan(wrapper, batch, **changed)
    check(run(wrapper, batch), expect(batch))  # of few rows, whose kernel does not round
    plan(wrapper, make_batch(Case("plain"), device))
    with pytest.raises(TypeError, match="kpe_cache is NoneType"):
        wrapper.run(*q, cache)


def test_two_plans_and_another_signature(device: torch.device) -> None:
    """What a run keeps belongs to its plan, and to the strides, dtypes and scales it was bound for."""
    wrapper = make_wrapper(device)
    cases = [Case("a"), Case("b", rows="two", num_heads=20), Case("c", page_size=1, qo_lens=APPEND), Case("a")]
    for seed, case in enumerate(cases):
        batch, other = make_batch(case, device, seed), make_batch(replace(case, rows="wide"), device, seed)
        plan(wrapper, batch)
        for each in (batch, other, batch):
            check(run(wrapper, each), expect(each))


def test_allocated_outputs(device: torch.device) -> None:
    batch = make_batch(Case("allocated"), device)
    wrapper = make_wrapper(device)
    plan(wrapper, batch)
    out = wrapper.run(*batch.q, *batch.caches)
    both = wrapper.run_return_lse(*batch.q, *batch.caches)
    assert isinstance(out, Tensor) and torch.equal(out, both[0])
    check((both[0], both[1]), expect(batch))


def test_rows_between_tokens_are_kept(device: torch.device) -> None:
    """Tokens of no request, in front of the first and behind the last, keep what out and lse held."""
    case = Case("between", qo_lens=(2, 1), kv_lens=(40, 70))
    batch = make_batch(replace(case, qo_lens=(5, 4)), device)
    wrapper = make_wrapper(device)
    qo_indptr = torch.tensor([3, 5, 6], dtype=torch.int32)
    plan(wrapper, replace(batch, indices=(qo_indptr, *batch.indices[1:])))
    out, lse = run(wrapper, batch)
    inner = replace(batch, case=case, q=(batch.q[0][3:6], batch.q[1][3:6]))
    check((out[3:6], lse[3:6]), expect(inner))
    for rows in (slice(0, 3), slice(6, 9)):
        assert out[rows].isnan().all() and lse[rows].isnan().all()


def test_same_result_every_time(device: torch.device) -> None:
    """Whichever block takes an item or merges it last, the sums run in one order."""
    batch = make_batch(Case("repeat", qo_lens=(1, 3), kv_lens=(6000, 3000)), device)
    wrapper = make_wrapper(device)
    plan(wrapper, batch)
    first = run(wrapper, batch)
    for _ in range(5):
        again = run(wrapper, batch)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("num_heads", [16, 128])
def test_shared_prefix_by_merging_states(device: torch.device, num_heads: int) -> None:
    """A cascade: every token over the prefix, which is one request of many queries, then over what is its own."""
    case = Case("cascade", (1, 1, 2), (500, 300, 257), num_heads, num_shared_pages=4)
    batch = make_batch(case, device)
    prefix_len, prefix_pages = case.num_shared_pages * case.page_size, batch.indices[2][: case.num_shared_pages]
    indptr, own_pages = batch.indices[1].tolist(), []
    for begin, end in itertools.pairwise(indptr):
        own_pages.append(batch.indices[2][begin + case.num_shared_pages : end])

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    of_prefix = (int32(0, sum(case.qo_lens)), int32(0, len(prefix_pages)), prefix_pages, int32(prefix_len))
    own_lens = [length - prefix_len for length in case.kv_lens]
    ends = torch.tensor([len(pages) for pages in own_pages]).cumsum(0).tolist()
    of_own = (batch.indices[0], int32(0, *ends), torch.cat(own_pages), int32(*own_lens))
    states = []
    for indices, causal in ((of_prefix, False), (of_own, True)):
        wrapper = make_wrapper(device)
        plan(wrapper, replace(batch, indices=indices), causal=causal)
        states += run(wrapper, batch)
    check(flashinfer.merge_state(*states), expect(batch))


# ------------------------------------------------------------------------------------------------------------ bad input


def test_errors_name_the_argument(device: torch.device) -> None:
    batch = make_batch(Case("errors", kv_dtype=E4M3), device)
    wrapper = make_wrapper(device)
    (q_nope, q_pe), (ckv, kpe) = batch.q, batch.caches
    with pytest.raises(ValueError, match=r"run\(\) before plan"):
        wrapper.run(q_nope, q_pe, ckv, kpe)
    plan(wrapper, batch)
    expected = expect(batch)
    bad_runs = {
        r"q_nope has shape \[4, 8, 512\]": (q_nope[:, :8], q_pe, ckv, kpe),
        r"q_pe has shape \[4, 16, 512\]": (q_nope, q_nope, ckv, kpe),
        "q_nope has 4 tokens, q_pe 3": (q_nope, q_pe[:3], ckv, kpe),
        r"q_pe is torch\.float32": (q_nope, q_pe.float(), ckv, kpe),
        r"ckv_cache dim 1 \(page_size\) is 8": (q_nope, q_pe, ckv[:, :8], kpe),
        r"kpe_cache dim 0 \(pages\)": (q_nope, q_pe, ckv, kpe[:-1]),
        r"kpe_cache dim 2 \(head_dim\) is 512": (q_nope, q_pe, ckv, ckv),
        r"ckv_cache has shape": (q_nope, q_pe, ckv[:, :, None], kpe),
        r"ckv_cache is torch\.bfloat16": (q_nope, q_pe, ckv.to(BF16), kpe),
        "kpe_cache has stride": (q_nope, q_pe, ckv, kpe.transpose(1, 2).contiguous().transpose(1, 2)),
        "q_pe is NoneType": (q_nope, None, ckv, kpe),
        "kpe_cache is NoneType": (q_nope, q_pe, ckv, None),
        "q_nope is list": ([1.0], q_pe, ckv, kpe),
    }
    for message, given in bad_runs.items():
        with pytest.raises((ValueError, TypeError), match=message):
            wrapper.run(*given)
    bad_options = {
        "out is": {"out": q_nope[:2]},
        "elements of out overlap": {"out": q_nope[:1].expand(4, 16, 512)},
        r"lse is torch\.bfloat16": {"lse": q_nope[..., 0].contiguous(), "return_lse": True},
        "profile": {"profiler_buffer": torch.zeros(4)},
        "kv_len_arr": {"kv_len": torch.zeros(4)},
        "kv_indptr": {"page_table": torch.zeros(4)},
        "base 2": {"return_lse_base_on_e": True},
        "o_scale": {"o_scale": 2.0},
        "multiply q_pe by": {"ckv_scale": 0.5, "kpe_scale": 0.25},
        "kpe_scale 0.5": {"kpe_scale": 0.5},
        "a scale is a tensor": {"ckv_scale": torch.ones((), device=device)},
        "scale for each token": {"ckv_scale_arr": torch.ones(4)},
        "expected a positive number": {"ckv_scale": 0.0},
        "enable_pdl": {"enable_pdl": "yes"},
        "unexpected argument 'query'": {"query": q_nope},
    }
    for message, options in bad_options.items():
        with pytest.raises((ValueError, TypeError), match=message):
            wrapper.run(q_nope, q_pe, ckv, kpe, **options)
    bad_plans = {
        "use_profiler": {"use_profiler": True},
        "sm_scale": {"sm_scale": -1.0},
        "num_qo_heads": {"num_heads": 0},
        "head_dim_ckv": {"head_dim_ckv": 500},
        "head_dim_kpe": {"head_dim_kpe": -1},
        "page_size": {"page_size": 0},
        "causal": {"causal": "yes"},
        "q_dtype": {"q_data_type": "int8"},
        "cache": {"kv_data_type": FP16},
        "float8_e5m2|fp8_e5m2": {"kv_data_type": torch.float8_e5m2},
        "attention sinks": {"sinks": torch.zeros(16)},
    }
    for message, options in bad_plans.items():
        with pytest.raises((ValueError, TypeError), match=message):
            plan(wrapper, batch, **options)
    if device.type == "cuda":
        with pytest.raises(ValueError, match="kpe_cache is on cpu"):
            wrapper.run(q_nope, q_pe, ckv, kpe.cpu())
        with pytest.raises(ValueError, match="start at multiples of 16 bytes"):
            shifted = torch.zeros(*ckv.shape[:2], 584, dtype=torch.uint8, device=device).view(E4M3)
            wrapper.run(q_nope, q_pe, shifted[..., 8:520], kpe)
    check(run(wrapper, batch), expected)


# -------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.slow
def test_random_sweep(device: torch.device) -> None:
    """Legal combinations of lengths, shapes and dtypes, drawn with a fixed seed."""
    draw = random.Random(7)
    for i in range(60 if device.type == "cuda" else 20):
        batch_size = draw.randint(1, 9)
        kv_lens = tuple(draw.choice((0, 1, 15, 64, 65, 200, 1500)) + draw.randint(0, 3) for _ in range(batch_size))
        qo_lens = tuple(draw.choice((0, 1, 1, 1, 2, 4, 17)) for _ in range(batch_size))
        case = Case(
            f"sweep {i}", qo_lens, kv_lens, draw.choice((1, 7, 16, 20, 64, 128)),
            draw.choice(((512, 64), (512, 64), (256, 64), (512, 0))), draw.choice((1, 5, 16, 64, 128)),
            draw.choice((BF16, FP16)), draw.choice((None, None, E4M3)), draw.random() < 0.7,
            draw.choice(("one", "two", "wide")), spare_pages=draw.choice((0, 0, 3)),
        )  # fmt: skip
        batch = make_batch(case, device, seed=i)
        wrapper = make_wrapper(device)
        plan(wrapper, batch)
        try:
            check(run(wrapper, batch), expect(batch))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"])
def test_every_option_compiles(target: str) -> None:
    for case, short_queries in itertools.product(CASES, (False, True)):
        q_dtype = "bf16" if case.q_dtype == BF16 else "fp16"
        spec = families.mla(
            target,
            q_dtype=q_dtype,
            kv_dtype={None: q_dtype, E4M3: "fp8_e4m3", SCALED: families.SCALED_ROWS}[case.kv_dtype],
            head_dim_ckv=case.dims[0],
            head_dim_kpe=case.dims[1],
            short_queries=short_queries,
            page_size=case.page_size,
            mask="causal" if case.causal else "none",
        )
        default_resolver().load(spec)
