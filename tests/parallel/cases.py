# SPDX-License-Identifier: Apache-2.0
"""What holds for ranks that share a KV cache. The oracle knows of no ranks: it attends to whole requests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor  # which torch.testing imports: once, before ranks are forked
from torch import Tensor

from flashinfer.errors import ExchangeFailed, UnsupportedConfig
from flashinfer.parallel import (
    ContextParallel,
    GraphSizes,
    Pending,
    all_to_all_heads,
    exchange,
    ring,
    ring_prefill,
    zigzag_positions,
)
from tests.oracles import attention as oracle
from tests.parallel.kit import Case, Rank
from tests.tolerances import assert_close

HEADS, KV_HEADS, DIM, PAGE = 12, 2, 64, 4
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# -------------------------------------------------------------------------------------------------------------- batches


class Batch:
    """Whole requests, and the slice of each that a rank has, in pages of a cache whose other entries are NaN.

    slices: of each request the keys [begin, end) of this rank; None: interleaved pages.
    """

    def __init__(
        self, on: Rank, kv_lens: list[int], widths: tuple[int, ...], kv_heads: int, slices: list[Any] | None = None
    ) -> None:
        self.on, self.kv_lens = on, kv_lens
        # Keys and values, or the two parts of a latent row: [kv_len, kv_heads, width] of each request.
        self.whole = [
            [on.draw(length, kv_heads, width, seed=7 * i + part) for part, width in enumerate(widths)]
            for i, length in enumerate(kv_lens)
        ]
        keys = [self._keys(length, None if slices is None else slices[i]) for i, length in enumerate(kv_lens)]
        self.starts = None if slices is None else [begin for begin, _ in slices]
        self.lens = [len(one) for one in keys]
        counts = [-(-length // PAGE) for length in self.lens]
        num_pages = sum(counts) + 1
        self.cache = [
            torch.full((num_pages, PAGE, kv_heads, width), math.nan, dtype=torch.bfloat16, device=on.device)
            for width in widths
        ]
        pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(on.rank))[: sum(counts)]
        self.indptr = torch.tensor([0, *counts]).cumsum(0).int()
        self.indices = pages.int()
        self.last_page_len = torch.tensor([(length - 1) % PAGE + 1 for length in self.lens], dtype=torch.int32)
        for i, mine in enumerate(keys):
            for page, j in zip(pages[self.indptr[i] :].tolist(), range(counts[i])):
                some = mine[j * PAGE : (j + 1) * PAGE]
                for cache, rows in zip(self.cache, self.whole[i]):
                    cache[page, : len(some)] = rows[some]

    def _keys(self, kv_len: int, own: tuple[int, int] | None) -> list[int]:
        if own is not None:
            return list(range(*own))
        return [key for key in range(kv_len) if key // PAGE % self.on.size == self.on.rank]

    @property
    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.indptr, self.indices, self.last_page_len

    def attention(self, q: Tensor, qo_lens: list[int], causal: bool, **options: Any) -> tuple[Tensor, Tensor]:
        found = [
            oracle.attention(some, *kv, causal=causal, **options) for some, kv in zip(q.split(qo_lens), self.whole)
        ]
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def slices_of(on: Rank, kv_lens: list[int], cuts: list[list[float]]) -> list[tuple[int, int]]:
    """Cuts of each request as parts of its length; ranks in the order that the request says."""
    found = []
    for i, length in enumerate(kv_lens):
        edges = [0, *(round(part * length) for part in cuts[i % len(cuts)][: on.size - 1])]
        edges = [*edges, *[length] * (on.size + 1 - len(edges))]
        at = (on.rank + i) % on.size if i % 2 else on.rank
        found.append((edges[at], edges[at + 1]))
    return found


def agrees(result: Any, expected: tuple[Tensor, Tensor], on: Rank, heads: str = "all") -> None:
    out, lse = result
    share = slice(None)
    if heads == "own":
        count = expected[0].shape[1] // on.size
        share = slice(on.rank * count, (on.rank + 1) * count)
    assert_close(out, expected[0][:, share])
    assert_close(lse, expected[1][:, share])


@contextmanager
def always(name: str) -> Iterator[None]:
    """Exchange by "gather" or "scatter", whatever the table says."""
    before = exchange.gather_limit
    exchange.gather_limit = lambda num_ranks: math.inf if name == "gather" else -1.0
    try:
        yield
    finally:
        exchange.gather_limit = before


# --------------------------------------------------------------------------------------------------------------- decode

LENGTHS = [37, 1, 0, PAGE, 5, 128]  # of which some have no page on some ranks, and one none anywhere


def check_decode(on: Rank, parallel: ContextParallel, batch: Batch) -> None:
    q = on.draw(len(LENGTHS), HEADS, DIM)
    expected = batch.attention(q, [1] * len(LENGTHS), False)
    decode = parallel.decode(on.workspace())
    decode.plan(*batch.table, HEADS, KV_HEADS, DIM, PAGE, q_data_type="bfloat16")
    cache = tuple(batch.cache)
    for name in ("gather", "scatter"):
        with always(name):
            agrees(decode.run(q, cache, return_lse=True), expected, on)
            pending = decode.run(q, cache, return_lse=True, async_op=True, heads="own")
            assert isinstance(pending, Pending)
            agrees(pending.wait(), expected, on, "own")
            assert pending.wait() is pending.wait()
            out = decode.run(q, cache)
            assert isinstance(out, Tensor) and out.is_contiguous()
            assert_close(out, expected[0])


@case
def decode_over_interleaved_pages(on: Rank) -> None:
    check_decode(on, ContextParallel(), Batch(on, LENGTHS, (DIM, DIM), KV_HEADS))


@case
def decode_over_contiguous_slices(on: Rank) -> None:
    """Uneven ones, in any order of ranks, some of them empty."""
    slices = slices_of(on, LENGTHS, [[0.1, 0.1, 0.7], [0.5, 1.0, 1.0], [0.0, 0.0, 0.0]])
    check_decode(on, ContextParallel(placement="contiguous"), Batch(on, LENGTHS, (DIM, DIM), KV_HEADS, slices))


@case
def a_rank_without_any_key(on: Rank) -> None:
    slices = [(0, length) if on.rank == on.size - 1 else (0, 0) for length in LENGTHS]
    check_decode(on, ContextParallel(placement="contiguous"), Batch(on, LENGTHS, (DIM, DIM), KV_HEADS, slices))


@case
def sinks_count_once(on: Rank) -> None:
    batch, q, sinks = (
        Batch(on, LENGTHS, (DIM, DIM), KV_HEADS),
        on.draw(len(LENGTHS), HEADS, DIM),
        on.draw(HEADS).float(),
    )
    expected = batch.attention(q, [1] * len(LENGTHS), False, sinks=sinks)
    decode = ContextParallel().decode(on.workspace())
    decode.plan(*batch.table, HEADS, KV_HEADS, DIM, PAGE, q_data_type="bfloat16")
    agrees(decode.run(q, tuple(batch.cache), return_lse=True, sinks=sinks), expected, on)


# --------------------------------------------------------------------------------------------------------------- append

QO_LENS = [5, 1, 0, 17, 9, 2]
KV_LENS = [37, 9, 4, 17, 128, 2]  # two of them prompts without a past


def check_append(on: Rank, parallel: ContextParallel, batch: Batch, **given: Any) -> None:
    q = on.draw(sum(QO_LENS), HEADS, DIM)
    append = parallel.append(on.workspace())
    qo_indptr = torch.tensor([0, *QO_LENS]).cumsum(0).int()
    for causal in (True, False):
        lens = {"kv_lens": batch.kv_lens, "kv_starts": batch.starts} if causal else {}
        shape = (HEADS, KV_HEADS, DIM, PAGE)
        append.plan(qo_indptr, *batch.table, *shape, causal=causal, q_data_type="bfloat16", **lens, **given)
        result = append.run(q, tuple(batch.cache), return_lse=True)
        agrees(result, batch.attention(q, QO_LENS, causal), on)


@case
def append_over_interleaved_pages(on: Rank) -> None:
    check_append(on, ContextParallel(), Batch(on, KV_LENS, (DIM, DIM), KV_HEADS))


@case
def append_over_contiguous_slices(on: Rank) -> None:
    """Cut within the new tokens too: no causal mask over local keys is right."""
    slices = slices_of(on, KV_LENS, [[0.1, 0.93, 0.97], [0.5, 1.0, 1.0], [0.0, 0.3, 0.6]])
    check_append(on, ContextParallel(placement="contiguous"), Batch(on, KV_LENS, (DIM, DIM), KV_HEADS, slices))


@case
def append_at_the_last_rank(on: Rank) -> None:
    """Which plans causally, the others without a mask. Each of them once."""
    slices = [(0, length - new) if on.rank == 0 else (length, length) for length, new in zip(KV_LENS, QO_LENS)]
    if on.rank == on.size - 1:
        slices = [(length - new, length) for length, new in zip(KV_LENS, QO_LENS)]
    batch = Batch(on, KV_LENS, (DIM, DIM), KV_HEADS, slices)
    check_append(on, ContextParallel(placement="contiguous"), batch)


@case
def append_with_sinks(on: Rank) -> None:
    batch, q, sinks = (
        Batch(on, KV_LENS, (DIM, DIM), KV_HEADS),
        on.draw(sum(QO_LENS), HEADS, DIM),
        on.draw(HEADS).float(),
    )
    append = ContextParallel().append(on.workspace())
    qo_indptr = torch.tensor([0, *QO_LENS]).cumsum(0).int()
    append.plan(qo_indptr, *batch.table, HEADS, KV_HEADS, DIM, PAGE, kv_lens=KV_LENS, q_data_type="bfloat16")
    expected = batch.attention(q, QO_LENS, True, sinks=sinks)
    agrees(append.run(q, tuple(batch.cache), return_lse=True, sinks=sinks), expected, on)


# ----------------------------------------------------------------------------------------------------- latent attention

CKV, KPE = 256, 64


def check_mla(on: Rank, parallel: ContextParallel, slices: list[Any] | None) -> None:
    batch = Batch(on, KV_LENS, (CKV, KPE), 1, slices)
    q_nope, q_pe = on.draw(sum(QO_LENS), HEADS, CKV), on.draw(sum(QO_LENS), HEADS, KPE)
    caches = [cache.squeeze(2) for cache in batch.cache]
    mla, sm_scale = parallel.mla(on.workspace()), 0.07
    qo_indptr = torch.tensor([0, *QO_LENS]).cumsum(0).int()
    lens = torch.tensor(batch.lens, dtype=torch.int32)
    for causal in (True, False):
        options = (causal, sm_scale, torch.bfloat16, torch.bfloat16)
        given = (qo_indptr, batch.indptr, batch.indices, lens)
        whole: dict[str, Any] = {"kv_lens": torch.tensor(KV_LENS), "kv_starts": batch.starts} if causal else {}
        mla.plan(*given, HEADS, CKV, KPE, PAGE, *options, **whole)
        result = mla.run(q_nope, q_pe, *caches, return_lse=True)
        rows = [torch.cat(parts, dim=-1) for parts in batch.whole]
        found = [
            oracle.attention(some, row, row[..., :CKV], causal=causal, sm_scale=sm_scale)
            for some, row in zip(torch.cat([q_nope, q_pe], dim=-1).split(QO_LENS), rows)
        ]
        agrees(result, (torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])), on)


@case
def latent_attention_over_interleaved_pages(on: Rank) -> None:
    check_mla(on, ContextParallel(), None)


@case
def latent_attention_over_contiguous_slices(on: Rank) -> None:
    slices = slices_of(on, KV_LENS, [[0.1, 0.93, 0.97], [0.5, 1.0, 1.0], [0.0, 0.3, 0.6]])
    check_mla(on, ContextParallel(placement="contiguous"), slices)


# -------------------------------------------------------------------------------------------------- whole sequences


@case
def queries_stay_and_keys_go_round(on: Rank) -> None:
    num_tokens = 2 * on.size * 9
    q, k, v = on.draw(num_tokens, HEADS, DIM), *(on.draw(num_tokens, KV_HEADS, DIM, seed=i) for i in (1, 2))
    mine = zigzag_positions(num_tokens, on.size, on.rank).to(on.device)
    kept = k[mine].clone()
    for causal in (True, False):
        expected = [x[mine.cpu()] for x in oracle.attention(q, k, v, causal=causal, sm_scale=0.2)]
        options = {"causal": causal, "sm_scale": 0.2}
        own = (q[mine], kept, v[mine])
        agrees(ring_prefill(*own, return_lse=True, **options), (expected[0], expected[1]), on)
        assert torch.equal(kept, k[mine])
        ring._MOST_STATES = 2  # as if there were more ranks
        assert_close(ring_prefill(*own, **options), expected[0])
        ring._MOST_STATES = 4
    with pytest.raises(ValueError, match="expected an even number"):
        ring_prefill(q[:3], k[:3], v[:3])


@case
def heads_for_tokens_and_back(on: Rank) -> None:
    whole = on.draw(5 * on.size, HEADS, 8)
    tokens, heads = whole.split(5)[on.rank], whole.split(HEADS // on.size, dim=1)[on.rank]
    assert torch.equal(all_to_all_heads(tokens), heads)
    assert torch.equal(all_to_all_heads(heads, scatter="tokens"), tokens)
    assert all_to_all_heads(whole[:0]).shape == (0, HEADS // on.size, 8)
    with pytest.raises(ValueError, match=rf"x has 1 heads; expected a multiple of {on.size}"):
        all_to_all_heads(whole[:, :1])


# ------------------------------------------------------------------------------------------------------ what else holds


@case
def states_of_any_kernel_are_merged(on: Rank) -> None:
    """Also of heads that do not divide, of half precision, and of no token at all."""
    heads = on.size + 1
    outs, lses = on.draw(on.size, 3, heads, 32, dtype=torch.float16), on.draw(on.size, 3, heads, dtype=torch.float32)
    lses[0, 1] = -math.inf
    lses[:, 2] = -math.inf
    weights = torch.exp2(lses.double() - torch.logsumexp(lses.double() * math.log(2), 0) / math.log(2)).nan_to_num(0)
    expected = (weights[..., None] * outs.double()).sum(0), lses.double().mul(math.log(2)).logsumexp(0) / math.log(2)
    parallel = ContextParallel()
    agrees(parallel.merge(outs[on.rank], lses[on.rank], return_lse=True), tuple(x.cpu() for x in expected), on)
    assert parallel.merge(outs[on.rank, :0], lses[on.rank, :0]).shape == (0, heads, 32)
    with pytest.raises(ValueError, match=r"heads='own' needs a multiple of"):
        parallel.merge(outs[on.rank], lses[on.rank], heads="own")
    with pytest.raises(ValueError, match=r"lse \[2, "):
        parallel.merge(outs[on.rank], lses[on.rank, :2])


@case
def what_cannot_be_is_refused(on: Rank) -> None:
    """On every rank, so that none waits for another."""
    batch, parallel = Batch(on, KV_LENS, (DIM, DIM), KV_HEADS), ContextParallel()
    decode, append, shape = (
        parallel.decode(on.workspace()),
        parallel.append(on.workspace()),
        (HEADS, KV_HEADS, DIM, PAGE),
    )
    qo_indptr = torch.tensor([0, *QO_LENS]).cumsum(0).int()
    for name, value in {"window_left": 5, "pos_encoding_mode": "ALIBI", "q_len_per_req": 2}.items():
        with pytest.raises(UnsupportedConfig, match=f"{name} is "):
            decode.plan(*batch.table, *shape, **{name: value})
    for name in ("custom_mask", "token_pos_in_items_ptr"):
        with pytest.raises(UnsupportedConfig, match=f"{name} is a tensor"):
            append.plan(qo_indptr, *batch.table, *shape, **{name: torch.ones(3)})
    with pytest.raises(ValueError, match="before a plan"):
        decode.run(on.draw(6, HEADS, DIM), tuple(batch.cache))
    for given, message in (
        ({}, "kv_lens is None"),
        ({"kv_lens": KV_LENS[1:]}, r"kv_lens is torch.int64 \[5\]; expected integers \[6\]"),
        ({"kv_lens": [37, 9, 4, 17, 128, 1]}, "request 5 has 2 queries and 1 keys"),
        ({"kv_lens": KV_LENS, "kv_starts": KV_LENS}, "kv_starts is given"),
        ({"kv_lens": [length + 400 for length in KV_LENS]}, "as page p is on rank p mod"),
    ):
        with pytest.raises((ValueError, ExchangeFailed), match=message):
            append.plan(qo_indptr, *batch.table, *shape, **given)
    with pytest.raises(ValueError, match="placement is 'random'"):
        ContextParallel(placement="random")
    contiguous = ContextParallel(placement="contiguous").append(on.workspace())
    for given, message in (({}, "kv_starts is None"), ({"kv_starts": [400] * 6}, "expected a slice of them")):
        with pytest.raises((ValueError, ExchangeFailed), match=f"{message}|failed on rank"):
            contiguous.plan(qo_indptr, *batch.table, *shape, kv_lens=KV_LENS, **given)


@case
def a_group_of_some_ranks(on: Rank) -> None:
    some = list(range(1, on.size))
    group = dist.new_group(some)
    if on.rank == 0:
        with pytest.raises(ValueError, match="expected a process group that this rank is of"):
            ContextParallel(group)
        return
    parallel = ContextParallel(group)
    assert (parallel.rank, parallel.world_size) == (on.rank - 1, on.size - 1)
    inside = Rank(parallel.rank, parallel.world_size, on.device)
    batch, q = Batch(inside, LENGTHS, (DIM, DIM), KV_HEADS), on.draw(len(LENGTHS), HEADS, DIM)
    decode = parallel.decode(on.workspace())
    decode.plan(*batch.table, HEADS, KV_HEADS, DIM, PAGE, q_data_type="bfloat16")
    expected = batch.attention(q, [1] * len(LENGTHS), False)
    agrees(decode.run(q, tuple(batch.cache), return_lse=True), expected, inside)
    tokens = 2 * inside.size * 3
    mine = zigzag_positions(tokens, inside.size, inside.rank).to(on.device)
    q, k, v = on.draw(tokens, HEADS, DIM), *(on.draw(tokens, KV_HEADS, DIM, seed=i) for i in (1, 2))
    assert_close(ring_prefill(q[mine], k[mine], v[mine], group), oracle.attention(q, k, v, causal=True)[0][mine.cpu()])


@case
def all_hear_of_a_rank_that_fails(on: Rank) -> None:
    """At once, with its error where it was raised, and can go on."""
    batch, q = Batch(on, LENGTHS, (DIM, DIM), KV_HEADS), on.draw(len(LENGTHS), HEADS, DIM)
    decode = ContextParallel(check=True).decode(on.workspace())
    plan = (*batch.table, HEADS, KV_HEADS, DIM, PAGE)
    last = on.size - 1
    with pytest.raises(ValueError if on.rank == last else ExchangeFailed) as caught:
        decode.plan(*plan[:3], HEADS if on.rank < last else HEADS + 1, *plan[4:], q_data_type="bfloat16")
    assert on.rank == last or f"plan() failed on rank {last} of {on.size}" in str(caught.value)
    with pytest.raises(ValueError, match="before a plan"):
        decode.run(q, tuple(batch.cache))
    decode.plan(*plan, q_data_type="bfloat16")
    with pytest.raises(ValueError if on.rank == last else ExchangeFailed, match=r"bfloat16|run\(\) failed on rank"):
        decode.run(q if on.rank < last else q.half(), tuple(batch.cache))
    with pytest.raises(ExchangeFailed, match=r"the index of heads in \('all', 'own'\) \[1, "):
        decode.run(q, tuple(batch.cache), heads="own" if on.rank == 0 else "all")
    expected = batch.attention(q, [1] * len(LENGTHS), False)
    agrees(decode.run(q, tuple(batch.cache), return_lse=True), expected, on)


@case
def captured_and_replayed(on: Rank) -> None:
    """Of decode plan and run, of the others run. On the CPU, which has no graphs, the plans that a graph gets."""
    sizes = GraphSizes(len(KV_LENS), 90, sum(QO_LENS), PAGE)
    parallel, shape = ContextParallel(), (HEADS, KV_HEADS, DIM, PAGE)
    decode, append = (make(on.workspace(), graph=sizes) for make in (parallel.decode, parallel.append))
    mla = parallel.mla(on.workspace(), graph=sizes)
    q, q_nope, q_pe = (on.draw(sum(QO_LENS), HEADS, dim) for dim in (DIM, CKV, KPE))
    first, second = [37, 9, 4, 17, 128, 2], [40, 5, 6, 33, 61, 9]
    pages = sizes.num_pages
    caches = [torch.empty(pages, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16, device=on.device) for _ in range(2)]
    rows = [torch.empty(pages, PAGE, width, dtype=torch.bfloat16, device=on.device) for width in (CKV, KPE)]
    table = [torch.zeros(size, dtype=torch.int32, device=on.device) for size in (7, pages, 6)]
    qo_indptr = torch.tensor([0, *QO_LENS]).cumsum(0).int()

    def prepare(kv_lens: list[int]) -> tuple[Batch, Batch]:
        batch, latent = Batch(on, kv_lens, (DIM, DIM), KV_HEADS), Batch(on, kv_lens, (CKV, KPE), 1)
        for cache, given in zip([*caches, *rows], [*batch.cache, *latent.cache]):
            cache[: len(given)] = given.squeeze(2) if cache.dim() == 3 else given
        for place, given in zip(table, batch.table):
            place[: len(given)] = given.to(on.device)
        append.plan(qo_indptr, *batch.table, *shape, kv_lens=kv_lens, q_data_type="bfloat16")
        lens = torch.tensor(latent.lens, dtype=torch.int32)
        options = (True, 0.07, torch.bfloat16, torch.bfloat16)
        mla.plan(qo_indptr, latent.indptr, latent.indices, lens, HEADS, CKV, KPE, PAGE, *options, kv_lens=kv_lens)
        return batch, latent

    def step() -> list[Any]:
        used = table[1] if on.device.type == "cuda" else table[1][: int(table[0][-1])]
        decode.plan(table[0], used, table[2], *shape, q_data_type="bfloat16")
        pending = decode.run(q[: len(first)], tuple(caches), return_lse=True, async_op=True)
        appended = append.run(q, tuple(caches), return_lse=True, heads="own")
        assert isinstance(pending, Pending)
        return [pending.wait(), appended, mla.run(q_nope, q_pe, *rows, return_lse=True)]

    def check(results: list[Any], batch: Batch, latent: Batch) -> None:
        agrees(results[0], batch.attention(q[: len(first)], [1] * len(first), False), on)
        agrees(results[1], batch.attention(q, QO_LENS, True), on, "own")
        whole = [torch.cat(parts, dim=-1) for parts in latent.whole]
        found = [
            oracle.attention(some, row, row[..., :CKV], causal=True, sm_scale=0.07)
            for some, row in zip(torch.cat([q_nope, q_pe], dim=-1).split(QO_LENS), whole)
        ]
        agrees(results[2], (torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])), on)

    batches = prepare(first)
    check(step(), *batches)
    if on.device.type == "cpu":
        batches = prepare(second)
        check(step(), *batches)
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step()
    for lengths in (second, first):
        batches = prepare(lengths)
        graph.replay()
        torch.cuda.synchronize()
        check(results, *batches)
