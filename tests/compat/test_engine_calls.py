# SPDX-License-Identifier: Apache-2.0
"""Calls as serving engines make them: arguments they always pass, private names they read, assign and pass back, index
buffers they fill themselves before they plan anew for a captured graph.

Each test that takes a device is replayed with the shapes of every core model (tests/aot/ask_core.py), which replaces
the constants of engine_kit.py; windows, soft caps and other dtypes are parameters, window_left, soft_cap and o_dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.attention.mla_kit import Case, check, expect, make_batch, make_wrapper
from tests.compat.engine_kit import (
    BF16,
    HEAD_DIM,
    LATENT_DIMS,
    NUM_KV_HEADS,
    NUM_LATENT_HEADS,
    NUM_QO_HEADS,
    OWN_DIMS,
    SHAPES,
    SM_SCALE,
    Pool,
    captured,
    decode_wrapper,
    offsets,
    prefill_wrapper,
)
from tests.oracles.attention import attention
from tests.tolerances import assert_close

# --------------------------------------------------------------------------------------------------------------- decode


def test_decode_of_an_fp8_cache(device: torch.device) -> None:
    """vLLM quantizes queries as it does the cache, and names the output's dtype once: later plans leave it out."""
    pool, batch_size, fp8 = Pool(device, 16), 3, torch.float8_e4m3fn
    pool.cache = pool.cache.to(fp8)
    wrapper = decode_wrapper(pool, batch_size)
    q, out = pool.draw(batch_size, NUM_QO_HEADS, HEAD_DIM).to(fp8), pool.draw(batch_size, NUM_QO_HEADS, HEAD_DIM)
    plan: Callable[..., None] = functools.partial(wrapper.plan, o_data_type=BF16)
    for kv_lens in [(20, 5, 1), (900, 3, 1200)]:
        table = pool.table(kv_lens)
        plan(
            *table, *SHAPES, 16, pos_encoding_mode="NONE", sm_scale=SM_SCALE, window_left=-1, logits_soft_cap=None,
            q_data_type=fp8, kv_data_type=fp8, fixed_split_size=-1, disable_split_kv=False,
        )  # fmt: skip
        scales = {"q_scale": 0.5, "k_scale": 0.7, "v_scale": 1.7}
        assert wrapper.run(q, pool.cache, out=out, **scales) is out
        assert_close(out, pool.expected(q, (1,) * batch_size, table, sm_scale=SM_SCALE, **scales))
        plan = functools.partial(flashinfer.fast_decode_plan, wrapper)


@pytest.mark.parametrize("window_left", [-1, 40])
def test_decode_planned_anew_through_the_cached_module(window_left: int, device: torch.device) -> None:
    """Lengths on the CPU and page numbers in the wrapper's buffer, later plans past plan() with 15 arguments."""
    pool, batch_size = Pool(device, 16), 3
    wrapper = decode_wrapper(pool, batch_size)
    assert wrapper._cached_module is None
    q, out = pool.draw(batch_size, NUM_QO_HEADS, HEAD_DIM), pool.draw(batch_size, NUM_QO_HEADS, HEAD_DIM)
    replay: Callable[[], Any] | None = None
    for kv_lens in [(20, 5, 1), (900, 3, 1200), (17, 2000, 0)]:
        table = indptr, indices, last_page_len = pool.table(kv_lens)
        wrapper._paged_kv_indices_buf[: len(indices)].copy_(indices)
        if replay is None:
            wrapper.plan(
                indptr, wrapper._paged_kv_indices_buf[: len(indices)], last_page_len, *SHAPES, 16, "NONE", window_left,
                None, BF16, BF16, None, SM_SCALE, None, None, True,
            )  # fmt: skip
            replay = captured(lambda: wrapper.run(q, pool.cache, k_scale=1.0, v_scale=1.0, out=out), device)
        else:
            assert batch_size == wrapper._fixed_batch_size
            wrapper._paged_kv_indptr_buf.copy_(indptr, non_blocking=True)
            wrapper._paged_kv_last_page_len_buf.copy_(last_page_len, non_blocking=True)
            wrapper._plan_info = wrapper._cached_module.plan(
                wrapper._float_workspace_buffer, wrapper._int_workspace_buffer,
                wrapper._pin_memory_int_workspace_buffer, torch.arange(batch_size + 1, dtype=torch.int32), indptr,
                torch.tensor(kv_lens), batch_size, batch_size, *SHAPES[:2], 16, wrapper.is_cuda_graph_enabled, HEAD_DIM,
                HEAD_DIM, False,
            )  # fmt: skip
            wrapper._pos_encoding_mode = "NONE"
            wrapper._window_left, wrapper._logits_soft_cap, wrapper._sm_scale = window_left, 0.0, SM_SCALE
            wrapper._rope_scale = wrapper._rope_theta = None
        assert (wrapper._window_left, wrapper._logits_soft_cap, wrapper._sm_scale) == (window_left, 0.0, SM_SCALE)
        out.fill_(math.nan)
        replay()
        lengths = (1,) * batch_size
        assert_close(out, pool.expected(q, lengths, table, sm_scale=SM_SCALE, window_left=window_left))


def test_decode_with_fast_decode_plan_in_place_of_begin_forward(device: torch.device) -> None:
    """Pages of one entry, whose numbers the engine writes into the wrapper's own buffer; options at forward()."""
    pool, batch_size = Pool(device, 1, 3000), 3
    wrapper = decode_wrapper(pool, batch_size, backend="fa2")
    indptr_buf, last_buf = wrapper._paged_kv_indptr_buf, wrapper._paged_kv_last_page_len_buf
    last_buf.fill_(1)
    cache = (pool.cache[:, 0].squeeze(1), pool.cache[:, 1].squeeze(1))
    q = pool.draw(batch_size, NUM_QO_HEADS, HEAD_DIM)
    out = torch.empty_like(q)

    def layer() -> None:
        result = wrapper.forward(
            q, tuple(half.unsqueeze(1) for half in cache), sm_scale=SM_SCALE, logits_soft_cap=0.0, k_scale=None,
            v_scale=None,
        )  # fmt: skip
        out.copy_(result)

    replay: Callable[[], Any] | None = None
    for kv_lens in [(1, 1, 1), (800, 3, 1500), (17, 1, 0)]:
        table = indptr, indices, _ = pool.table(kv_lens)
        indptr_buf.copy_(indptr)
        wrapper._paged_kv_indices_buf[: len(indices)].copy_(indices)
        common = dict(
            data_type=BF16, q_data_type=BF16, non_blocking=True, fixed_split_size=None, disable_split_kv=False
        )
        if replay is not None:
            assert wrapper.begin_forward.func is flashinfer.fast_decode_plan
            common["global_override_indptr_cpu"] = indptr
        wrapper.begin_forward(indptr_buf, wrapper._paged_kv_indices_buf, last_buf, *SHAPES, 1, **common)
        if replay is None:
            replay = captured(layer, device)
            wrapper.begin_forward = functools.partial(flashinfer.fast_decode_plan, wrapper)
        out.fill_(math.nan)
        replay()
        assert_close(out, pool.expected(q, (1,) * batch_size, table, sm_scale=SM_SCALE))


@pytest.mark.parametrize("window_left", [40])
def test_captured_run_with_a_wider_window_than_planned(window_left: int, device: torch.device) -> None:
    """Options of forward() are its own: a later plan for a narrow window serves the captured run all the same."""
    pool = Pool(device, 16)
    wrapper = decode_wrapper(pool, 2)
    q = pool.draw(2, NUM_QO_HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    replay: Callable[[], Any] | None = None
    for kv_lens in [(300, 20), (1500, 3000)]:
        table = pool.table(kv_lens)
        wrapper.plan(*(x.to(device) for x in table), *SHAPES, 16, q_data_type=BF16, window_left=window_left)
        replay = replay or captured(lambda: out.copy_(wrapper.forward(q, pool.cache)), device)
        out.fill_(math.nan)
        replay()
        assert_close(out, pool.expected(q, (1, 1), table))


@pytest.mark.parametrize("o_dtype", [torch.float16])
def test_fast_decode_plan_in_place_of_plan_keeps_the_output_dtype(o_dtype: torch.dtype, device: torch.device) -> None:
    pool = Pool(device, 16)
    wrapper = decode_wrapper(pool, 1)
    indices = [x.to(device) for x in pool.table((50,))]
    hints = {"q_data_type": BF16, "q_len_per_req": 1, "fixed_split_size": -1}
    wrapper.plan(*indices, *SHAPES, 16, o_data_type=o_dtype, **hints)
    wrapper.plan = functools.partial(flashinfer.fast_decode_plan, wrapper)
    wrapper.plan(*indices, *SHAPES, 16, **hints)
    assert wrapper.run(pool.draw(1, NUM_QO_HEADS, HEAD_DIM), pool.cache).dtype == o_dtype


@pytest.mark.parametrize("splitting", [(2, False), (-1, True), (2048, True)])
def test_invariant_plans_through_the_cached_module(splitting: tuple[int, bool], device: torch.device) -> None:
    """Engines repeat what was planned."""
    pool, batch_size = Pool(device, 16), 3
    wrapper = decode_wrapper(pool, batch_size)
    q, out = (pool.draw(batch_size, NUM_QO_HEADS, HEAD_DIM) for _ in range(2))
    replay: Callable[[], Any] | None = None
    for kv_lens in [(20, 5, 1), (900, 3, 1200), (17, 2000, 0)]:
        table = indptr, indices, last_page_len = pool.table(kv_lens)
        wrapper._paged_kv_indices_buf[: len(indices)].copy_(indices)
        if replay is None:
            wrapper.plan(
                indptr, wrapper._paged_kv_indices_buf[: len(indices)], last_page_len, *SHAPES, 16, q_data_type=BF16,
                kv_data_type=BF16, sm_scale=SM_SCALE, fixed_split_size=splitting[0], disable_split_kv=splitting[1],
            )  # fmt: skip
            replay = captured(lambda: wrapper.run(q, pool.cache, out=out), device)
        else:
            wrapper._paged_kv_indptr_buf.copy_(indptr, non_blocking=True)
            wrapper._paged_kv_last_page_len_buf.copy_(last_page_len, non_blocking=True)
            arguments = (
                *[None] * 3, torch.arange(batch_size + 1, dtype=torch.int32), indptr, torch.tensor(kv_lens), batch_size,
                batch_size, *SHAPES[:2], 16, wrapper.is_cuda_graph_enabled, HEAD_DIM, HEAD_DIM, False, -1,
            )  # fmt: skip
            wrapper._cached_module.plan(*arguments, *splitting)
            with pytest.raises(UnsupportedConfig, match="fixed_split_size and disable_split_kv"):
                wrapper._cached_module.plan(*arguments, 77, False)
        out.fill_(math.nan)
        replay()
        assert_close(out, pool.expected(q, (1,) * batch_size, table, sm_scale=SM_SCALE))


# -------------------------------------------------------------------------------------------------------------- prefill


@pytest.mark.parametrize("is_masked, soft_cap", [(False, 0.0), (False, 2.0), (True, 0.0), (True, 2.0)])
def test_verification_planned_anew_through_the_cached_module(
    is_masked: bool, soft_cap: float, device: torch.device
) -> None:
    """A few draft tokens a request. The engine fills index and mask buffers itself and passes 20 arguments. A soft cap
    may bring another kernel than the planned one."""
    pool, batch_size, width = Pool(device, 1, 3000), 3, 4
    masks = {"custom_mask_buf": torch.zeros(8000, dtype=torch.uint8, device=device)} if is_masked else {}
    wrapper = prefill_wrapper(
        pool, batch_size, **masks, **({"mask_indptr_buf": pool.empty(batch_size + 1)} if is_masked else {})
    )
    assert wrapper._backend == "fa2" and wrapper._max_total_num_rows is None
    assert (wrapper._custom_mask_buf is not None) == is_masked
    qo_lens = (width,) * batch_size
    qo_indptr, last = offsets(qo_lens), torch.ones(batch_size, dtype=torch.int32)
    q = pool.draw(width * batch_size, NUM_QO_HEADS, HEAD_DIM)
    out = torch.empty_like(q)

    def layer() -> None:
        out.copy_(
            wrapper.forward(
                q, pool.cache, causal=True, sm_scale=SM_SCALE, window_left=-1, logits_soft_cap=soft_cap, k_scale=None,
                v_scale=None,
            )
        )  # fmt: skip

    replay: Callable[[], Any] | None = None
    for kv_lens in [(9, 4, 5), (900, 30, 1500), (17, 4, 700)]:
        table = indptr, indices, _ = pool.table(kv_lens)
        bits = [torch.rand(width, n, generator=pool.generator) < 0.6 for n in kv_lens]
        on_device = [x.to(device) for x in (qo_indptr, indptr, indices, last)]
        if replay is None:
            wrapper.begin_forward(
                *on_device, *SHAPES, 1, q_data_type=BF16, kv_data_type=BF16, non_blocking=True, fixed_split_size=None,
                custom_mask=torch.cat([x.flatten() for x in bits]).to(device) if is_masked else None,
                prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None,
            )  # fmt: skip
            replay = captured(layer, device)
        else:
            wrapper._qo_indptr_buf.copy_(on_device[0], non_blocking=True)
            wrapper._paged_kv_indptr_buf.copy_(on_device[1], non_blocking=True)
            wrapper._paged_kv_last_page_len_buf.copy_(on_device[3], non_blocking=True)
            wrapper._paged_kv_indices_buf[: len(indices)].copy_(on_device[2], non_blocking=True)
            if is_masked:
                packed = [flashinfer.packbits(x.flatten(), bitorder="little") for x in bits]
                wrapper._mask_indptr_buf.copy_(offsets([len(x) for x in packed]))
                wrapper._custom_mask_buf[: sum(map(len, packed))].copy_(torch.cat(packed))
            wrapper._max_total_num_rows = wrapper._batch_size = wrapper._block_tables = None
            wrapper._plan_info = wrapper._cached_module.plan(
                wrapper._float_workspace_buffer, wrapper._int_workspace_buffer,
                wrapper._pin_memory_int_workspace_buffer, qo_indptr, indptr, torch.tensor(kv_lens), len(q), batch_size,
                *SHAPES[:2], 1, wrapper.is_cuda_graph_enabled, HEAD_DIM, HEAD_DIM, False, -1, -1, False, 0, 0,
            )  # fmt: skip
        out.fill_(math.nan)
        replay()
        options: dict[str, Any] = {"masks": bits} if is_masked else {"causal": True}
        assert_close(out, pool.expected(q, qo_lens, table, sm_scale=SM_SCALE, logits_soft_cap=soft_cap, **options))


def test_captured_runs_that_see_other_keys_than_planned(device: torch.device) -> None:
    pool, qo_lens = Pool(device, 16), (40, 33)
    wrapper = prefill_wrapper(pool, 2)
    q = pool.draw(sum(qo_lens), NUM_QO_HEADS, HEAD_DIM)
    outs = torch.empty(2, *q.shape, dtype=BF16, device=device)
    replay: Callable[[], Any] | None = None

    def layers() -> None:
        for out, causal in zip(outs, (False, True)):
            out.copy_(wrapper.forward(q, pool.cache, causal=causal))

    for kv_lens in [(40, 40), (2000, 700)]:
        table = pool.table(kv_lens)
        wrapper.plan(offsets(qo_lens), *table, *SHAPES, 16, causal=True, q_data_type=BF16)
        replay = replay or captured(layers, device)
        outs.fill_(math.nan)
        replay()
        for out, causal in zip(outs, (False, True)):
            assert_close(out, pool.expected(q, qo_lens, table, causal=causal))


def test_captures_of_several_sizes_share_a_wrapper(device: torch.device) -> None:
    """Prefills captured for many and for few tokens; a plan does not say which of them is replayed next, nor whether
    padding is."""
    pool, batch_size = Pool(device, 16), 4
    wrapper = prefill_wrapper(pool, batch_size)
    buckets: dict[int, tuple[Tensor, Tensor, Callable[[], Any]]] = {}

    def plan(qo_lens: tuple[int, ...], kv_lens: tuple[int, ...], where: str) -> tuple[Tensor, Tensor, Tensor]:
        table = indptr, indices, last = pool.table(kv_lens)
        index = [x.to(device if where == "device" else "cpu") for x in (offsets(qo_lens), indptr, indices, last)]
        wrapper.begin_forward(*index, *SHAPES, 16, q_data_type=BF16, kv_data_type=BF16)
        return table

    def capture(num_tokens: int) -> None:
        q = pool.draw(num_tokens, NUM_QO_HEADS, HEAD_DIM)
        out = torch.empty_like(q)
        replay = captured(lambda: out.copy_(wrapper.forward(q, pool.cache, causal=True)), device)
        buckets[num_tokens] = q, out, replay

    for num_tokens in (160, 8):
        plan((num_tokens // 4,) * 4, (num_tokens // 4,) * 4, "device")
        capture(num_tokens)
    for where in ("device", "cpu"):
        for num_tokens, qo_lens in [(160, (40, 40, 40, 40)), (8, (1, 5, 2, 0)), (160, (1, 1, 1, 0)), (8, (2, 2, 2, 2))]:
            table = plan(qo_lens, (600, 77, 2000, 40), where)
            q, out, replay = buckets[num_tokens]
            out.fill_(math.nan)
            replay()
            assert_close(out[: sum(qo_lens)], pool.expected(q, qo_lens, table, causal=True))


@pytest.mark.parametrize("window_left", [-1, 20])
def test_prefill_planned_by_keywords(window_left: int, device: torch.device) -> None:
    """Lengths on the CPU, hints of later releases, scales of one, names that say what was planned."""
    pool, qo_lens, kv_lens = Pool(device, 16), (3, 40), (70, 40)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(pool.workspace(), "NHD", backend="auto")
    table = indptr, indices, last = pool.table(kv_lens)
    wrapper.plan(
        qo_indptr=offsets(qo_lens), paged_kv_indptr=indptr, paged_kv_indices=indices.to(device),
        paged_kv_last_page_len=last, seq_lens=torch.tensor(kv_lens), num_qo_heads=NUM_QO_HEADS,
        num_kv_heads=NUM_KV_HEADS, head_dim_qk=HEAD_DIM, page_size=16, causal=True, sm_scale=SM_SCALE,
        window_left=window_left, logits_soft_cap=None, q_data_type=BF16, kv_data_type=BF16, o_data_type=BF16,
        fixed_split_size=-1, disable_split_kv=False, block_tables=None,
    )  # fmt: skip
    assert wrapper._causal and wrapper._window_left == window_left
    assert wrapper._logits_soft_cap == 0.0 and wrapper._sm_scale == SM_SCALE
    q = pool.draw(sum(qo_lens), NUM_QO_HEADS, HEAD_DIM)
    halves, out = (pool.cache[:, 0], pool.cache[:, 1]), torch.empty_like(q)
    wrapper.run(q, halves, q_scale=1.0, k_scale=1.0, v_scale=1.0, out=out, kv_cache_sf=None)
    assert_close(out, pool.expected(q, qo_lens, table, causal=True, window_left=window_left, sm_scale=SM_SCALE))


# ----------------------------------------------------------------------------------------------------- latent attention


@pytest.mark.parametrize(
    "qo_lens, kv_lens, page_size, causal",
    [((1,) * 4, (9, 800, 70, 3), 1, False), ((1, 40, 3), (90, 40, 70), 1, True), ((1, 1), (300, 64), 64, False)],
)
def test_latent_attention_over_the_cache(
    qo_lens: tuple[int, ...], kv_lens: tuple[int, ...], page_size: int, causal: bool, device: torch.device
) -> None:
    """Arguments by position; SGLang has pages of one token and is causal where it extends, vLLM has pages of 64."""
    case = Case("", qo_lens, kv_lens, NUM_LATENT_HEADS, LATENT_DIMS, page_size, BF16, causal=causal, sm_scale=SM_SCALE)
    batch, wrapper = make_batch(case, device), make_wrapper(device, backend="auto")
    wrapper.plan(*batch.indices, NUM_LATENT_HEADS, *LATENT_DIMS, page_size, causal, SM_SCALE, BF16, BF16)
    check(wrapper.run(*batch.q, *batch.caches, return_lse=True), expect(batch))


@pytest.mark.parametrize("qo_lens, kv_lens", [((4, 9), (7, 20)), ((150, 90), (80, 200))])
def test_latent_attention_of_a_prompt_and_a_cached_prefix(
    qo_lens: tuple[int, ...], kv_lens: tuple[int, ...], device: torch.device
) -> None:
    """SGLang's extension of what is cached: keys and values of every head, those of a piece of the prefix apart."""
    pool = Pool(device, 1, 2)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(pool.workspace(), "NHD")
    (dim_qk, dim_vo), states, expected = OWN_DIMS, [], []
    q = pool.draw(sum(qo_lens), NUM_LATENT_HEADS, dim_qk)
    for lengths, causal in ((qo_lens, True), (kv_lens, False)):
        k, v = (pool.draw(sum(lengths), NUM_LATENT_HEADS, dim) for dim in OWN_DIMS)
        wrapper.begin_forward(
            qo_indptr=offsets(qo_lens).to(device), kv_indptr=offsets(lengths).to(device), num_qo_heads=NUM_LATENT_HEADS,
            num_kv_heads=NUM_LATENT_HEADS, head_dim_qk=dim_qk, head_dim_vo=dim_vo, q_data_type=BF16, causal=causal,
        )  # fmt: skip
        states += wrapper.forward_return_lse(q, k, v, causal=causal, sm_scale=SM_SCALE)
        rows = (x.cpu().split(list(sizes)) for x, sizes in ((q, qo_lens), (k, lengths), (v, lengths)))
        expected.append([attention(*of, causal=causal, sm_scale=SM_SCALE) for of in zip(*rows)])
    for state, wanted in zip((states[:2], states[2:]), expected):
        check(state, tuple(map(torch.cat, zip(*wanted))))
    flashinfer.merge_state(*states)


# --------------------------------------------------------------------------------------------------------- block tables


def block_tables(pool: Pool, kv_lens: tuple[int, ...], width: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The pages as the wrappers take them, and as a table with rubbish behind them."""
    table = indptr, indices, _ = pool.table(kv_lens)
    tables = torch.full((len(kv_lens), width), 1 << 20, dtype=torch.int32)
    for i, (begin, end) in enumerate(itertools.pairwise(indptr.tolist())):
        tables[i, : end - begin] = indices[begin:end]
    return table, tables.to(pool.device), torch.tensor(kv_lens, dtype=torch.int32, device=pool.device)


def test_decode_of_a_padded_batch_over_a_block_table(device: torch.device) -> None:
    """As on Hopper: queries and outputs for the padding too, keys and values cut out of one row, scales of layers."""
    pool, width = Pool(device, 16), 200
    rows = torch.cat([pool.cache[:, 0], pool.cache[:, 1]], dim=-1)
    halves = rows[..., :HEAD_DIM], rows[..., HEAD_DIM:]
    workspace = torch.zeros_like(pool.workspace())
    counters = flashinfer.utils.get_trtllm_gen_multi_ctas_kv_counter_bytes(8192, NUM_QO_HEADS, 132)
    assert torch.zeros(counters, dtype=torch.uint8, device=device).numel() == counters
    tables, lens = torch.zeros(4, width, dtype=torch.int32, device=device), torch.zeros(4, device=device).int()
    q = pool.draw(4, NUM_QO_HEADS, HEAD_DIM)
    output = torch.zeros(6, NUM_QO_HEADS, HEAD_DIM, dtype=BF16, device=device)

    def layer() -> None:
        flashinfer.decode.xqa_batch_decode_with_kv_cache(
            query=q, kv_cache=halves, kv_cache_sf=None, workspace_buffer=workspace, block_tables=tables, seq_lens=lens,
            max_seq_len=3200, bmm1_scale=SM_SCALE, bmm2_scale=1.0, window_left=-1, out=output[:4], sinks=None,
            kv_layout="NHD", q_len_per_req=1, mask=None, q_cu_seq_lens=None,
        )  # fmt: skip

    replay: Callable[[], Any] | None = None
    for kv_lens in [(1, 1, 1, 0), (900, 3000, 1, 0), (17, 4, 700, 33)]:
        table, given_tables, given_lens = block_tables(pool, kv_lens, width)
        tables.copy_(given_tables)
        lens.copy_(given_lens)
        replay = replay or captured(layer, device)
        output.fill_(math.nan)
        replay()
        assert_close(output[:4], pool.expected(q, (1,) * 4, table, sm_scale=SM_SCALE))
        assert output[4:].isnan().all()


@pytest.mark.parametrize("is_ragged", [False, True])
def test_drafts_over_a_block_table(is_ragged: bool, device: torch.device) -> None:
    """With a mask that is causal, of words of 32 bits in integers of 16."""
    pool, kv_lens, qo_lens = Pool(device, 16), (70, 9, 500), (3, 1, 4) if is_ragged else (4, 4, 4)
    table, tables, lens = block_tables(pool, kv_lens, 40)
    words = torch.cat([(2 << torch.arange(n)) - 1 for n in qo_lens]).to(torch.int32).view(torch.uint16)
    q, layout = pool.draw(sum(qo_lens), NUM_QO_HEADS, HEAD_DIM), (-1, 2) if is_ragged else (3, 4, 2)
    out = flashinfer.decode.xqa_batch_decode_with_kv_cache(
        query=q, kv_cache=(pool.cache[:, 0], pool.cache[:, 1]), kv_cache_sf=None, workspace_buffer=pool.workspace(),
        block_tables=tables, seq_lens=lens, max_seq_len=500, bmm1_scale=SM_SCALE, bmm2_scale=1.0, window_left=-1,
        out=torch.empty_like(q), sinks=None, kv_layout="NHD", q_len_per_req=4, mask=words.view(layout).to(device),
        q_cu_seq_lens=offsets(qo_lens).to(device) if is_ragged else None,
    )  # fmt: skip
    assert_close(out, pool.expected(q, qo_lens, table, causal=True, sm_scale=SM_SCALE))


@pytest.mark.parametrize("window_left", [-1, 20])
def test_prefill_and_decode_over_block_tables_by_keywords(window_left: int, device: torch.device) -> None:
    """As on Blackwell: pages of heads, the same workspace for both, counters that nobody needs."""
    pool, qo_lens, kv_lens = Pool(device, 16), (3, 40), (70, 40)
    table, tables, lens = block_tables(pool, kv_lens, 30)
    cache = pool.cache.transpose(2, 3).contiguous()
    workspace, qo_indptr = pool.workspace(), offsets(qo_lens).to(device)
    q = pool.draw(sum(qo_lens), NUM_QO_HEADS, HEAD_DIM)
    common = dict(
        workspace_buffer=workspace, block_tables=tables, seq_lens=lens, window_left=window_left, sinks=None,
        o_sf_scale=None, kv_cache_sf=None,
        multi_ctas_kv_counter_buffer=torch.zeros(0, dtype=torch.uint8, device=device),
    )  # fmt: skip
    out = torch.empty_like(q)
    flashinfer.prefill.trtllm_batch_context_with_kv_cache(
        query=q, kv_cache=cache, max_q_len=40, max_kv_len=70, bmm1_scale=SM_SCALE, bmm2_scale=1.0, batch_size=2,
        cum_seq_lens_q=qo_indptr, cum_seq_lens_kv=table[0].to(device), out=out, **common,
    )  # fmt: skip
    options: dict[str, Any] = {"window_left": window_left, "sm_scale": SM_SCALE}
    assert_close(out, pool.expected(q, qo_lens, table, causal=True, **options))
    result = flashinfer.decode.trtllm_batch_decode_with_kv_cache(
        query=q[:2], kv_cache=(cache[:, 0], cache[:, 1]), max_seq_len=70, bmm1_scale=SM_SCALE, bmm2_scale=1.0,
        out=out[:2], kv_layout="HND", backend="trtllm-gen", q_len_per_req=1, max_q_len=None, cum_seq_lens_q=None,
        lse=None, return_lse=False, skip_softmax_threshold_scale_factor=None, out_dtype=None, **common,
    )  # fmt: skip
    assert_close(result, pool.expected(q[:2], (1, 1), table, **options))
