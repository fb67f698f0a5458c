# SPDX-License-Identifier: Apache-2.0
"""Tiles of keys that functions of masks leave out: in the gap between two parts, and where they are proved hidden or
seen; on a GPU, of every way in which prefill brings keys in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from examples import attention_variants as examples
from flashinfer.families.attention import prefill as families
from flashinfer.variants import Function
from tests.attention import decode_kit, prefill_kit
from tests.attention.prefill_kit import BF16, E4M3, Case
from tests.attention.variant_kit import given, of_names, run_prefill

LONG: dict[str, Any] = {"qo_lens": (200, 1, 70), "kv_lens": (900, 700, 1500), "options": {}}
GAPS = [
    Case("paged", **LONG),
    Case("page_1", **LONG, page_size=1),
    Case("ragged", **LONG, storage="ragged", cuda_only=True),
    Case("short", **{**LONG, "qo_lens": (3, 1, 9)}, cuda_only=True),
    Case("head_dim_96", **LONG, head_dim=96, cuda_only=True),  # of no Hopper kernel
    Case("head_dim_256", **LONG, head_dim=256, cuda_only=True),
    Case("fp8_kv", **LONG, kv_dtype=E4M3, cuda_only=True),
    Case("fp8_kv_page_1", **LONG, kv_dtype=E4M3, page_size=1, cuda_only=True),
    Case("fp8", **LONG, q_dtype=E4M3, o_dtype=BF16, kv_dtype=E4M3, cuda_only=True),
]


@pytest.mark.parametrize("case", GAPS, ids=of_names)
def test_tiles_between_the_first_tokens_and_a_window(case: Case, device: torch.device) -> None:
    if case.cuda_only and device.type == "cpu":
        pytest.skip("one loop for all of them")
    for window, num_first in ((40, 4), (300, 130), (0, 0)):
        run_prefill(case, device, mask=examples.window_and_first(window=window, num_first=num_first))


@flashinfer.mask(window=int, num_first="i32[batch_size]")
def window_and_prefix(b, h, q, k, x):
    return ((q - k <= x.window) | (k < x.num_first[b])) & (k <= q)


@pytest.mark.sanitizer
@pytest.mark.parametrize("head_dim", [128, 96])  # 96 of no Hopper kernel
def test_gaps_of_each_request(head_dim: int, device: torch.device) -> None:
    """Also by blocks that find no unit, which know of no request."""
    num_first = torch.tensor([4, 130, 0], dtype=torch.int32, device=device)
    run_prefill(Case("", **LONG, head_dim=head_dim), device, mask=window_and_prefix(window=40, num_first=num_first))


@flashinfer.mask(window=int, num_first=int)
def gap_and_holes(b, h, q, k, x):
    return ((q - k <= x.window) | (k < x.num_first)) & (k <= q) & (k % 3 != 0)


@flashinfer.mask(window=int, num_first=int)
def two_gaps(b, h, q, k, x):
    return (k <= q) & ((q - k <= x.window) | (k < x.num_first)) & ((k < 650) | (k > 690))


@pytest.mark.parametrize("mask", [gap_and_holes, two_gaps], ids=of_names)
def test_what_a_gap_hides_beside_something_else(mask: Function, device: torch.device) -> None:
    run_prefill(Case("", **LONG), device, mask=mask(window=40, num_first=4))


@pytest.mark.parametrize("num_queries", [3, 40])
def test_tiles_in_a_gap_are_not_read(num_queries: int, device: torch.device) -> None:
    mask = examples.window_and_first(window=40, num_first=4)
    case = Case("", qo_lens=(num_queries,), kv_lens=(2000,), options={"mask": mask})
    batch = prefill_kit.make_batch(case, device)
    expected = prefill_kit.expect(batch)
    assert isinstance(batch.kv, Tensor)
    batch.kv[batch.indices[2][192 // 16 : 1744 // 16].long().to(device)] = math.nan
    wrapper = prefill_kit.make_wrapper(case, device)
    prefill_kit.plan(wrapper, batch)
    prefill_kit.check(prefill_kit.run(wrapper, batch), expected)


@flashinfer.mask(is_seen="bool[batch_size, n, m]")
def seen_blocks(b, h, q, k, x):
    """Whose tiles are full, empty and neither, in any order."""
    return (k <= q) & x.is_seen[b, q // 64, k // 64]


@flashinfer.mask(is_seen="bool[batch_size, n, m]", is_dense="bool[num_heads]", window=int)
def seen_by_heads(b, h, q, k, x):
    """A gap, behind which tiles are renumbered, and holes that some heads have."""
    return (k <= q) & ((q - k <= x.window) | (k < 40)) & (x.is_dense[h] | x.is_seen[b, q // 32, k // 128])


PROVED: dict[str, Any] = {"qo_lens": (70, 1, 40), "kv_lens": (4500, 700, 300), "options": {}}  # 32 tiles are 4096
PROOFS = [
    Case("paged", **PROVED),
    Case("page_1", **PROVED, page_size=1),
    Case("ragged", **PROVED, storage="ragged", cuda_only=True),
    Case("mha", **PROVED, heads=(2, 2)),
    Case("short", **{**PROVED, "qo_lens": (3, 1, 9)}, cuda_only=True),
    Case("head_dim_64", **PROVED, head_dim=64, cuda_only=True),
    Case("head_dim_96", **PROVED, head_dim=96, cuda_only=True),  # of no Hopper kernel
    Case("head_dim_256", **PROVED, head_dim=256, cuda_only=True),
    Case("fp8_kv", **PROVED, kv_dtype=E4M3, cuda_only=True),
    Case("fp8", **PROVED, q_dtype=E4M3, o_dtype=BF16, kv_dtype=E4M3, cuda_only=True),
    Case("fp8_page_1", **PROVED, q_dtype=E4M3, o_dtype=BF16, kv_dtype=E4M3, page_size=1, cuda_only=True),
    Case("custom", **PROVED, mask="bool"),
]


@pytest.mark.parametrize("case", PROOFS, ids=of_names)
def test_tiles_proved_full_and_empty(case: Case, device: torch.device) -> None:
    if case.cuda_only and device.type == "cpu":
        pytest.skip("one loop for all of them")
    generator = torch.Generator().manual_seed(3)
    blocks, runs = (torch.rand(3, 4500 // size + 1, 71, generator=generator) < 0.3 for size in (64, 32))
    runs[0, :, 1:34] = False  # 33 tiles
    run_prefill(case, device, mask=seen_blocks(is_seen=blocks.to(device)))
    is_dense = (torch.arange(case.heads[0]) // (case.heads[0] // case.heads[1]) == 1).to(device)
    run_prefill(case, device, mask=seen_by_heads(is_seen=runs.to(device), is_dense=is_dense, window=100))


@flashinfer.mask(document="i32[batch_size, n]", window=int)
def own_document(b, h, q, k, x):
    """With a gap, behind which tiles are renumbered."""
    return (k <= q) & ((q - k <= x.window) | (k < 200)) & (x.document[b, q] == x.document[b, k])


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 1])
def test_entries_are_those_of_the_request_and_of_now(page_size: int) -> None:
    """What a block remembers of one request says nothing of another, nor of the next launch."""
    device, kv_lens = torch.device("cuda"), (700, 1500, 300, 2100)
    lengths = torch.randint(20, 400, (2, len(kv_lens), 200), generator=torch.Generator().manual_seed(4))
    document, other = (
        torch.stack([torch.arange(200).repeat_interleave(n)[:2100] for n in of_launch]).int() for of_launch in lengths
    )
    document = document.to(device)
    mask = own_document(document=document, window=600)
    case = Case("", (70,) * len(kv_lens), kv_lens, options={"mask": mask}, page_size=page_size)
    batch, wrapper = prefill_kit.make_batch(case, device), prefill_kit.make_wrapper(case, device)
    prefill_kit.plan(wrapper, batch)
    for _ in range(2):
        prefill_kit.check(prefill_kit.run(wrapper, batch), prefill_kit.expect(batch))
        document.copy_(other)


@flashinfer.mask(is_seen="bool[batch_size, n]")
def blocks_of_128(b, h, q, k, x):
    return x.is_seen[b, k // 128]


@pytest.mark.gpu
@pytest.mark.parametrize("disable_split_kv", [False, True])
def test_hopper_reads_no_tile_that_is_proved_empty(disable_split_kv: bool) -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("kernels for every GPU have loads under way before they ask")
    is_seen = torch.rand(2, 70, generator=torch.Generator().manual_seed(5)) < 0.2
    is_seen[0, 10:50], is_seen[0, :2], is_seen[0, -2:] = False, False, False  # the first and the last of a unit
    is_seen[1] = False  # a unit without any
    case = Case(
        "", qo_lens=(100, 3), kv_lens=(70 * 128,) * 2, options={"mask": blocks_of_128(is_seen=is_seen.to(device))}
    )
    batch, is_hidden = prefill_kit.make_batch(case, device), (~is_seen.view(-1)).repeat_interleave(128 // 16)
    expected, wrapper = prefill_kit.expect(batch), prefill_kit.make_wrapper(case, device)
    assert isinstance(batch.kv, Tensor)
    prefill_kit.plan(wrapper, batch, disable_split_kv=disable_split_kv)
    batch.kv[batch.indices[2][: len(is_hidden)][is_hidden].long().to(device)] = math.nan
    prefill_kit.check(prefill_kit.run(wrapper, batch), expected)


@flashinfer.mask(is_seen="bool[batch_size, n]")
def blocks_of_64(b, h, q, k, x):
    return x.is_seen[b, k // 64]


def test_tiles_proved_empty_are_not_read() -> None:
    """By prefill and decode on the CPU; kernels for every GPU have loads under way before they ask."""
    device, is_seen = torch.device("cpu"), torch.tensor([[True, False, False, True, False, True, True]])
    kv_lens, options = (7 * 64,), {"mask": blocks_of_64(is_seen=is_seen)}
    is_hidden = (~is_seen[0]).repeat_interleave(64 // 16)  # of pages
    case = Case("", qo_lens=(40,), kv_lens=kv_lens, options=options)
    batch, wrapper = prefill_kit.make_batch(case, device), prefill_kit.make_wrapper(case, device)
    expected = prefill_kit.expect(batch)
    assert isinstance(batch.kv, Tensor)
    batch.kv[batch.indices[2][: len(is_hidden)][is_hidden].long()] = math.nan
    prefill_kit.plan(wrapper, batch)
    prefill_kit.check(prefill_kit.run(wrapper, batch), expected)

    decoded = decode_kit.Case("", kv_lens=kv_lens, options=options)
    queries, decoder = decode_kit.Batch(decoded, device), decode_kit.make_wrapper(device, decoded.layout)
    expected = queries.expected()
    assert isinstance(queries.cache, Tensor)
    queries.cache[queries.indices[: len(is_hidden)][is_hidden].long()] = math.nan
    queries.plan(decoder)
    decode_kit.check(queries.run(decoder), expected, decoded)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [examples.causal, examples.prefix_lm, examples.t5], ids=of_names)
def test_prefill_of_long_queries(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, of masks that are a range without a begin, in a tile of their own."""
    for name in ("LONG_ROWS", "MANY_ROWS"):
        monkeypatch.setattr(families, name, 0)
    device = torch.device("cuda")
    run_prefill(Case("long", (700, 1, 70, 400), (900, 90, 200, 517), options={}), device, **given(device, function))
