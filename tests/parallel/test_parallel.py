# SPDX-License-Identifier: Apache-2.0
"""Ranks that share a KV cache: 2, 3 and 4 of gloo on the CPU, and of NCCL where there are two GPUs."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

from flashinfer.parallel import ContextParallel, zigzag_positions
from flashinfer.parallel.exchange import BYTES_PER_US, COLLECTIVE_US, STEP_US, StateBlock, gather_limit
from flashinfer.parallel.slices import ContiguousSlices, InterleavedPages, PageTable, cut, mask_of
from tests.kit import ROOT
from tests.parallel import kit


def require_passed(said: dict[str, list[str]]) -> None:
    failed = {name: [what for what in ranks if what] for name, ranks in said.items()}
    assert not any(failed.values()), "\n".join(f"{name}: {what}" for name, all_ in failed.items() for what in all_)


def test_on_gloo() -> None:
    require_passed(kit.run("tests.parallel.cases", "cpu", "2", "3", "4"))


@pytest.mark.gpu
def test_on_nccl() -> None:
    """On one GPU, what a graph and a ring of one are."""
    if torch.cuda.device_count() >= 2:
        require_passed(kit.run("tests.parallel.cases", "cuda", "2"))
    alone = "captured_and_replayed,append_over_interleaved_pages,latent_attention_over_contiguous_slices"
    require_passed(kit.run("tests.parallel.cases", "cuda", f"1:{alone},queries_stay_and_keys_go_round"))


def test_ranks_left_alone() -> None:
    for name, said in kit.run("tests.parallel.failures", "cpu", "3:a_rank_dies", "3:a_rank_hangs").items():
        assert (said[0], said[2]) == ("", ""), f"{name}: {said}"


# --------------------------------------------------------------------------------------------------- what needs no rank


def test_outside_of_a_group() -> None:
    with pytest.raises(ValueError, match=r"torch.distributed is not initialized; call init_process_group\(\)"):
        ContextParallel()


def test_zigzag() -> None:
    parts = [zigzag_positions(24, 3, rank).tolist() for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(24)) and parts[0] == [0, 1, 2, 3, 20, 21, 22, 23]
    # Rows of a causal mask that a rank has: as many pairs on each.
    assert len({sum(position + 1 for position in part) for part in parts}) == 1
    with pytest.raises(ValueError, match="expected a multiple of 6"):
        zigzag_positions(25, 3, 0)


def test_the_way_of_an_exchange() -> None:
    """The arithmetic of the table in exchange.py: at the limit both ways take as long. The guide shows it."""
    assert gather_limit(2) == math.inf
    for size in (3, 4, 8, 64):
        state = gather_limit(size)
        gathered, scattered = (size - 1) * state, 2 * (size - 1) / size * state
        further = COLLECTIVE_US + (size - 2) * STEP_US
        assert gathered / BYTES_PER_US == pytest.approx(scattered / BYTES_PER_US + further)
    text = (ROOT / "docs" / "context_parallel.md").read_text()
    rows = re.findall(r"^\| (?:W|gathered|tokens of) .*(?=\|$)", text, re.M)
    ranks, limits, tokens = ([cell.strip() for cell in row.split("|")[1:]] for row in rows)
    shown = dict(zip(ranks[2:], zip(limits[2:], tokens[2:])))
    assert shown == {
        str(size): (f"{gather_limit(size) / 1e6:.2f} MB", str(int(gather_limit(size) // (32 * (2 * 128 + 4)))))
        for size in (3, 4, 8, 16, 64)
    }


def test_blocks_hold_states_without_a_gap_in_a_row() -> None:
    block = StateBlock(3, 5, 64, torch.bfloat16)
    blocks = block.new(4, torch.device("cpu"))
    values, lse = block.by_rank(blocks)
    values.copy_(torch.randn(4, 3, 5, 64))
    kept = values.clone()
    lse.copy_(torch.randn(4, 3, 5))
    assert torch.equal(values, kept) and values[2].is_contiguous() and lse[2].is_contiguous()
    assert values.data_ptr() % 16 == 0 and values.stride(0) * 2 % 16 == 0 and block.num_bytes % 16 == 0


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_counts_of_slices(num_ranks: int) -> None:
    """Against counting one by one."""
    lens = torch.arange(40)
    counts = [InterleavedPages(4, num_ranks, rank).count(lens) for rank in range(num_ranks)]
    assert torch.equal(sum(counts[1:], counts[0]), lens)
    for rank, count in enumerate(counts):
        assert count.tolist() == [sum(key // 4 % num_ranks == rank for key in range(length)) for length in range(40)]
    some = ContiguousSlices(torch.tensor([0, 7, 20]), torch.tensor([5, 0, 9]))
    assert some.count(torch.tensor([3, 9, 25])).tolist() == [3, 0, 5] and some.count(lens[:3]).tolist() == [0, 0, 0]


def visible(qo_len: int, kv_len: int, keys: list[int]) -> list[list[bool]]:
    return [[key <= kv_len - qo_len + i for key in keys] for i in range(qo_len)]


@pytest.mark.parametrize("always_split", [False, True])
def test_cuts_show_what_positions_say(always_split: bool) -> None:
    """Of many small batches: the pairs of query and key that a cut shows are those of the whole requests."""
    draw = torch.Generator().manual_seed(0)

    def number(high: int) -> int:
        return int(torch.randint(high, (), generator=draw))

    seen = set()
    for trial in range(300):
        kv_lens = [number(30) for _ in range(3)]
        qo_lens = [min(number(9), length) for length in kv_lens]
        page, ranks = 1 + number(4), 1 + number(3)
        if trial % 2:
            slices = InterleavedPages(page, ranks, number(ranks))
            keys = [[k for k in range(length) if k // page % ranks == slices.rank] for length in kv_lens]
        else:
            begins = [number(length + 1) for length in kv_lens]
            ends = [
                length if number(2) else begin + number(length - begin + 1) for length, begin in zip(kv_lens, begins)
            ]
            keys = [list(range(begin, end)) for begin, end in zip(begins, ends)]
            slices = ContiguousSlices(torch.tensor(begins), torch.tensor([len(one) for one in keys]))
        lens = torch.tensor([len(one) for one in keys])
        pages = -(-lens // page)
        indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0))
        table = PageTable(indptr, torch.randperm(int(indptr[-1]), generator=draw), lens, page)
        found = cut(torch.tensor(qo_lens), table, torch.tensor(kv_lens), slices, always_split)
        seen.add((found.mask, found.is_aligned))
        for i in range(3):
            expected = visible(qo_lens[i], kv_lens[i], keys[i])
            own = len(keys[i])
            aligned = visible(qo_lens[i], own, list(range(own)))
            if found.mask != "split":
                assert expected == (aligned if found.mask == "causal" else [[True] * own] * qo_lens[i])
                continue
            assert found.old is not None and found.recent is not None
            assert found.counts is not None and found.requests is not None
            old, recent = int(found.old.lens[i]), int(found.recent.lens[i])
            counts = found.counts[found.requests == i].tolist()
            assert [[True] * (old + n) + [False] * (recent - n) for n in counts] == expected or recent == 0
            if recent == 0:
                assert expected == [[True] * own] * qo_lens[i]
            elif found.is_aligned:
                assert visible(qo_lens[i], recent, list(range(recent))) == [row[old:] for row in expected]
            assert recent <= qo_lens[i] + page
            here = slice(int(indptr[i]), int(indptr[i + 1]))
            both = [part.indices[part.indptr[i] : part.indptr[i + 1]] for part in (found.old, found.recent)]
            assert torch.cat(both).tolist() == table.indices[here].tolist()
        if found.mask == "split":
            assert found.counts is not None and found.recent is not None
            widths = found.recent.lens[found.requests]
            bits = mask_of(found.counts, widths, torch.device("cpu"))
            assert [int(row.sum()) for row in bits.split(widths.tolist())] == found.counts.tolist()
    assert seen == (
        {("split", False)} if always_split else {("none", False), ("causal", False), ("split", False), ("split", True)}
    )
