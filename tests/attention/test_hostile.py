# SPDX-License-Identifier: Apache-2.0
"""Planned attention under hostile calls: plans that fail half-way, index values that lie, tensors that change after the
call. The right result, or an error that says which argument is off, and never another state."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer.attention.plan import BoundLaunch, Plan
from tests.attention.hostile_kit import (
    HEAD_DIM,
    HEADS,
    KV_LENS,
    QO_LENS,
    Batch,
    Tensor,
    int32,
)
from tests.tolerances import assert_close

# ------------------------------------------------------------------------------------ a call that fails changes nothing

# What makes a plan fail, after which steps: (index tensors of the batch -> others, options, error).
FAILING_PLANS: dict[str, tuple[Callable[[Batch], list[Any]], dict[str, Any], type[Exception]]] = {
    "later argument": (lambda batch: batch.index, {"sinks": torch.zeros(4)}, ValueError),
    "unknown argument": (lambda batch: batch.index, {"windowleft": 3}, TypeError),
    "offsets descend": (lambda batch: [batch.index[0].flip(0), *batch.index[1:]], {}, ValueError),
    "offsets begin below 0": (lambda batch: [batch.index[0] - 1, *batch.index[1:]], {}, ValueError),
    "float offsets": (lambda batch: [batch.index[0].float(), *batch.index[1:]], {}, ValueError),
    "last tensor too short": (lambda batch: [*batch.index[:-1], batch.index[-1][:-1]], {}, ValueError),
    "last tensor of two dimensions": (lambda batch: [*batch.index[:-1], batch.index[-1][None]], {}, ValueError),
    "no tensor": (lambda batch: [*batch.index[:-1], batch.index[-1].tolist()], {}, TypeError),
    "None": (lambda batch: [None, *batch.index[1:]], {}, TypeError),
    "negative window text": (lambda batch: batch.index, {"window_left": "3"}, TypeError),
    "soft cap": (lambda batch: batch.index, {"logits_soft_cap": -1.0}, ValueError),
    "position encoding": (lambda batch: batch.index, {"pos_encoding_mode": "ROPE"}, ValueError),
    "dtype": (lambda batch: batch.index, {"q_data_type": "int8"}, ValueError),
}


@pytest.mark.parametrize("name", FAILING_PLANS)
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_a_failing_plan_leaves_the_old_one(name: str, graph: bool, kind: str, device: torch.device) -> None:
    change, options, error = FAILING_PLANS[name]
    batch = Batch(kind, device, graph=graph)
    with pytest.raises(error):  # the first plan of a wrapper: it has none afterwards
        batch.plan(*change(batch), **options)
    with pytest.raises(ValueError, match="before plan"):
        batch.run()
    batch.plan()
    batch.check()
    other = Batch(kind, device, seed=1)  # other page numbers
    other.wrapper, other.kv, other.q = batch.wrapper, batch.kv, batch.q
    with pytest.raises(error):
        other.plan(*change(other), **options)
    batch.check()


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_a_plan_with_a_bad_mask_leaves_the_old_one(kind: str, graph: bool, device: torch.device) -> None:
    batch = Batch(kind, device, graph=graph)
    batch.plan()
    other = Batch(kind, device, seed=1)
    other.wrapper, other.kv, other.q = batch.wrapper, batch.kv, batch.q
    num_bits = sum(q * kv for q, kv in zip(QO_LENS, KV_LENS))
    for short in (0, 1, num_bits // 2, num_bits - 1):
        with pytest.raises(ValueError, match="mask"):
            other.plan(custom_mask=torch.ones(short, dtype=torch.bool))
    num_bytes = sum(-(-q * kv // 8) for q, kv in zip(QO_LENS, KV_LENS))
    for packed in (torch.zeros(num_bytes - 1, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.int32)):
        with pytest.raises(ValueError, match="mask"):
            other.plan(packed_custom_mask=packed)
    batch.check()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_a_plan_interrupted_behind_its_planner(
    interruption: type[BaseException], kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the device then is the schedule of other lengths: the next run has that of the last plan written."""
    batch, planned = Batch(kind, device), []

    def planner(plan: Plan, extent: object) -> BoundLaunch:
        launch = bound(plan, extent)

        def interrupted(*addresses: int) -> None:
            launch(*addresses)
            planned.append(addresses)
            if len(planned) == 2:
                raise interruption

        return interrupted

    bound = Plan.planner
    monkeypatch.setattr(Plan, "planner", planner)
    batch.plan()
    batch.check()
    offsets_of_keys = 0 if kind == "decode" else 1
    others = [*batch.index]
    others[offsets_of_keys] = torch.cat([torch.zeros(3).int(), batch.index[offsets_of_keys][-1:]])
    with pytest.raises(interruption):
        batch.plan(*others)
    batch.check()
    batch.check()
    assert planned[0] == planned[2] != planned[1] and len(planned) == 3


def test_a_failing_run_changes_nothing(kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan()
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    for options, error in (
        ({"out": torch.empty(1)}, ValueError),
        ({"out": torch.empty_like(batch.q[:1]).expand_as(batch.q)}, ValueError),
        ({"lse": torch.empty(1, device=device), "return_lse": True}, ValueError),
        ({"k_scale": -1.0}, ValueError),
        ({"k_scale": "1"}, TypeError),
        ({"v_scale": math.nan}, ValueError),
        ({"v_scale": torch.ones(2, device=device)}, ValueError),
        ({"v_scale": torch.ones(1, device="meta")}, ValueError),
        ({"v_scale": torch.ones(1, dtype=torch.float64, device=device)}, ValueError),
        ({"sinks": torch.ones(HEADS + 1)}, ValueError),
        ({"nothing": 1}, TypeError),
    ):
        with pytest.raises(error):
            batch.wrapper.run(batch.q, *kv, **options)
    batch.check()


# ------------------------------------------------------------------------------------------------ lengths that disagree


def _lies(batch: Batch) -> dict[str, tuple[list[Tensor], str]]:
    """Index tensors that contradict each other, and what the error says."""
    lies: dict[str, tuple[list[Tensor], str]] = {}
    if batch.kind != "ragged":
        *qo, indptr, pages, last = batch.index
        lies |= {
            "offsets past the page numbers": ([*qo, indptr + int32(0, 0, 0, 9), pages, last], "ends at"),
            "last_page_len above the page size": ([*qo, indptr, pages, last + 4], "expected 1 to 4, the page size"),
            "last_page_len zero": ([*qo, indptr, pages, last * 0], "expected 1 to 4, the page size"),
            "last_page_len negative": ([*qo, indptr, pages, -last], "expected 1 to 4, the page size"),
            "negative page": ([*qo, indptr, pages - 8, last], r"is -\d+; expected"),
            "pages that wrap around": ([*qo, indptr.long() * (1 << 30), pages, last], "expected below|ends at"),
        }
    if batch.kind != "decode":
        lies["descending queries"] = ([batch.index[0].flip(0), *batch.index[1:]], "never descend")
    return lies


@pytest.mark.parametrize("name", _lies(Batch("paged", torch.device("cpu"))))
@pytest.mark.parametrize("as_int64", [False, True], ids=["int32", "int64"])
def test_index_tensors_that_contradict_each_other(name: str, as_int64: bool, kind: str, device: torch.device) -> None:
    """On the host, whatever the device of the wrapper."""
    batch = Batch(kind, device)
    if name not in _lies(batch):
        return  # these index tensors do not exist here
    index, message = _lies(batch)[name]
    with pytest.raises((ValueError, IndexError), match=message):
        batch.plan(*[tensor.long() if as_int64 else tensor for tensor in index])
    batch.plan()
    batch.check()


def test_what_padding_requests_hold_is_of_no_matter(device: torch.device) -> None:
    """Requests without pages have any last_page_len, entries of `indices` that nobody names are any number."""
    for kind in ("decode", "paged"):
        batch = Batch(kind, device)
        *qo, indptr, pages, last = batch.index
        expected = batch.expected()
        batch.q = torch.cat([batch.q, batch.q[:2] if kind == "decode" else batch.q[:0]])
        qo = [torch.cat([qo[0], qo[0][-1:].repeat(2)])] if qo else []
        index = [torch.cat([indptr, indptr[-1:].repeat(2)]), torch.cat([pages, int32(-7, 1 << 30)])]
        batch.plan(*qo, *index, torch.cat([last, int32(-3, 99)]))
        out = batch.run()
        assert_close(out[: len(expected)], expected)
        assert (out[len(expected) :] == 0).all()


def test_tensors_that_end_before_the_plan_does(kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan()
    short = {
        "paged": lambda: batch.wrapper.run(batch.q[:-1], batch.kv),
        "ragged": lambda: batch.wrapper.run(batch.q[:-1], *batch.kv),
    }
    if kind in short:
        with pytest.raises(IndexError, match="q has 5 tokens; the planned qo_indptr ends at 6"):
            short[kind]()
    if kind == "ragged":
        with pytest.raises(IndexError, match="k has 17 rows; the planned kv_indptr ends at 18"):
            batch.wrapper.run(batch.q, batch.kv[0][:-1], batch.kv[1][:-1])
    else:
        last = int(batch.pages.max())
        with pytest.raises(IndexError, match=f"the cache has {last} pages; the planned page numbers go up to {last}"):
            batch.wrapper.run(batch.q, batch.kv[:last])
    batch.check()


# ------------------------------------------------------------------------------------ what was given stays the caller's


@pytest.mark.parametrize("pinned", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["pageable", "pinned"])
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_host_index_tensors_may_be_overwritten_after_plan(
    pinned: bool, graph: bool, kind: str, device: torch.device
) -> None:
    batch = Batch(kind, device, graph=graph)
    if device.type == "cuda":  # something for the copies to wait behind
        torch.cuda._sleep(20_000_000)
    index = [tensor.pin_memory() if pinned else tensor.clone() for tensor in batch.index]
    batch.plan(*index)
    for tensor in index:
        tensor.fill_(1 << 28)
    batch.check()


@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_a_host_mask_may_be_overwritten_after_plan(kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    causal = [torch.ones(q, kv).tril(kv - q).bool().flatten() for q, kv in zip(QO_LENS, KV_LENS)]
    packed = torch.cat([flashinfer.packbits(mask, bitorder="little") for mask in causal])
    for name, mask in (("custom_mask", torch.cat(causal)), ("packed_custom_mask", packed)):
        batch.plan(causal=False, **{name: mask})
        mask.zero_()
        batch.check()


# --------------------------------------------------------------------------------------------------------------- copies


def test_copies_are_refused(kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    batch.plan()
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            duplicate(batch.wrapper)
    batch.check()


# -------------------------------------------------------------------------------------------------------- torch.compile


def test_a_compiled_run_before_plan_raises_as_an_eager_one(kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    compiled = torch.compile(lambda q, *kv: batch.wrapper.run(q, *kv), fullgraph=True, backend="eager")
    for call in (batch.wrapper.run, compiled):
        with pytest.raises(ValueError, match=r"run\(\) before plan\(\)"):
            call(batch.q, *kv)
    batch.plan()
    assert torch.equal(compiled(batch.q, *kv), batch.run())


# ---------------------------------------------------------------------------------------------------- checks on request


@pytest.mark.gpu
def test_indices_on_a_gpu_are_checked_on_request(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer.host import indices

    monkeypatch.setenv("FLASHINFER_CHECK_INDICES", "1")
    indices._checks_devices.cache_clear()
    try:
        batch = Batch(kind, torch.device("cuda", 0))
        index, message = next(iter(_lies(batch).values()))
        with pytest.raises((ValueError, IndexError), match=message):
            batch.plan(*[tensor.cuda() for tensor in index])
        batch.plan(*[tensor.cuda() for tensor in batch.index])
        batch.check()
    finally:
        monkeypatch.undo()
        indices._checks_devices.cache_clear()


# ------------------------------------------------------------------------------------- what a GPU writes without checks

I32_MAX, I32_MIN = (1 << 31) - 1, -(1 << 31)
# Offsets of three requests that lie, unseen on the device.
LYING_OFFSETS = {
    "past the end": (0, 2, 5, 600),
    "far past the end": (0, 2, 5, I32_MAX),
    "all of them huge": (I32_MAX, I32_MAX, I32_MAX, I32_MAX),
    "below zero": (-9, 2, 5, 6),
    "far below zero": (I32_MIN, 2, 5, 6),
    "descending": (0, 6, 2, 4),
    "wrapping": (I32_MAX, I32_MIN, I32_MAX, I32_MIN),
    "sum beyond int32": (0, I32_MAX, I32_MIN, I32_MAX),
}
GUARD = 4096  # elements before and after a tensor


class Guarded:
    """A tensor within a larger one, the rest of which must stay as it is."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self.memory = torch.full((math.prod(shape) + 2 * GUARD,), 77, dtype=dtype, device="cuda")
        self.tensor = self.memory[GUARD:-GUARD].view(shape)

    def check(self) -> None:
        assert bool((self.memory[:GUARD] == 77).all()), "written before the tensor"
        assert bool((self.memory[-GUARD:] == 77).all()), "written behind the tensor"


def _guard_workspaces(batch: Batch) -> tuple[Guarded, Guarded]:
    float_workspace, int_workspace = (Guarded(size << 20, dtype=torch.uint8) for size in (4, 8))
    batch.wrapper.reset_workspace_buffer(float_workspace.tensor, int_workspace.tensor)
    return float_workspace, int_workspace


@pytest.mark.gpu
@pytest.mark.parametrize("lie", LYING_OFFSETS)
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_offsets_of_queries_that_lie_write_nothing_elsewhere(kind: str, lie: str) -> None:
    batch = Batch(kind, torch.device("cuda", 0))
    index = [tensor.cuda() for tensor in batch.index]
    num_tokens = batch.q.shape[0]
    out = Guarded(num_tokens, HEADS, HEAD_DIM, dtype=batch.dtype)
    lse = Guarded(num_tokens, HEADS, dtype=torch.float32)
    guarded = (*_guard_workspaces(batch), out, lse)
    batch.plan(int32(*LYING_OFFSETS[lie]).cuda(), *index[1:])
    batch.run(out=out.tensor, lse=lse.tensor)
    torch.cuda.synchronize()
    for each in guarded:
        each.check()
    batch.plan(*index)
    batch.check()


@pytest.mark.gpu
@pytest.mark.parametrize("last_page_len", [None, I32_MAX, I32_MIN, -100000])
@pytest.mark.parametrize("lie", LYING_OFFSETS)
def test_offsets_of_keys_that_lie_make_planners_write_nothing_elsewhere(
    kind: str, lie: str, last_page_len: Any
) -> None:
    """The plan alone: a run would read whatever the offsets point to."""
    batch = Batch(kind, torch.device("cuda", 0))
    index = [tensor.cuda() for tensor in batch.index]
    guarded = _guard_workspaces(batch)
    lying = list(index)
    lying[0 if kind == "decode" else 1] = int32(*LYING_OFFSETS[lie]).cuda()
    if last_page_len is not None and kind != "ragged":
        lying[-1] = torch.full_like(index[-1], last_page_len)
    batch.plan(*lying)
    torch.cuda.synchronize()
    for each in guarded:
        each.check()
    batch.plan(*index)
    batch.check()
