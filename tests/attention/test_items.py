# SPDX-License-Identifier: Apache-2.0
"""Multi-item scoring: which keys a token sees that is of the prefix, of an item, or a delimiter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention import prefill as families
from flashinfer.jit import source, toolchain
from tests.attention.prefill_kit import (
    E4M3,
    FP32,
    Batch,
    Case,
    arguments,
    check,
    expect,
    make_batch,
    make_wrapper,
    plan,
    run,
)

# Of each request: its prefix, and its items. The first delimiter follows the prefix, and one follows each item.
Layout = tuple[int, tuple[int, ...]]
LAYOUTS: tuple[Layout, ...] = ((7, (3, 2, 4)), (130, (1, 200, 31, 32, 33)), (0, (5, 90)), (64, ()), (40, (0, 0, 3)))


def places_of(layout: Layout) -> list[int]:
    return [0] + [place for length in layout[1] for place in (*range(1, length + 1), 0)]


def visible(layout: Layout) -> Tensor:
    """[length, length], token by token, by who is of which item."""
    prefix_len, items = layout
    owner = [-1] * prefix_len + [-2]  # -2: delimiters
    for item, length in enumerate(items):
        owner += [item] * length + [-2]
    of = torch.tensor(owner)
    same = (of[:, None] == of) & (of >= 0)
    mask = (same | (of == -1)).tril()
    return mask


def length_of(layout: Layout) -> int:
    return layout[0] + len(places_of(layout))


def items(layouts: tuple[Layout, ...], device: torch.device) -> dict[str, Any]:
    """As SGLang builds them."""
    places = [torch.tensor(places_of(layout), dtype=torch.uint16) for layout in layouts]
    longest = max(len(row) for row in places)
    padded = [torch.cat([row, torch.zeros(longest - len(row), dtype=torch.uint16)]) for row in places]
    return {
        "prefix_len_ptr": torch.tensor([layout[0] for layout in layouts], dtype=torch.uint32).to(device),
        "token_pos_in_items_ptr": torch.cat(padded).to(device),
        "token_pos_in_items_len": longest,
        "max_item_len_ptr": torch.tensor([max(row.tolist()) for row in places], dtype=torch.uint16).to(device),
    }


def batch_of(layouts: tuple[Layout, ...], case: Case, device: torch.device, cached: int = 0) -> Batch:
    """Queries are the tokens from `cached` on; those before are in the cache alone."""
    kv_lens = tuple(length_of(layout) for layout in layouts)
    qo_lens = tuple(max(1, length - cached) for length in kv_lens)
    batch = make_batch(replace(case, qo_lens=qo_lens, kv_lens=kv_lens), device)
    batch.masks = [visible(layout)[-n:] for layout, n in zip(layouts, qo_lens)]
    return batch


def check_items(
    case: Case, device: torch.device, layouts: tuple[Layout, ...] = LAYOUTS, cached: int = 0, **options: Any
) -> None:
    batch = batch_of(layouts, case, device, cached)
    wrapper = make_wrapper(case, device)
    expected = expect(batch, **options)
    batch.masks = None  # what plan() is given instead
    for given in (items(layouts, device), items(layouts, torch.device("cpu"))):
        plan(wrapper, batch, **given, **options)
        check(run(wrapper, batch), expected)


def named(*cases: Case) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


@pytest.mark.parametrize(
    "case",
    named(
        Case("paged"), Case("page_1", page_size=1), Case("ragged", storage="ragged"), Case("not_causal", options={}),
        Case("window", options={"causal": True, "window_left": 50}), Case("hnd", layout="HND"),
        Case("soft_cap", options={"causal": True, "logits_soft_cap": 5.0}), Case("mqa", heads=(8, 1), head_dim=64),
        Case("fp8_kv", kv_dtype=E4M3),
    ),
)  # fmt: skip
def test_items_see_the_prefix_and_themselves(case: Case, device: torch.device) -> None:
    causal = {} if case.options else {"causal": True}  # a mask of items is causal, whatever plan() says of it
    batch = batch_of(LAYOUTS, case, device)
    wrapper = make_wrapper(case, device)
    expected = expect(batch, **causal)
    batch.masks = None
    plan(wrapper, batch, **items(LAYOUTS, device))
    check(run(wrapper, batch), expected)


@pytest.mark.parametrize("cached", [5, 100, 10_000], ids=["in_the_prefix", "in_an_item", "one_query"])
def test_cached_tokens(cached: int, device: torch.device) -> None:
    """Of a prefix, or of items too: positions count from the first token of the request."""
    check_items(Case("cached"), device, cached=cached)


def test_long_prefixes_that_are_split(device: torch.device) -> None:
    check_items(Case("split", heads=(4, 1)), device, layouts=((9000, (3, 7)), (2500, (1,) * 20)), cached=8990)


def test_one_request_needs_no_length(device: torch.device) -> None:
    """As upstream's default has it: the places are those of the only request, of any type."""
    case, layouts = Case("one"), LAYOUTS[1:2]
    batch = batch_of(layouts, case, device)
    expected = expect(batch)
    batch.masks = None
    given = items(layouts, device)
    del given["token_pos_in_items_len"], given["max_item_len_ptr"]
    wrapper = make_wrapper(case, device)
    for dtype in (torch.uint16, torch.int32, torch.int64):
        given["token_pos_in_items_ptr"] = given["token_pos_in_items_ptr"].to(dtype)
        given["prefix_len_ptr"] = given["prefix_len_ptr"].to(torch.int64)
        plan(wrapper, batch, **given)
        check(run(wrapper, batch), expected)


def test_places_of_16_bits(device: torch.device) -> None:
    """An item of more than 2^15 tokens, whose last sees the first of it and nothing of the one before."""
    layout = (3, (2, 40_000))
    case = Case("long_item", heads=(2, 1), head_dim=32, q_dtype=FP32 if device.type == "cpu" else torch.float16)
    if device.type == "cuda":
        case = replace(case, head_dim=64)
    length = length_of(layout)
    batch = make_batch(replace(case, qo_lens=(2,), kv_lens=(length,)), device)
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[:, :3] = True
    mask[0, 7 : length - 1] = True  # of the item; the second query is the delimiter behind it
    batch.masks = [mask]
    expected = expect(batch)
    batch.masks = None
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch, **items((layout,), device))
    check(run(wrapper, batch), expected)


@pytest.mark.gpu
def test_tokens_without_a_place_are_delimiters() -> None:
    """Lengths that only the device knows may exceed the places. Nothing behind them is read."""
    device = torch.device("cuda")
    case, layout = Case("short"), (70, (5, 90, 3))
    batch = batch_of((layout,), case, device)
    assert batch.masks is not None
    given, kept = items((layout,), device), 40
    around = torch.full((kept + 64,), 9, dtype=torch.int16, device=device)
    around[:kept] = given["token_pos_in_items_ptr"].view(torch.int16)[:kept]
    given.update(token_pos_in_items_ptr=around[:kept].view(torch.uint16), token_pos_in_items_len=kept)
    batch.masks[0][70 + kept :, 70:] = False
    expected = expect(batch)
    batch.masks = None
    batch.indices = tuple(index.to(device) for index in batch.indices)
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch, **given)
    check(run(wrapper, batch), expected)


def test_forward_keeps_the_items(device: torch.device) -> None:
    """SGLang runs by `forward`, whose `causal` says nothing of masks; and a plan without items has none left."""
    case = Case("forward")
    batch = batch_of(LAYOUTS, case, device)
    expected = expect(batch)
    batch.masks = None
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch, **items(LAYOUTS, device))
    for causal in (True, False):
        check(wrapper.forward_return_lse(*arguments(batch), causal=causal), expected)
    plan(wrapper, batch, prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0)
    check(run(wrapper, batch), expect(batch))


def test_places_belong_to_the_plan() -> None:
    """On the CPU, where the caller's could be read later."""
    device = torch.device("cpu")
    batch = batch_of(LAYOUTS, Case("own"), device)
    expected = expect(batch)
    batch.masks = None
    wrapper, given = make_wrapper(batch.case, device), items(LAYOUTS, device)
    plan(wrapper, batch, **given)
    for name in ("prefix_len_ptr", "token_pos_in_items_ptr"):
        given[name].zero_()
    check(run(wrapper, batch), expected)


def test_wrong_items() -> None:
    device = torch.device("cpu")
    batch = batch_of(LAYOUTS, Case("wrong"), device)
    masks, batch.masks = batch.masks, None
    wrapper, right = make_wrapper(batch.case, device), items(LAYOUTS, device)
    longest = right["token_pos_in_items_len"]
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "token_pos_in_items_ptr is NoneType; expected a tensor", {"token_pos_in_items_ptr": None}),
        (TypeError, "prefix_len_ptr is NoneType; expected a tensor", {"prefix_len_ptr": None}),
        (ValueError, r"prefix_len_ptr is torch\.float32; expected integers", {"prefix_len_ptr": torch.zeros(5)}),
        (ValueError, r"prefix_len_ptr has shape \[4\]; expected \[5\]", {"prefix_len_ptr": torch.zeros(4).int()}),
        (ValueError, r"token_pos_in_items_ptr holds \d+ positions; expected 5 requests", {"token_pos_in_items_len": 0}),
        (ValueError, "token_pos_in_items_ptr holds", {"token_pos_in_items_len": longest + 1}),
        (ValueError, f"token_pos_in_items_len is 9; expected {longest} or more", {"token_pos_in_items_len": 9}),
        (ValueError, "custom_mask", {"custom_mask": torch.cat([mask.flatten() for mask in masks or ()])}),
    ]
    for kind, match, given in wrong:
        with pytest.raises(kind, match=match):
            plan(wrapper, batch, **{**right, **given})
    plan(wrapper, batch, **right)
    with pytest.raises(UnsupportedConfig, match=r"prefix_len_ptr asks for .* Next step: plan\(\) of prefill takes it"):
        wrapper.run(*arguments(batch), prefix_len_ptr=right["prefix_len_ptr"])
    buffers = [torch.zeros(6, dtype=torch.int32) for _ in range(2)]
    pages = torch.zeros(999, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    captured = make_wrapper(
        batch.case, device, use_cuda_graph=True, qo_indptr_buf=buffers[0], paged_kv_indptr_buf=buffers[1],
        paged_kv_indices_buf=pages[0], paged_kv_last_page_len_buf=pages[1],
    )  # fmt: skip
    with pytest.raises(UnsupportedConfig, match="multi-item scoring, which has no buffers under use_cuda_graph"):
        plan(captured, batch, **right)


def test_an_empty_batch(device: torch.device) -> None:
    batch = make_batch(Case("empty", qo_lens=(), kv_lens=()), device)
    wrapper = make_wrapper(batch.case, device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    plan(wrapper, batch, prefix_len_ptr=none, token_pos_in_items_ptr=none)
    assert run(wrapper, batch)[0].shape[0] == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_they_compile(target: str) -> None:
    for queries in ("short", "medium"):
        spec = families.prefill(
            target, q_dtype="bf16", kv_dtype="bf16", head_dim=128, kv_storage="paged", mask="items",
            queries=queries,
        )  # fmt: skip
        assert toolchain.Nvrtc().compile(source.render(spec)).machine_code.startswith(b"\x7fELF")
