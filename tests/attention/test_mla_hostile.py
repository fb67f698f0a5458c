# SPDX-License-Identifier: Apache-2.0
"""Latent attention under hostile calls: plans that fail half-way, index values that lie, tensors without memory. The
right result, or an error that says which argument is off, and never another state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.host import indices as host_indices
from tests.attention.mla_kit import Batch, Case, check, expect, make_batch, make_wrapper, plan, run
from tests.attention.test_hostile import I32_MAX, I32_MIN, LYING_OFFSETS, Guarded

CASE = Case("hostile", (2, 3, 1), (5, 9, 4), num_heads=4, page_size=4)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make(device: torch.device, graph: bool = False) -> Any:
    sizes = {"qo_indptr": 4, "kv_indptr": 4, "kv_indices": 32, "kv_len_arr": 3}
    buffers = {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in sizes.items()}
    return make_wrapper(device, use_cuda_graph=True, **buffers) if graph else make_wrapper(device)


def with_indices(batch: Batch, **changed: Tensor) -> Batch:
    names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")
    return replace(batch, indices=tuple(changed.get(name, x) for name, x in zip(names, batch.indices)))


# ------------------------------------------------------------------------------------ a call that fails changes nothing

FAILING_PLANS: dict[str, tuple[dict[str, Callable[[Tensor], Any]], dict[str, Any], type[Exception]]] = {
    "later argument": ({}, {"sinks": torch.zeros(4)}, ValueError),
    "unknown argument": ({}, {"windowleft": 3}, TypeError),
    "queries descend": ({"qo_indptr": lambda x: x.flip(0)}, {}, ValueError),
    "pages descend": ({"kv_indptr": lambda x: x.flip(0)}, {}, ValueError),
    "offsets below 0": ({"qo_indptr": lambda x: x - 1}, {}, ValueError),
    "float lengths": ({"kv_len_arr": lambda x: x.float()}, {}, ValueError),
    "lengths too few": ({"kv_len_arr": lambda x: x[:-1]}, {}, ValueError),
    "lengths of two dimensions": ({"kv_len_arr": lambda x: x[None]}, {}, ValueError),
    "no tensor": ({"kv_len_arr": lambda x: x.tolist()}, {}, TypeError),
    "None": ({"qo_indptr": lambda x: None}, {}, TypeError),
    "scale": ({}, {"sm_scale": float("nan")}, ValueError),
    "scale that is none": ({}, {"sm_scale": None}, TypeError),
    "scale as text": ({}, {"sm_scale": "1"}, TypeError),
    "scale without a hash": ({}, {"sm_scale": [1.0]}, TypeError),
    "causal": ({}, {"causal": "yes"}, TypeError),
    "dtype": ({}, {"q_data_type": "int8"}, ValueError),
    "dtype of the cache": ({}, {"kv_data_type": torch.float16}, ValueError),
    "head_dim": ({}, {"head_dim_ckv": 511}, ValueError),
    "head_dim as text": ({}, {"head_dim_kpe": "64"}, TypeError),
    "heads": ({}, {"num_heads": 0}, ValueError),
    "page_size": ({}, {"page_size": 1 << 31}, ValueError),
    "profiler": ({}, {"use_profiler": True}, ValueError),
}


@pytest.mark.parametrize("name", FAILING_PLANS)
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_a_failing_plan_leaves_the_old_one(name: str, graph: bool, device: torch.device) -> None:
    changes, options, error = FAILING_PLANS[name]
    batch, other = make_batch(CASE, device), make_batch(CASE, device, seed=1)  # other page numbers
    wrapper = make(device, graph)

    def fail(batch: Batch) -> None:
        given = dict(zip(("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"), batch.indices))
        changed = {name: change(given[name]) for name, change in changes.items()}
        with pytest.raises(error):
            plan(wrapper, with_indices(batch, **changed), **options)

    fail(batch)  # the first plan of a wrapper: it has none afterwards
    with pytest.raises(ValueError, match="before plan"):
        run(wrapper, batch)
    plan(wrapper, batch)
    check(run(wrapper, batch), expect(batch))
    fail(other)
    check(run(wrapper, batch), expect(batch))


# ------------------------------------------------------------------------------------------------ lengths that disagree


def _lies(batch: Batch) -> dict[str, tuple[Batch, str]]:
    _, indptr, pages, lengths = batch.indices
    return {
        "lengths past the pages": (
            with_indices(batch, kv_len_arr=lengths + 4),
            r"kv_len_arr\[0\] is 9; expected 0 to 8",
        ),
        "negative length": (with_indices(batch, kv_len_arr=-lengths), r"kv_len_arr\[0\] is -5"),
        "offsets past the page numbers": (with_indices(batch, kv_indptr=indptr + int32(0, 0, 0, 9)), "ends at"),
        "negative page": (with_indices(batch, kv_indices=pages - 100), r"kv_indices\S* is -\d+; expected"),
        "pages that wrap around": (with_indices(batch, kv_indptr=indptr.long() * (1 << 30)), "expected below|ends at"),
        "fewer lengths": (with_indices(batch, kv_len_arr=lengths[:2]), "kv_len_arr|qo_indptr"),
    }


@pytest.mark.parametrize("name", _lies(make_batch(CASE, torch.device("cpu"))))
@pytest.mark.parametrize("as_int64", [False, True], ids=["int32", "int64"])
def test_index_tensors_that_contradict_each_other(name: str, as_int64: bool, device: torch.device) -> None:
    """On the host, whatever the device of the wrapper."""
    batch, wrapper = make_batch(CASE, device), make(device)
    lying, message = _lies(batch)[name]
    if as_int64:
        lying = replace(lying, indices=tuple(tensor.long() for tensor in lying.indices))
    with pytest.raises((ValueError, IndexError), match=message):
        plan(wrapper, lying)
    plan(wrapper, batch)
    check(run(wrapper, batch), expect(batch))


def test_what_lies_behind_a_length_is_of_no_matter(device: torch.device) -> None:
    """Page numbers behind the last token, of requests and of the list, and all of a request of length 0."""
    case = replace(CASE, kv_lens=(5, 0, 4), spare_pages=3)
    batch, wrapper = make_batch(case, device), make(device)
    batch.indices[2][batch.indices[2] < 0] = -(1 << 20)
    plan(wrapper, batch)
    check(run(wrapper, batch), expect(batch))


def test_tensors_that_end_before_the_plan_does(device: torch.device) -> None:
    batch, wrapper = make_batch(CASE, device), make(device)
    plan(wrapper, batch)
    (q_nope, q_pe), (ckv, kpe) = batch.q, batch.caches
    with pytest.raises(IndexError, match="q has 5 tokens; the planned qo_indptr ends at 6"):
        wrapper.run(q_nope[:-1], q_pe[:-1], ckv, kpe)
    highest = int(batch.indices[2][: int(batch.indices[1][-1])].max())
    with pytest.raises(IndexError, match=f"the cache has {highest} pages; the planned page numbers go up to {highest}"):
        wrapper.run(q_nope, q_pe, ckv[:highest], kpe[:highest])
    check(run(wrapper, batch), expect(batch))


# ------------------------------------------------------------------------------------ what was given stays the caller's


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_host_index_tensors_may_be_overwritten_after_plan(graph: bool, device: torch.device) -> None:
    batch, wrapper = make_batch(CASE, device), make(device, graph)
    if device.type == "cuda":  # something for the copies to wait behind
        torch.cuda._sleep(20_000_000)
    given = replace(batch, indices=tuple(tensor.clone() for tensor in batch.indices))
    plan(wrapper, given)
    for tensor in given.indices:
        tensor.fill_(1 << 28)
    check(run(wrapper, batch), expect(batch))


def test_copies_are_refused() -> None:
    batch, wrapper = make_batch(CASE, torch.device("cpu")), make(torch.device("cpu"))
    plan(wrapper, batch)
    decode = flashinfer.decode.BatchDecodeMlaWithPagedKVCacheWrapper(torch.empty(8, dtype=torch.uint8))
    for each in (wrapper, decode):
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                duplicate(each)
    check(run(wrapper, batch), expect(batch))


def test_another_default_device(device: torch.device) -> None:
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        wrapper = make_wrapper(device)
        with torch.device("cpu"):
            batch = make_batch(CASE, device)
        plan(wrapper, batch)
        out, lse = wrapper.run(*batch.q, *batch.caches, return_lse=True)
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)
    check((out, lse), expect(batch))


# ----------------------------------------------------------------------------------------------- tensors without memory

OPERANDS = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "out", "lse")


def _given(batch: Batch) -> dict[str, Tensor]:
    q_nope = batch.q[0]
    outputs = torch.empty_like(q_nope), torch.empty(q_nope.shape[:2], device=q_nope.device)
    return dict(zip(OPERANDS, (*batch.q, *batch.caches, *outputs)))


@pytest.mark.parametrize("which", [*OPERANDS, "indices"])
def test_tensors_without_memory_are_refused(which: str, device: torch.device) -> None:
    """On meta, fake, or of a storage that was given back; also after a call of the same signature with real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def give_back(tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        copied.untyped_storage().resize_(0)
        return copied

    batch, wrapper = make_batch(CASE, device), make(device)
    plan(wrapper, batch)
    given = _given(batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for pretend in (lambda tensor: tensor.to("meta"), mode.from_tensor, give_back):
        with pytest.raises((ValueError, RuntimeError)):
            if which == "indices":
                plan(wrapper, replace(batch, indices=tuple(map(pretend, batch.indices))))
            else:
                wrapper.run(**{**given, which: pretend(given[which])}, return_lse=True)
        wrapper.run(**given, return_lse=True)
        check((given["out"], given["lse"]), expect(batch))


@pytest.mark.parametrize("value", [None, 3, "q", [1.0], object()], ids=["None", "int", "str", "list", "object"])
@pytest.mark.parametrize("which", OPERANDS[:4])
def test_arguments_that_are_no_tensors(which: str, value: Any) -> None:
    batch, wrapper = make_batch(CASE, torch.device("cpu")), make(torch.device("cpu"))
    plan(wrapper, batch)
    with pytest.raises(TypeError, match=rf"batch_mla_paged: {which} is {type(value).__name__}; expected a tensor"):
        wrapper.run(**{**_given(batch), which: value}, return_lse=True)
    check(run(wrapper, batch), expect(batch))


def test_a_failing_run_changes_nothing(device: torch.device) -> None:
    batch, wrapper = make_batch(CASE, device), make(device)
    plan(wrapper, batch)
    given = _given(batch)
    for options, error in (
        ({"out": torch.empty(1)}, ValueError),
        ({"out": given["out"][:1].expand_as(given["out"])}, ValueError),
        ({"out": given["out"].float()}, ValueError),
        ({"lse": torch.empty(1, device=device)}, ValueError),
        ({"lse": given["lse"].T.contiguous().T}, ValueError),
        ({"ckv_scale": -1.0}, ValueError),
        ({"ckv_scale": "1"}, TypeError),
        ({"ckv_scale": torch.ones(1)}, ValueError),
        ({"ckv_scale": 0.5, "kpe_scale": torch.ones(2)}, ValueError),
        ({"ckv_scale": [0.5]}, TypeError),
        ({"nothing": 1}, TypeError),
    ):
        with pytest.raises(error):
            wrapper.run(**{**given, **options}, return_lse=True)
    check(run(wrapper, batch), expect(batch))


# ------------------------------------------------------------------------------------- what a GPU writes without checks


@pytest.mark.gpu
@pytest.mark.parametrize("lie", LYING_OFFSETS)
def test_offsets_of_queries_that_lie_write_nothing_elsewhere(lie: str) -> None:
    device = torch.device("cuda", 0)
    batch, wrapper = make_batch(CASE, device), make(device)
    on_device = replace(batch, indices=tuple(x.to(device) for x in batch.indices))
    out, lse = Guarded(*batch.q[0].shape, dtype=batch.q[0].dtype), Guarded(*batch.q[0].shape[:2], dtype=torch.float32)
    workspaces = [Guarded(size << 20, dtype=torch.uint8) for size in (4, 8)]
    wrapper.reset_workspace_buffer(*[guarded.tensor for guarded in workspaces])
    plan(wrapper, with_indices(on_device, qo_indptr=int32(*LYING_OFFSETS[lie]).to(device)))
    wrapper.run(*batch.q, *batch.caches, out=out.tensor, lse=lse.tensor)
    torch.cuda.synchronize()
    for each in (*workspaces, out, lse):
        each.check()
    plan(wrapper, on_device)
    check(run(wrapper, batch), expect(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [None, I32_MAX, I32_MIN, -100000])
@pytest.mark.parametrize("lie", LYING_OFFSETS)
def test_offsets_of_keys_that_lie_make_the_planner_write_nothing_elsewhere(lie: str, length: int | None) -> None:
    """The plan alone: a run would read whatever the offsets point to."""
    device = torch.device("cuda", 0)
    batch, wrapper = make_batch(CASE, device), make(device)
    on_device = replace(batch, indices=tuple(x.to(device) for x in batch.indices))
    workspaces = [Guarded(size << 20, dtype=torch.uint8) for size in (4, 8)]
    wrapper.reset_workspace_buffer(*[guarded.tensor for guarded in workspaces])
    lying = {"kv_indptr": int32(*LYING_OFFSETS[lie]).to(device)}
    if length is not None:
        lying["kv_len_arr"] = torch.full_like(on_device.indices[3], length)
    plan(wrapper, with_indices(on_device, **lying))
    torch.cuda.synchronize()
    for each in workspaces:
        each.check()
    plan(wrapper, on_device)
    check(run(wrapper, batch), expect(batch))


@pytest.mark.gpu
def test_a_length_beyond_its_pages_is_cut_to_them() -> None:
    """Unseen on the device: the run sees what the pages hold, which is finite here, and no more."""
    device = torch.device("cuda", 0)
    batch, wrapper = make_batch(replace(CASE, kv_lens=(8, 12, 4)), device), make(device)
    lying = tuple(x.to(device) for x in (*batch.indices[:3], batch.indices[3] + 1000))
    plan(wrapper, replace(batch, indices=lying), causal=False)
    check(run(wrapper, batch), expect(replace(batch, case=replace(batch.case, causal=False))))


@pytest.mark.gpu
def test_indices_on_a_gpu_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CHECK_INDICES", "1")
    host_indices._checks_devices.cache_clear()
    try:
        device = torch.device("cuda", 0)
        batch, wrapper = make_batch(CASE, device), make(device)
        lying, message = next(iter(_lies(batch).values()))
        with pytest.raises((ValueError, IndexError), match=message):
            plan(wrapper, replace(lying, indices=tuple(x.to(device) for x in lying.indices)))
        plan(wrapper, replace(batch, indices=tuple(x.to(device) for x in batch.indices)))
        check(run(wrapper, batch), expect(batch))
    finally:
        monkeypatch.undo()
        host_indices._checks_devices.cache_clear()
