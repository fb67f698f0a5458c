# SPDX-License-Identifier: Apache-2.0
"""Bit by bit the same row, whatever shares the batch: fixed_split_size and disable_split_kv."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from tests.attention.prefill_kit import BF16, E4M3, offsets
from tests.oracles.attention import attention
from tests.tolerances import assert_close

PAGE_SIZE, NUM_PAGES, HEADS, DIM = 16, 3000, (8, 2), 64
SPLITTINGS = [{"fixed_split_size": 4}, {"disable_split_kv": True}, {"fixed_split_size": 40, "disable_split_kv": True}]


class Pool:
    """A paged cache in which any page may be anybody's, and one request that takes part in many batches."""

    def __init__(self, device: torch.device, kv_len: int, qo_len: int, kv_dtype: torch.dtype = BF16) -> None:
        generator = torch.Generator().manual_seed(kv_len)
        self.device, self.kv_len, self.qo_len, self.generator = device, kv_len, qo_len, generator
        cache = torch.randn(NUM_PAGES, 2, PAGE_SIZE, HEADS[1], DIM, generator=generator)
        self.cache = cache.to(device, kv_dtype)
        self.pages = torch.randperm(NUM_PAGES, generator=generator)[: -(-kv_len // PAGE_SIZE)].int()
        self.q = torch.randn(qo_len, HEADS[0], DIM, generator=generator).to(device, BF16)

    def batch(self, draw: random.Random, longest: int, qo_len: int | None) -> tuple[int, list[int], list[int], Tensor]:
        """Where the request is, lengths of keys and of queries of all, and their pages."""
        count, place = draw.choice([0, 1, 3, 17, 70]), 0
        kv_lens = [draw.choice([0, 1, draw.randint(1, 100), draw.randint(1, longest)]) for _ in range(count)]
        qo_lens = [draw.randint(0, 40) if qo_len is None else qo_len for _ in range(count)]
        place = draw.randint(0, count)
        pages = [
            torch.randint(0, NUM_PAGES, (-(-kv_len // PAGE_SIZE),), generator=self.generator).int()
            for kv_len in kv_lens
        ]
        kv_lens.insert(place, self.kv_len)
        qo_lens.insert(place, self.qo_len)
        pages.insert(place, self.pages)
        return place, kv_lens, qo_lens, torch.cat(pages)

    def expected(self) -> tuple[Tensor, Tensor]:
        kv = self.cache[self.pages.long().to(self.device)]
        k, v = (kv[:, i].flatten(0, 1)[: self.kv_len] for i in (0, 1))
        return attention(self.q, k, v, causal=True)


def table(kv_lens: list[int], pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = tuple(-(-kv_len // PAGE_SIZE) for kv_len in kv_lens)
    last = torch.tensor([(kv_len - 1) % PAGE_SIZE + 1 for kv_len in kv_lens], dtype=torch.int32)
    return offsets(counts), pages, last


def workspace(device: torch.device) -> Tensor:
    return torch.empty(256 << 20 if device.type == "cuda" else 8, dtype=torch.uint8, device=device)


Rows = Callable[[int, list[int], list[int], Tensor], tuple[Tensor, Tensor]]


def decode(pool: Pool, **options: Any) -> Rows:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(pool.device))

    def rows(place: int, kv_lens: list[int], qo_lens: list[int], pages: Tensor) -> tuple[Tensor, Tensor]:
        wrapper.plan(
            *table(kv_lens, pages), *HEADS, DIM, PAGE_SIZE, q_data_type=BF16, kv_data_type=pool.cache.dtype,
            q_len_per_req=pool.qo_len, **options,
        )  # fmt: skip
        q = torch.randn(len(kv_lens) * pool.qo_len, HEADS[0], DIM).to(pool.device, BF16)
        own = slice(place * pool.qo_len, (place + 1) * pool.qo_len)
        q[own] = pool.q
        out, lse = wrapper.run(q, pool.cache, return_lse=True)
        return out[own], lse[own]

    return rows


def prefill(pool: Pool, **options: Any) -> Rows:
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(pool.device))

    def rows(place: int, kv_lens: list[int], qo_lens: list[int], pages: Tensor) -> tuple[Tensor, Tensor]:
        wrapper.plan(
            offsets(tuple(qo_lens)), *table(kv_lens, pages), *HEADS, DIM, PAGE_SIZE, causal=True, q_data_type=BF16,
            kv_data_type=pool.cache.dtype, **options,
        )  # fmt: skip
        q = torch.randn(sum(qo_lens), HEADS[0], DIM).to(pool.device, BF16)
        own = slice(sum(qo_lens[:place]), sum(qo_lens[: place + 1]))
        q[own] = pool.q
        out, lse = wrapper.run(q, pool.cache, return_lse=True)
        return out[own], lse[own]

    return rows


def compositions(pool: Pool, make: Callable[..., Rows], count: int, uniform: bool, **options: Any) -> int:
    """Of so many batches, how many gave the request other bits than alone."""
    rows, draw = make(pool, **options), random.Random(count)
    alone = [x.clone() for x in rows(0, [pool.kv_len], [pool.qo_len], pool.pages)]
    expected = pool.expected()
    assert_close(alone[0], expected[0], scale=2.0 if pool.cache.dtype == E4M3 else 1.0)
    torch.testing.assert_close(alone[1].cpu().double(), expected[1], atol=1e-3, rtol=1e-4)
    longest = 3000 if pool.device.type == "cuda" else 300
    others = 0
    for _ in range(count):
        found = rows(*pool.batch(draw, longest, pool.qo_len if uniform else None))
        others += not all(torch.equal(one, other) for one, other in zip(found, alone))
    return others


@pytest.mark.parametrize("options", SPLITTINGS, ids=str)
@pytest.mark.parametrize("qo_len, kv_len", [(1, 2000), (1, 20000), (4, 5003), (40, 900)])
def test_decode(device: torch.device, qo_len: int, kv_len: int, options: dict[str, Any]) -> None:
    pool = Pool(device, kv_len, qo_len)
    assert compositions(pool, decode, 100, True, **options) == 0


@pytest.mark.parametrize("options", SPLITTINGS, ids=str)
@pytest.mark.parametrize("qo_len, kv_len", [(1, 20000), (7, 5003), (33, 2000), (300, 700)])
def test_prefill(device: torch.device, qo_len: int, kv_len: int, options: dict[str, Any]) -> None:
    pool = Pool(device, kv_len, qo_len)
    assert compositions(pool, prefill, 100, False, **options) == 0


@pytest.mark.parametrize("make", [decode, prefill])
def test_fp8_cache(device: torch.device, make: Callable[..., Rows]) -> None:
    pool = Pool(device, 5003, 2, E4M3)
    assert compositions(pool, make, 40, make is decode, fixed_split_size=16) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("make, qo_len", [(decode, 1), (prefill, 7)])
def test_without_it_bits_depend_on_the_batch(make: Callable[..., Rows], qo_len: int) -> None:
    """Or these tests would show nothing."""
    assert compositions(Pool(torch.device("cuda"), 20000, qo_len), make, 30, make is decode) > 0


@pytest.mark.gpu
def test_splits_of_all_requests_of_a_batch() -> None:
    """Against the oracle, where several are split and merged in two steps, and some are not."""
    device, kv_lens = torch.device("cuda"), [20000, 0, 130, 700, 9001, 64]
    pool = Pool(device, 20000, 3)
    counts = [-(-kv_len // PAGE_SIZE) for kv_len in kv_lens]
    pages = torch.randperm(NUM_PAGES)[: sum(counts)].int()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    wrapper.plan(*table(kv_lens, pages), *HEADS, DIM, PAGE_SIZE, q_data_type=BF16, q_len_per_req=3, fixed_split_size=8)
    q = torch.randn(3 * len(kv_lens), HEADS[0], DIM).to(device, BF16)
    for _ in range(2):
        out = torch.full_like(q, math.nan)
        wrapper.run(q, pool.cache, out=out)
        for i, (kv_len, of_request) in enumerate(zip(kv_lens, pages.split(counts))):
            kv = pool.cache[of_request.long().to(device)]
            k, v = (kv[:, half].flatten(0, 1)[:kv_len] for half in (0, 1))
            rows = slice(3 * i, 3 * i + 3)
            assert_close(out[rows], attention(q[rows], k, v, causal=True)[0])


@pytest.mark.gpu
def test_a_workspace_without_room_for_the_splits() -> None:
    device = torch.device("cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8, device=device))
    kv_lens = [100] * 64
    pages = torch.zeros(7 * 64, dtype=torch.int32)
    plan = (*table(kv_lens, pages), *HEADS, DIM, PAGE_SIZE)
    wrapper.plan(*plan, q_data_type=BF16, fixed_split_size=4)
    cache = torch.zeros(1, 2, PAGE_SIZE, HEADS[1], DIM, device=device, dtype=BF16)
    q = torch.zeros(64, HEADS[0], DIM, device=device, dtype=BF16)
    with pytest.raises(ValueError, match=r"partial results; with fixed_split_size this batch may need \d+\. Next step"):
        wrapper.run(q, cache)
    wrapper.plan(*plan, q_data_type=BF16, disable_split_kv=True)
    assert (wrapper.run(q, cache) == 0).all()


def test_sizes_that_are_none() -> None:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(8))
    index = (*table([5], torch.zeros(1, dtype=torch.int32)), *HEADS, DIM, PAGE_SIZE)
    with pytest.raises(ValueError, match="fixed_split_size is -2; expected at least -1"):
        wrapper.plan(*index, fixed_split_size=-2)
    with pytest.raises(TypeError, match="disable_split_kv is 'yes'; expected True or False"):
        wrapper.plan(*index, disable_split_kv="yes")
    with pytest.raises(ValueError, match="q_len_per_req is 0; expected at least 1"):
        wrapper.plan(*index, q_len_per_req=0)
