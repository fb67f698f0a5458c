# SPDX-License-Identifier: Apache-2.0
"""Attention over block tables: what engines call without a plan, against the FP64 oracle and the planned wrappers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.decode import trtllm_batch_decode_with_kv_cache, xqa_batch_decode_with_kv_cache
from flashinfer.errors import UnsupportedConfig
from flashinfer.prefill import trtllm_batch_context_with_kv_cache
from tests.attention.named_cases import skip_elsewhere
from tests.attention.prefill_kit import BF16, E4M3, E5M2, FP16, Batch, Case, check, expect, make_batch, offsets
from tests.tolerances import assert_close

SCALE = 0.07
UNUSED = 1 << 30  # in places of a block table that no request uses


@dataclass(frozen=True)
class Table:
    tables: Tensor
    lens: Tensor

    @staticmethod
    def of(batch: Batch, device: torch.device, spare: int = 2, gap: int = 0) -> Table:
        """The pages of a batch; spare: entries of a row behind the longest; gap: between rows."""
        _, indptr, indices, _ = batch.indices
        starts = indptr.tolist()
        width = max((end - begin for begin, end in itertools.pairwise(starts)), default=0) + spare
        tables = torch.full((len(batch.case.kv_lens), width + gap), UNUSED, dtype=torch.int32)
        for i, (begin, end) in enumerate(itertools.pairwise(starts)):
            tables[i, : end - begin] = indices[begin:end]
        lens = torch.tensor(batch.case.kv_lens, dtype=torch.int32)
        return Table(tables.to(device)[:, :width], lens.to(device))


def workspace(device: torch.device, num_bytes: int = 64 << 20) -> Tensor:
    return torch.full((num_bytes if device.type == "cuda" else 8,), 255, dtype=torch.uint8, device=device)


def decode(batch: Batch, table: Table, device: torch.device, **options: Any) -> Any:
    longest = max(batch.case.kv_lens, default=0)
    given = {"kv_layout": batch.case.layout, "bmm1_scale": SCALE, "bmm2_scale": 1.0, **options}
    return trtllm_batch_decode_with_kv_cache(
        batch.q, batch.kv, given.pop("workspace_buffer", workspace(device)), table.tables, table.lens, longest, **given
    )


def context(batch: Batch, table: Table, device: torch.device, **options: Any) -> Any:
    case = batch.case
    given = {"kv_layout": case.layout, "bmm1_scale": SCALE, "bmm2_scale": 1.0, **options}
    qo_indptr = batch.indices[0].to(device)
    longest = [max(lens, default=0) for lens in (case.qo_lens, case.kv_lens)]
    scales = given.pop("bmm1_scale"), given.pop("bmm2_scale")
    return trtllm_batch_context_with_kv_cache(
        batch.q, batch.kv, given.pop("workspace_buffer", workspace(device)), table.tables, table.lens, *longest,
        *scales, len(case.kv_lens), qo_indptr, qo_indptr, **given,
    )  # fmt: skip


def uniform(name: str, q_len: int, **options: Any) -> Case:
    case = Case(name, options={"causal": True, "sm_scale": SCALE}, **{"kv_lens": (33, 90, 200, 517), **options})
    return replace(case, qo_lens=(q_len,) * len(case.kv_lens))


DECODES = [
    uniform("one_query", 1),
    uniform("one_query_hnd", 1, layout="HND", heads=(4, 4)),
    uniform("page_size_1", 1, page_size=1, heads=(8, 1), q_dtype=FP16),
    uniform("odd_pages", 1, page_size=5, head_dim=64, heads=(20, 2)),
    uniform("many_short", 1, kv_lens=tuple(i % 40 + 1 for i in range(700))),
    uniform("long_and_empty", 1, kv_lens=(20000, 0, 3, 0, 4000)),
    uniform("fp8_cache", 1, kv_dtype=E4M3),
    uniform("fp8_e5m2_cache", 3, kv_dtype=E5M2, q_dtype=FP16),
    uniform("drafts", 4),
    uniform("drafts_hnd", 8, layout="HND", head_dim=256, heads=(4, 2)),
    uniform("many_drafts", 70, kv_lens=(70, 71, 400)),  # of the tile for long queries
    uniform("drafts_long_and_empty", 3, kv_lens=(20000, 0, 3, 2, 4000)),  # a query beyond the keys sees nothing
    uniform("drafts_of_small_pages", 3, page_size=3),
    uniform("strided", 4, strided=True),
    uniform("strided_decode", 1, strided=True),
]


@pytest.mark.parametrize("window_left", [-1, 7, 250])
@pytest.mark.parametrize("case", DECODES, ids=lambda case: case.name)
def test_decode_against_the_oracle(device: torch.device, case: Case, window_left: int) -> None:
    batch = make_batch(case, device)
    table, q_len = Table.of(batch, device), case.qo_lens[0]
    result = decode(batch, table, device, window_left=window_left, q_len_per_req=q_len, return_lse=True)
    check(result, expect(batch, window_left=window_left))
    other = xqa_batch_decode_with_kv_cache(
        batch.q, batch.kv, workspace(device), table.tables, table.lens, 0, SCALE, 1.0, window_left,
        kv_layout=case.layout, q_len_per_req=q_len,
    )  # fmt: skip
    assert torch.equal(other, result[0])


CONTEXTS = [
    Case("ordinary"),
    Case("hnd", layout="HND", head_dim=64),
    Case("page_size_1", page_size=1, heads=(4, 4)),
    Case("short", qo_lens=(1, 5, 0, 9), kv_lens=(3000, 5, 200, 4000)),
    Case("no_kv", qo_lens=(4, 130, 1), kv_lens=(0, 0, 70)),
    Case("more_queries_than_keys", qo_lens=(50, 200), kv_lens=(20, 130)),
    Case("fp8_cache", kv_dtype=E4M3),
    Case("ninety", qo_lens=tuple(i % 9 for i in range(90)), kv_lens=tuple(i % 50 + 9 for i in range(90))),
    Case(
        "many",
        qo_lens=tuple(i % 9 for i in range(1100)),
        kv_lens=tuple(i % 50 + 9 for i in range(1100)),
        cuda_only=True,
    ),
]


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_left": 30}, {"causal": False, "window_left": 30}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("case", CONTEXTS, ids=lambda case: case.name)
def test_context_against_the_oracle(device: torch.device, case: Case, options: dict[str, Any]) -> None:
    skip_elsewhere(case, device)
    batch = make_batch(replace(case, options={"causal": True, "sm_scale": SCALE}), device)
    table = Table.of(batch, device)
    check(context(batch, table, device, **options, return_lse=True), expect(batch, **options))
    if options == {"causal": False}:
        as_causal = context(batch, table, device, **options, window_right=0, return_lse=True)
        check(as_causal, expect(batch))


def test_requests_of_several_lengths(device: torch.device) -> None:
    """Ragged drafts, for which q_len_per_req is the longest."""
    case = Case("drafts", qo_lens=(3, 1, 0, 4), options={"causal": True, "sm_scale": SCALE})
    batch = make_batch(case, device)
    table, qo_indptr = Table.of(batch, device), offsets(case.qo_lens).to(device)
    result = decode(batch, table, device, q_len_per_req=None, max_q_len=4, cum_seq_lens_q=qo_indptr, return_lse=True)
    check(result, expect(batch))
    other = xqa_batch_decode_with_kv_cache(
        batch.q, batch.kv, workspace(device), table.tables, table.lens, 517, SCALE, q_len_per_req=4,
        q_cu_seq_lens=qo_indptr,
    )  # fmt: skip
    assert torch.equal(other, result[0])


def pack(seen: Tensor) -> Tensor:
    """Rows of bits as whole words of 32, in integers of 16 bits."""
    rows, width = seen.shape
    words = torch.zeros(rows, -(-width // 32) * 32, dtype=torch.bool)
    words[:, :width] = seen
    return flashinfer.packbits(words.flatten(), bitorder="little").view(torch.uint16).view(rows, -1)


def drafts(q_lens: tuple[int, ...], kind: str) -> list[Tensor]:
    """Which queries of a request each of them sees: those ahead of it, all, or its ancestors in a random tree."""
    generator = torch.Generator().manual_seed(len(q_lens))
    masks = []
    for q_len in q_lens:
        seen = torch.ones(q_len, q_len, dtype=torch.bool)
        if kind == "causal":
            seen = seen.tril()
        if kind == "tree":
            seen = torch.eye(q_len, dtype=torch.bool)
            for i in range(1, q_len):
                parent = int(torch.randint(0, i, (), generator=generator))
                seen[i] |= seen[parent]
        masks.append(seen)
    return masks


@pytest.mark.parametrize("window_left", [-1, 40])
@pytest.mark.parametrize("kind", ["causal", "all", "tree"])
@pytest.mark.parametrize(
    "case",
    [
        uniform("few", 4, kv_lens=(4, 37, 100, 517)),
        uniform("one", 1),
        uniform("words", 40, kv_lens=(40, 60, 72, 5000), heads=(4, 4)),  # more than one, over the ends of tiles
        uniform("long", 130, kv_lens=(130, 200, 4000), head_dim=64),
        uniform("fp8", 5, kv_dtype=E4M3, kv_lens=(5, 200, 0)),
        replace(uniform("ragged", 1), qo_lens=(3, 0, 35, 1), kv_lens=(3, 70, 40, 3000)),
    ],
    ids=lambda case: case.name,
)
def test_masks_of_drafts(device: torch.device, case: Case, kind: str, window_left: int) -> None:
    batch = make_batch(case, device)
    table, longest, masks = Table.of(batch, device), max(case.qo_lens), drafts(case.qo_lens, kind)
    padded = [torch.nn.functional.pad(seen, (0, longest - len(seen))) for seen in masks]
    mask = pack(torch.cat(padded)).to(device)
    options: dict[str, Any] = {"q_len_per_req": longest, "mask": mask, "window_left": window_left}
    if case.name == "ragged":
        offsets_ = offsets(case.qo_lens).to(device)
        options = {**options, "q_len_per_req": None, "max_q_len": longest, "cum_seq_lens_q": offsets_}
    else:
        options["mask"] = mask.view(len(case.qo_lens), longest, -1)
    whole = []
    for seen, q_len, kv_len in zip(masks, case.qo_lens, case.kv_lens):
        own = torch.ones(q_len, kv_len, dtype=torch.bool)
        own[:, kv_len - q_len :] = seen if kv_len else own
        whole.append(own)
    result = decode(batch, table, device, return_lse=True, **options)
    check(result, expect(replace(batch, masks=whole), window_left=window_left))


@pytest.mark.parametrize("q_len", [1, 5])
def test_the_same_bits_as_the_planned_wrappers(device: torch.device, q_len: int) -> None:
    """Which read pages listed end to end."""
    batch = make_batch(uniform("bits", q_len, kv_lens=(33, 4000, 0, 517)), device)
    qo_indptr, *pages = batch.indices
    out = decode(batch, Table.of(batch, device), device, q_len_per_req=q_len)
    options: dict[str, Any] = {"q_data_type": BF16, "sm_scale": SCALE}
    wrapper: Any
    if q_len == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
        wrapper.plan(*pages, 8, 2, 128, 16, **options)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device))
        wrapper.plan(qo_indptr, *pages, 8, 2, 128, 16, causal=True, **options)
    assert torch.equal(wrapper.run(batch.q, batch.kv), out)


def test_scales_and_outputs(device: torch.device) -> None:
    """Of a quantized cache: one goes to the logits, the other to the output, as numbers or on the device."""
    case = uniform("scales", 1, kv_dtype=E4M3)
    batch = make_batch(case, device)
    table = Table.of(batch, device)
    out = torch.full_like(batch.q, math.nan)
    lse = torch.full(batch.q.shape[:2], math.nan, device=device)
    result = decode(
        batch, table, device, bmm1_scale=torch.tensor([SCALE * 0.5], device=device),
        bmm2_scale=torch.tensor(3.0, device=device), out=out, lse=lse, return_lse=True, o_scale=None,
    )  # fmt: skip
    assert result[0] is out and result[1] is lse
    check(result, expect(batch, k_scale=0.5, v_scale=3.0))
    assert decode(batch, table, device, out=out) is out
    narrow = decode(batch, table, device, out_dtype="float16", bmm2_scale=2.0)
    assert narrow.dtype == FP16
    assert_close(narrow, expect(batch, v_scale=2.0)[0])


@pytest.mark.parametrize("q_len", [1, 4, 70])
def test_sinks(device: torch.device, q_len: int) -> None:
    batch = make_batch(uniform("sinks", q_len, kv_lens=(70, 90, 20000, 0)), device)
    table, sinks = Table.of(batch, device), torch.linspace(-2, 9, 8, device=device)
    for window_left in (-1, 100):
        expected = expect(batch, window_left=window_left, sinks=sinks)
        options: dict[str, Any] = {"window_left": window_left, "sinks": sinks, "return_lse": True}
        check(decode(batch, table, device, q_len_per_req=q_len, **options), expected)
        check(context(batch, table, device, **options), expected)


@pytest.mark.parametrize("q_len", [1, 4, 70])
def test_scales_on_the_device(device: torch.device, q_len: int) -> None:
    """Which only the kernel reads: the next call finds what is there by then."""
    batch = make_batch(uniform("scales", q_len, kv_dtype=E4M3), device)
    table, options = Table.of(batch, device), {"q_len_per_req": q_len, "return_lse": True}
    sm_scale, v_scale = (torch.tensor([value], device=device) for value in (SCALE, 1.0))
    for k_factor, v_factor in ((1.0, 2.0), (0.5, -3.0)):
        sm_scale.fill_(SCALE * k_factor)
        v_scale.fill_(v_factor)
        expected = expect(batch, k_scale=k_factor, v_scale=v_factor)
        check(decode(batch, table, device, bmm1_scale=sm_scale, bmm2_scale=v_scale, **options), expected)
        check(decode(batch, table, device, bmm1_scale=SCALE * k_factor, bmm2_scale=v_scale[0], **options), expected)
        check(context(batch, table, device, bmm1_scale=sm_scale, bmm2_scale=v_factor, return_lse=True), expected)


def test_fp8_queries(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    for q_len in (1, 4):
        case = uniform("fp8", q_len, q_dtype=E4M3, kv_dtype=E4M3)
        batch = make_batch(case, device)
        table = Table.of(batch, device)
        out = decode(batch, table, device, q_len_per_req=q_len, out_dtype=BF16)
        expected, _ = expect(batch)
        error = (out.cpu().double() - expected).norm() / expected.norm()
        assert out.dtype == BF16 and error < (0.04 if device.type == "cuda" else 0.005)
        with pytest.raises(UnsupportedConfig, match=r"the output would be torch\.float8_e4m3fn"):
            decode(batch, table, device, q_len_per_req=q_len)


def test_forms_of_the_arguments(device: torch.device) -> None:
    """Lengths of uint32, rows of a wider table, one tensor that is keys and values."""
    batch = make_batch(uniform("forms", 1), device)
    table, wide = Table.of(batch, device), Table.of(batch, device, gap=3)
    assert wide.tables.stride(0) == table.tables.stride(0) + 3
    expected = decode(batch, table, device)
    assert torch.equal(decode(batch, wide, device), expected)
    assert torch.equal(decode(batch, Table(table.tables, table.lens.view(torch.uint32)), device), expected)
    first = Table(table.tables[:1], table.lens[:1])
    one = replace(batch, q=batch.q[:1], case=replace(batch.case, kv_lens=batch.case.kv_lens[:1]))
    torch.testing.assert_close(decode(one, first, device), expected[:1], atol=1e-2, rtol=1e-2)
    assert isinstance(batch.kv, Tensor)
    keys = batch.kv[:, :1]
    both = decode(replace(batch, kv=keys), table, device)
    pair = decode(replace(batch, kv=(keys[:, 0], keys[:, 0])), table, device)
    assert torch.equal(both, pair)


def test_empty_batch(device: torch.device) -> None:
    batch = make_batch(replace(uniform("empty", 1), qo_lens=(), kv_lens=()), device)
    out, lse = decode(batch, Table.of(batch, device), device, return_lse=True)
    assert out.shape == (0, 8, 128) and lse.shape == (0, 8)
    assert context(batch, Table.of(batch, device), device).shape == (0, 8, 128)


@pytest.mark.parametrize("q_len", [1, 4])
def test_compiled(device: torch.device, q_len: int) -> None:
    batch = make_batch(uniform("compiled", q_len), device)
    table, memory, qo_indptr = Table.of(batch, device), workspace(device), batch.indices[0].to(device)

    def calls(q: Tensor) -> Any:
        decoded = trtllm_batch_decode_with_kv_cache(
            q, batch.kv, memory, table.tables, table.lens, 517, SCALE, 1.0, 40, kv_layout="NHD", q_len_per_req=q_len,
            return_lse=True,
        )  # fmt: skip
        filled = trtllm_batch_context_with_kv_cache(
            q, batch.kv, memory, table.tables, table.lens, q_len, 517, SCALE, 1.0, 4, qo_indptr, qo_indptr,
            kv_layout="NHD", out_dtype="bfloat16",
        )  # fmt: skip
        return *decoded, filled

    expected = calls(batch.q)
    compiled = torch.compile(calls, fullgraph=True, backend="aot_eager")(batch.q)
    assert all(torch.equal(one, other) for one, other in zip(compiled, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("q_len", [1, 4, 100])
def test_captured_and_replayed_for_other_lengths(q_len: int) -> None:
    device = torch.device("cuda")
    lengths = [(100, 100, 100, 100), (20000, 0, 100, 517), (1, 2, 3, 4)]
    batches = [make_batch(uniform("graph", q_len, kv_lens=kv_lens), device, seed=3) for kv_lens in lengths]
    width = 1300
    tables = torch.full((4, width), UNUSED, dtype=torch.int32, device=device)
    lens = torch.zeros(4, dtype=torch.int32, device=device)
    cache = torch.zeros(max(len(batch.kv) for batch in batches), 2, 16, 2, 128, dtype=BF16, device=device)
    q, memory = batches[0].q.clone(), workspace(device)

    def load(batch: Batch) -> None:
        assert isinstance(batch.kv, Tensor)
        given = Table.of(batch, device)
        tables.fill_(UNUSED)
        tables[:, : given.tables.shape[1]].copy_(given.tables)
        lens.copy_(given.lens)
        cache[: len(batch.kv)].copy_(batch.kv)
        q.copy_(batch.q)

    def call() -> Any:
        return trtllm_batch_decode_with_kv_cache(
            q, cache, memory, tables, lens, 20000, SCALE, kv_layout="NHD", q_len_per_req=q_len, return_lse=True
        )

    load(batches[0])
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for batch in (*batches, batches[1]):
        load(batch)
        memory.fill_(255)
        for poisoned in result:
            poisoned.fill_(math.nan)
        graph.replay()
        check(result, expect(batch))


@pytest.mark.gpu
def test_does_not_wait_for_the_device() -> None:
    device = torch.device("cuda")
    batch = make_batch(uniform("waits", 3), device)
    table, memory = Table.of(batch, device), workspace(device)
    qo_indptr = batch.indices[0].to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            decode(batch, table, device, q_len_per_req=3, workspace_buffer=memory)
            trtllm_batch_context_with_kv_cache(
                batch.q, batch.kv, memory, table.tables, table.lens, 3, 517, SCALE, 1.0, 4, qo_indptr, qo_indptr,
                kv_layout="NHD",
            )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_workspace_may_go() -> None:
    """Prepared calls hold its address, not it."""
    import weakref

    device = torch.device("cpu")
    batch, memory = make_batch(uniform("workspace", 1), device), workspace(device)
    gone = weakref.ref(memory)
    decode(batch, Table.of(batch, device), device, workspace_buffer=memory)
    del memory
    assert gone() is None


# ------------------------------------------------------------------------------------------------------------ refusals

ANY = torch.zeros(1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_cache_sf": (ANY, ANY)}, "kv_cache_sf asks for a cache with block scales"),
        ({"o_sf_scale": 2.0}, "o_sf_scale asks for an output in fp4"),
        ({"uses_shared_paged_kv_idx": False}, "other pages for values"),
        ({"skip_softmax_threshold_scale_factor": 0.5}, "approximate softmax"),
        ({"causal_seqlens_kv_global": ANY, "cp_world": 2}, "several ranks share"),
        ({"sparse_top_k": 64}, "a list of tokens for each query"),
        ({"bmm1_scale_log2": ANY}, "pass bmm1_scale"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused(options: dict[str, Any], message: str) -> None:
    device = torch.device("cpu")
    batch = make_batch(uniform("refused", 1), device)
    with pytest.raises(UnsupportedConfig, match=message):
        decode(batch, Table.of(batch, device), device, **options)


def test_hints_change_nothing() -> None:
    device = torch.device("cpu")
    batch = make_batch(uniform("hints", 1), device)
    table = Table.of(batch, device)
    hints = {
        "backend": "xqa", "multi_ctas_kv_counter_buffer": ANY, "length_aware_schedule": True, "cp_world": 4,
        "cp_rank": 2, "bf16q_fp8kv_transform_mode": "k_only", "sparse_top_k": 0,
    }  # fmt: skip
    assert torch.equal(decode(batch, table, device, **hints), decode(batch, table, device))
    with pytest.raises(TypeError, match="unexpected argument 'windows'"):
        decode(batch, table, device, windows=3)


def test_errors() -> None:
    device = torch.device("cpu")
    batch = make_batch(uniform("errors", 1), device)
    table, kv = Table.of(batch, device), batch.kv
    tables, lens = table.tables, table.lens
    assert isinstance(kv, Tensor)

    def refuses(kind: type[Exception], message: str, **changes: Any) -> None:
        given = {
            "query": batch.q, "kv_cache": kv, "workspace_buffer": ANY, "block_tables": tables, "seq_lens": lens,
            "max_seq_len": 517, "kv_layout": "NHD", **changes,
        }  # fmt: skip
        with pytest.raises(kind, match=message):
            trtllm_batch_decode_with_kv_cache(**given)

    refuses(ValueError, r"query has 4 tokens; expected 8, q_len_per_req 2", q_len_per_req=2)
    refuses(ValueError, r"block_tables is torch.int64", block_tables=tables.long())
    refuses(ValueError, r"block_tables has shape \[\d+\]", block_tables=tables[0])
    refuses(ValueError, r"seq_lens is torch.int64 \[4\]", seq_lens=lens.long())
    refuses(ValueError, r"seq_lens is torch.int32 \[3\]; expected contiguous int32 \[4\]", seq_lens=lens[:3])
    refuses(ValueError, r"cum_seq_lens_q is torch.int32 \[4\]", cum_seq_lens_q=lens)
    refuses(ValueError, r"kv_cache has shape", kv_cache=kv[0])
    refuses(ValueError, r"kv_layout is 'HDN'", kv_layout="HDN")
    refuses(ValueError, r"bmm1_scale is 0.0; expected a positive number", bmm1_scale=0.0)
    refuses(ValueError, r"o_scale is -1", o_scale=-1.0)
    refuses(UnsupportedConfig, r"bmm1_scale is a tensor of shape \[2\]; expected one number", bmm1_scale=torch.ones(2))
    refuses(ValueError, r"bmm1_scale is -1.0; expected a positive", bmm1_scale=torch.tensor(-1.0))
    refuses(ValueError, r"sinks is torch.float32 \[3\] .* expected torch.float32 \[8\]", sinks=torch.zeros(3))
    refuses(TypeError, r"bmm2_scale is 'a'; expected a number", bmm2_scale="a")
    refuses(ValueError, r"mask is torch.int16 .* expected contiguous integers of 16 bytes", mask=lens[:3].short())
    refuses(ValueError, r"query has shape \[4, 1024\]", query=batch.q.flatten(1))
    refuses(TypeError, r"query is NoneType; expected a tensor", query=None)
    refuses(TypeError, r"block_tables is list; expected a tensor", block_tables=tables.tolist())
    refuses(TypeError, r"kv_cache is a tuple of 3|expected a tensor or a pair", kv_cache=(kv, kv, kv))
    refuses(ValueError, r"out is torch.float16 .* expected", out=torch.zeros(4, 8, 64, dtype=FP16))
    refuses(UnsupportedConfig, r"num_qo_heads is 7", query=batch.q[:, :7])
    refuses(IndexError, r"block_tables\[1\] is 9999; expected 0 to", block_tables=tables.clone().index_fill_(
        1, torch.tensor([1]), 9999))  # fmt: skip
    refuses(IndexError, r"seq_lens\[0\] is -1; expected 0 to", seq_lens=lens - 34)
    refuses(IndexError, r"seq_lens\[0\] is 10033", seq_lens=lens + 10000)
    with pytest.raises(ValueError, match=r"block_tables has shape .*expected 5 rows, batch_size"):
        trtllm_batch_context_with_kv_cache(
            batch.q, kv, ANY, tables, lens, 1, 517, SCALE, 1.0, 5, lens, lens, kv_layout="NHD"
        )
    with pytest.raises(UnsupportedConfig, match="window_right asks for keys behind the query"):
        context(batch, table, device, causal=False, window_right=3)
    context(batch, table, device, causal=True, window_right=3)


@pytest.mark.gpu
def test_a_workspace_that_is_too_small() -> None:
    device = torch.device("cuda")
    batch = make_batch(uniform("small", 1), device)
    with pytest.raises(ValueError, match=r"workspace.* holds .* bytes; this plan needs"):
        decode(batch, Table.of(batch, device), device, workspace_buffer=workspace(device, 4096))
