# SPDX-License-Identifier: Apache-2.0
"""Index tensors whose values are wrong: an error that names the entry where the host sees values, and elsewhere no
access outside of the tensors that were given. Both from one list, on the CPU target and on a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

import flashinfer
from flashinfer import env
from flashinfer.host import indices
from tests.ops.slots_kit import HEAD_DIM, MEMOS, NUM_PAGES, PAGE_SIZE, fresh_memos, make_call, values_not_seen
from tests.oracles import page as oracle
from tests.oracles import rope as rope_oracle
from tests.tolerances import assert_close


class Wrong(NamedTuple):
    functions: tuple[str, ...]
    argument: str
    entry: int
    value: int
    message: str  # a regular expression


APPENDS = (
    "append_paged_kv_cache",
    "append_paged_kv_cache, fp8",
    "append_paged_mla_kv_cache",
    "rope_append_paged_kv_cache",
)
RAGGED = ("apply_rope", "apply_rope_inplace", "apply_llama31_rope", "apply_llama31_rope_inplace")
TABLES = ("apply_rope_with_cos_sin_cache", "apply_rope_with_cos_sin_cache_inplace")
WRONG = {
    "a request past the last": Wrong(APPENDS, "batch_indices", 2, 2, r"batch_indices\[2\] is 2; expected below 2"),
    "a request far off": Wrong(
        APPENDS, "batch_indices", 1, 1 << 30, r"batch_indices\[1\] is 1073741824; expected below"
    ),
    "a position past the pages": Wrong(
        APPENDS, "positions", 2, 4, r"positions\[2\] is 4; expected below 4: request 1 has 1 pages of 4"
    ),
    "the largest position": Wrong(
        APPENDS, "positions", 0, 2**31 - 1, r"positions\[0\] is 2147483647; expected below 8"
    ),
    "a page past the cache": Wrong(
        APPENDS, "kv_indices", 1, NUM_PAGES, r"kv_indices\[1\] is 5; expected below 5.*position [45] of request 0"
    ),
    "a page far off": Wrong(APPENDS, "kv_indices", 2, 2**31 - 1, r"kv_indices\[2\] is 2147483647; expected below 5"),
    "pages that end past kv_indices": Wrong(
        APPENDS, "kv_indptr", 2, 5, r"kv_indptr ends at 5; expected at most 4, the length of kv_indices"
    ),
    "pages that end far off": Wrong(APPENDS, "kv_indptr", 2, 1 << 30, r"kv_indptr ends at 1073741824"),
    "pages that start before kv_indices": Wrong(
        APPENDS, "kv_indptr", 0, -3, r"kv_indptr must start at 0.*got -3, 2, 3"
    ),
    "pages that descend": Wrong(APPENDS, "kv_indptr", 1, 4, r"kv_indptr must start at 0 or above.*got 0, 4, 3"),
    "rows that end past q": Wrong(RAGGED, "indptr", 2, 6, r"indptr ends at 6; expected at most 5, the rows of q"),
    "rows that start before q": Wrong(RAGGED, "indptr", 0, -(2**31), r"indptr must start at 0 or above"),
    "rows that descend": Wrong(RAGGED, "indptr", 1, 2**31 - 1, r"indptr must start at 0 or above and never descend"),
    "a position past the table": Wrong(
        TABLES, "positions", 3, 16, r"positions\[3\] is 16; expected 0 to 15, the rows of"
    ),
    "a position before the table": Wrong(TABLES, "positions", 1, -1, r"positions\[1\] is -1; expected 0 to 15"),
    "a position far past the table": Wrong(TABLES, "positions", 0, 2**31 - 1, r"positions\[0\] is 2147483647"),
    "more rows than nnz": Wrong(
        ("get_batch_indices_positions",), "append_indptr", 2, 6, r"append_indptr ends at 6; expected at most 5, nnz"
    ),
    "rows before the first": Wrong(
        ("get_batch_indices_positions",), "append_indptr", 0, -1, r"append_indptr must start at 0 or above"
    ),
    "rows far before the first": Wrong(
        ("get_batch_indices_positions",), "append_indptr", 0, -(2**31), r"append_indptr must start at 0 or above"
    ),
    "offsets that descend": Wrong(
        ("get_batch_indices_positions",), "append_indptr", 1, 2**31 - 1, r"never descend; got 0, 2147483647, 3"
    ),
    "a request shorter than its rows": Wrong(
        ("get_batch_indices_positions",),
        "seq_lens",
        0,
        1,
        r"seq_lens\[0\] is 1; expected 2, the rows that append_indptr",
    ),
    "a negative length": Wrong(("get_batch_indices_positions",), "seq_lens", 1, -5, r"seq_lens\[1\] is -5; expected 1"),
    "a last page that is too long": Wrong(
        ("get_seq_lens",), "kv_last_page_len", 1, 5, r"kv_last_page_len\[1\] is 5; expected at most the page_size, 4"
    ),
    "a last page of less than nothing": Wrong(
        ("get_seq_lens",), "kv_last_page_len", 0, -1, r"kv_last_page_len\[0\] is -1; expected at most the page_size"
    ),
    "page lists that descend": Wrong(("get_seq_lens",), "kv_indptr", 1, 7, r"kv_indptr must start at 0 or above"),
}
EACH = [(name, function) for name, wrong in WRONG.items() for function in wrong.functions]


def spoil(arguments: dict[str, Any], wrong: Wrong) -> None:
    arguments[wrong.argument] = arguments[wrong.argument].clone()
    arguments[wrong.argument][wrong.entry] = wrong.value


@pytest.mark.parametrize("name, function", EACH)
@pytest.mark.parametrize("prepared", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_wrong_index_is_named(name: str, function: str, prepared: bool, index_dtype: torch.dtype) -> None:
    """On the CPU, at every call; and the call changes nothing."""
    device = torch.device("cpu")
    call = make_call(function, device)
    for argument, value in call.arguments.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.int32 and argument not in call.written:
            call.arguments[argument] = value.to(index_dtype)
    with fresh_memos():
        if prepared:
            call.run()
        spoil(call.arguments, WRONG[name])
        before = call.bits()
        with pytest.raises((IndexError, ValueError), match=WRONG[name].message) as caught:
            call.run()
        assert str(caught.value).startswith(f"{call.name}: ") and "\n" not in str(caught.value)
        assert all(torch.equal(x, y) for x, y in zip(call.bits(), before))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def unseeing(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device whose values the host does not look at: a GPU, and a CPU that it takes for one."""
    with values_not_seen():
        yield torch.device(request.param)


@pytest.mark.sanitizer
@pytest.mark.parametrize("name, function", EACH)
def test_a_wrong_index_leads_nowhere(unseeing: torch.device, name: str, function: str) -> None:
    """Where nobody looks: the rows that are right are as ever, and what is written lies in memory of its own."""
    call, reference = make_call(function, unseeing), make_call(function, unseeing)
    guards = {}
    for argument in call.written:
        value = call.arguments[argument]
        if isinstance(value, torch.Tensor):
            guards[argument], call.arguments[argument] = guarded(value)
    spoil(call.arguments, WRONG[name])
    call.run()
    reference.run()
    if unseeing.type == "cuda":
        torch.cuda.synchronize()
    for argument, guard in guards.items():
        size = call.arguments[argument].numel()
        assert guard[: -size - GUARD].eq(GUARD_VALUE).all() and guard[-GUARD:].eq(GUARD_VALUE).all()
        if function in APPENDS and argument != "q_out":
            # Every entry holds what the right call puts there, or nothing.
            got, expected = call.arguments[argument].cpu(), reference.arguments[argument].cpu()
            assert ((got == expected) | (got == 0)).all()


GUARD, GUARD_VALUE = 4096, 77


def guarded(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer, and a copy of a tensor within it."""
    whole = torch.full((value.numel() + 2 * GUARD,), GUARD_VALUE, dtype=value.dtype, device=value.device)
    inner = whole[GUARD : GUARD + value.numel()].view(value.shape)
    inner.copy_(value)
    return whole, inner


@pytest.mark.parametrize("seed", range(40))
def test_random_indices(unseeing: torch.device, seed: int) -> None:
    """Rows that have a slot are in it, whatever the others say."""
    draw = random.Random(seed)
    dtype = draw.choice([torch.int32, torch.int64])
    some = lambda limit: draw.choice([draw.randrange(-2, limit + 3), draw.randrange(limit), -(2**31), 2**31 - 1])  # noqa: E731
    num_rows, batch_size = draw.randrange(1, 7), draw.randrange(0, 4)
    bounds = sorted(draw.randrange(5) for _ in range(batch_size + 1))
    lists = {
        "batch_indices": [some(max(1, batch_size)) for _ in range(num_rows)],
        "positions": [some(6) for _ in range(num_rows)],
        "kv_indices": [some(NUM_PAGES) for _ in range(draw.randrange(3, 6))],
        "kv_indptr": bounds if draw.random() < 0.8 else [some(5) for _ in bounds],
    }
    call = make_call("append_paged_kv_cache", unseeing)
    call.arguments.update({name: torch.tensor(values, dtype=dtype, device=unseeing) for name, values in lists.items()})
    call.arguments["append_key"] = torch.randn(num_rows, 2, HEAD_DIM, device=unseeing)
    call.arguments["append_value"] = torch.randn(num_rows, 2, HEAD_DIM, device=unseeing)
    cache = call.arguments["paged_kv_cache"]
    slots = oracle.slots(**lists, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
    written = [slot for slot in slots if isinstance(slot, tuple)]
    if len(set(written)) < len(written):
        pytest.skip("two rows in one slot: either may win")
    expected = cache.cpu().clone()
    for row, slot in enumerate(slots):
        if isinstance(slot, tuple):
            expected[slot[0], 0, slot[1]] = call.arguments["append_key"][row].cpu()
            expected[slot[0], 1, slot[1]] = call.arguments["append_value"][row].cpu()
    call.run()
    assert torch.equal(cache.cpu(), expected)


@pytest.mark.parametrize("seed", range(200))
def test_random_indices_are_refused_or_right(seed: int) -> None:
    draw = random.Random(seed)
    some = lambda limit: draw.randrange(-1, limit + (draw.random() < 0.2))  # noqa: E731
    num_rows, batch_size = draw.randrange(1, 5), draw.randrange(1, 4)
    lists = {
        "batch_indices": [some(batch_size) for _ in range(num_rows)],
        "positions": [some(6) for _ in range(num_rows)],
        "kv_indices": [some(NUM_PAGES) for _ in range(6)],
        "kv_indptr": sorted(draw.randrange(7 + (draw.random() < 0.05)) for _ in range(batch_size + 1)),
    }
    call = make_call("append_paged_kv_cache", torch.device("cpu"))
    call.arguments.update({name: torch.tensor(values, dtype=torch.int32) for name, values in lists.items()})
    call.arguments["append_key"] = torch.randn(num_rows, 2, HEAD_DIM)
    call.arguments["append_value"] = torch.randn(num_rows, 2, HEAD_DIM)
    slots = oracle.slots(**lists, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
    if "wrong" in slots or lists["kv_indptr"][-1] > len(lists["kv_indices"]):
        before = call.bits()
        with pytest.raises(IndexError):
            call.run()
        assert all(torch.equal(x, y) for x, y in zip(call.bits(), before))
    else:
        call.run()
        for row, slot in enumerate(slots):
            if isinstance(slot, tuple) and slots.count(slot) == 1:  # of several rows any may be the last
                assert torch.equal(
                    call.arguments["paged_kv_cache"][slot[0], 0, slot[1]], call.arguments["append_key"][row]
                )


def test_what_marks_padding(device: torch.device) -> None:
    """A negative request, position or page: there is nothing, on every target; the row is skipped."""
    key = torch.ones(6, 2, 16, device=device)
    cache = torch.zeros(4, 2, 4, 2, 16, device=device)
    tensor = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    batch_indices, positions = tensor([-1, -7, 0, 1, 1, 0]), tensor([0, 99, -1, 4, -(2**31), 3])
    flashinfer.append_paged_kv_cache(
        key, key, batch_indices, positions, cache, tensor([2, 0, -1]), tensor([0, 1, 3]), None
    )
    written = cache.ne(0).any(-1).any(-1)  # [pages, 2, slots]
    assert written.nonzero().tolist() == [[2, 0, 3], [2, 1, 3]]


def test_padding_needs_no_row_of_a_table(device: torch.device) -> None:
    call = make_call("rope_append_paged_kv_cache", device)  # its last row is padding at position -1
    angles = rope_oracle.angles_of(torch.arange(16), rope_oracle.frequencies(HEAD_DIM))
    table = torch.cat([angles.cos(), angles.sin()], 1).float().to(device)
    q_out = call.run(cos_sin_cache=table)
    assert_close(q_out[:3], rope_oracle.rotate(call.arguments["q"][:3], angles[[4, 5, 2]]))
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"positions\[1\] is 16; expected 0 to 15, the rows of cos_sin_cache"):
            call.run(cos_sin_cache=table, pos_ids=torch.tensor([0, 16, 0, 99, 99], dtype=torch.int32))


def test_a_position_outside_of_a_table_counts_as_0(unseeing: torch.device) -> None:
    q, k = torch.randn(4, 2, 32, device=unseeing), torch.randn(4, 1, 32, device=unseeing)
    angles = rope_oracle.angles_of(torch.arange(3), rope_oracle.frequencies(32))
    whole = torch.full((9, 32), torch.nan, device=unseeing)
    whole[3:6] = torch.cat([angles.cos(), angles.sin()], 1).float()
    positions = torch.tensor([2, -1, 3, 2**40], device=unseeing)
    got = flashinfer.apply_rope_with_cos_sin_cache(positions, q, k, 32, whole[3:6])
    for x, y in zip(got, (q, k)):
        assert_close(x, rope_oracle.rotate(y, angles[[2, 0, 0, 0]]))


def test_rows_of_no_request(device: torch.device) -> None:
    """Before the first request and past the last: marked as padding, and turned by nothing."""
    indptr = torch.tensor([2, 3, 5], dtype=torch.int32, device=device)
    seq_lens = torch.tensor([9, 2], dtype=torch.int32, device=device)
    batch_indices, positions = flashinfer.get_batch_indices_positions(indptr, seq_lens, 7)
    assert batch_indices.tolist() == [-1, -1, 0, 1, 1, -1, -1] and positions.tolist() == [0, 0, 8, 0, 1, 0, 0]
    q, k = torch.randn(7, 2, 32, device=device), torch.randn(7, 1, 32, device=device)
    offsets = torch.tensor([8, 100], dtype=torch.int32, device=device)
    angles = rope_oracle.angles_of(torch.tensor([0, 0, 8, 100, 101, 0, 0]), rope_oracle.frequencies(32))
    for x, y in zip(flashinfer.apply_rope(q, k, indptr, offsets), (q, k)):
        assert_close(x, rope_oracle.rotate(y, angles))


@pytest.mark.parametrize("wide", ["offsets", "lengths"])
def test_lengths_of_64_bits_are_not_cut(wide: str) -> None:
    """2 ** 32 + 5 in int32 would be 5."""
    types = {"offsets": (torch.int64, torch.int32), "lengths": (torch.int32, torch.int64)}[wide]
    indptr, lengths = torch.tensor([0, 2], dtype=types[0]), torch.tensor([7], dtype=types[1])
    assert flashinfer.get_batch_indices_positions(indptr, lengths, 2)[1].tolist() == [5, 6]
    if wide == "lengths":
        with pytest.raises(ValueError, match=r"seq_lens\[0\] is 4294967301; expected 2"):
            flashinfer.get_batch_indices_positions(indptr, lengths * 0 + 2**32 + 5, 2)
    with pytest.raises(ValueError, match=r"request 0 has 4 pages of 1073741824; expected at most 2147483647"):
        flashinfer.get_seq_lens(torch.tensor([0, 4]), torch.tensor([1]), 2**30)


# -------------------------------------------------------------------------------------------------- who looks, and when


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With FLASHINFER_CHECK_INDICES=1."""
    monkeypatch.setenv(env.CHECK_INDICES.name, "1")
    indices._checks_devices.cache_clear()
    with fresh_memos():
        yield
    indices._checks_devices.cache_clear()


def test_the_host_looks_where_it_takes_no_waiting() -> None:
    host, other = torch.zeros(1), torch.zeros(1, device="meta")
    assert indices.may_be_visible(host, None) and indices.are_visible(host, None)
    assert not indices.may_be_visible(host, other) and not indices.are_visible(other)


def test_the_switch_makes_it_look_elsewhere(checking: None) -> None:
    other = torch.zeros(1, device="meta")
    assert indices.may_be_visible(other) and indices.are_visible(other)


def test_a_launch_on_a_gpu_does_not_ask() -> None:
    """What a prepared launch keeps says that there is nothing to look at, so that a call pays for one comparison."""
    with values_not_seen():
        for name in ("append_paged_kv_cache", "rope_append_paged_kv_cache", "get_seq_lens", *TABLES, *RAGGED):
            make_call(name, torch.device("cpu")).run()
        kept = [prepared for memo in MEMOS for prepared in memo.values()]
        assert len(kept) == 9
        assert not any(
            getattr(prepared, "check", None) or getattr(prepared, "reads_values", False) for prepared in kept
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name, function", EACH)
def test_the_switch_names_a_wrong_index_on_a_gpu(checking: None, name: str, function: str) -> None:
    call = make_call(function, torch.device("cuda"))
    spoil(call.arguments, WRONG[name])
    before = call.bits()
    with pytest.raises((IndexError, ValueError), match=WRONG[name].message):
        call.run()
    assert all(torch.equal(x, y) for x, y in zip(call.bits(), before))


@pytest.mark.gpu
def test_the_switch_leaves_captures_alone(checking: None) -> None:
    call = make_call("append_paged_kv_cache", torch.device("cuda"))
    call.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    expected = call.arguments["paged_kv_cache"].clone()
    call.arguments["paged_kv_cache"].zero_()
    graph.replay()
    assert torch.equal(call.arguments["paged_kv_cache"], expected)


def test_error_names_the_entry_that_is_wrong() -> None:
    """Of a bound, too, that the dtype of the tensor does not hold."""
    values = torch.tensor([4, 0, -1], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"pages\[2\] is -1; expected 0 to 2147483647, a page number"):
        indices.require_within("op", "pages", values, 0, 1 << 31, "a page number")
