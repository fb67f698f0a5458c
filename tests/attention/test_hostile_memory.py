# SPDX-License-Identifier: Apache-2.0
"""Attention over tensors that have no memory: on meta, fake, or of a storage that was given back."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import flashinfer
from tests.attention.hostile_kit import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_LENS,
    PAGE_SIZE,
    QO_LENS,
    Batch,
    Tensor,
    int32,
)

# ----------------------------------------------------------------------------------------------- tensors without memory


@pytest.mark.parametrize("which", ["q", "k", "v", "out", "index"])
def test_meta_and_fake_tensors_are_refused(which: str, kind: str, device: torch.device) -> None:
    """Also after a call of the same signature with real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = Batch(kind, device)
    batch.plan()
    batch.check()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pair = [*batch.kv] if kind == "ragged" else [*batch.kv.unbind(1)]
    given = {"q": batch.q, "k": pair[0], "v": pair[1], "out": torch.empty_like(batch.q)}
    _run(batch, given)
    for pretend in (lambda tensor: tensor.to("meta"), mode.from_tensor):
        if which == "index":
            with pytest.raises((ValueError, RuntimeError)):
                batch.plan(*[pretend(tensor) for tensor in batch.index])
        else:
            with pytest.raises((ValueError, RuntimeError)):
                _run(batch, {**given, which: pretend(given[which])})
        batch.check()


def _run(batch: Batch, given: dict[str, Tensor]) -> Tensor:
    kv = (given["k"], given["v"])
    out: Tensor = batch.wrapper.run(given["q"], *(kv if batch.kind == "ragged" else (kv,)), out=given["out"])
    return out


@pytest.mark.parametrize("value", [None, 3, "q", [1.0], object()], ids=["None", "int", "str", "list", "object"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_arguments_that_are_no_tensors(which: str, value: Any, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    batch.plan()
    pair = [*batch.kv] if kind == "ragged" else [*batch.kv.unbind(1)]
    given = {"q": batch.q, "k": pair[0], "v": pair[1], "out": None, which: value}
    with pytest.raises(TypeError, match=f"{which} is {type(value).__name__}; expected a tensor"):
        _run(batch, given)
    if kind != "ragged":
        for cache in (value, (), (pair[0],), (*pair, pair[0])):
            with pytest.raises((TypeError, ValueError), match="expected"):
                batch.wrapper.run(batch.q, cache)
    batch.check()


def _give_back(tensor: Tensor, at_offset: bool) -> Tensor:
    """Shaped like it, of a storage that was given back; from its start, or from an offset that its address then is."""
    memory = torch.zeros(64 * at_offset + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    view = memory[64 * at_offset :].view(tensor.shape)
    memory.untyped_storage().resize_(0)
    return view


WHERE = pytest.mark.parametrize("at_offset", [False, True], ids=["start", "offset"])
NO_MEMORY = pytest.raises(flashinfer.errors.UnsupportedConfig, match="without memory")


@WHERE
@pytest.mark.parametrize("which", ["q", "k", "v", "cache", "out", "lse"])
def test_runs_of_tensors_without_storage(which: str, at_offset: bool, kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan()
    pair = [*batch.kv] if kind == "ragged" else [half.contiguous() for half in batch.kv.unbind(1)]
    given = {"q": batch.q, "k": pair[0], "v": pair[1]}
    given |= {"out": torch.empty_like(batch.q), "lse": torch.empty(batch.q.shape[:2], device=device)}
    for is_warm in (False, True):
        gone = given if which == "cache" else {**given, which: _give_back(given[which], at_offset)}
        kv: Any = (gone["k"], gone["v"]) if kind == "ragged" else ((gone["k"], gone["v"]),)
        if which == "cache":
            if kind == "ragged":
                return  # there is none
            kv = (_give_back(batch.kv, at_offset),)
        with NO_MEMORY:
            batch.wrapper.run(gone["q"], *kv, out=gone["out"], lse=gone["lse"], return_lse=True)
        if not is_warm:
            good = batch.kv if kind == "ragged" else (batch.kv,) if which == "cache" else (tuple(pair),)
            batch.wrapper.run(batch.q, *good, out=given["out"], lse=given["lse"], return_lse=True)
    batch.check()


@WHERE
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("on_host", [False, True], ids=["on device", "on host"])
def test_plans_of_tensors_without_storage(
    on_host: bool, graph: bool, at_offset: bool, kind: str, device: torch.device
) -> None:
    batch = Batch(kind, device, graph=graph)
    batch.plan()
    index = batch.index if on_host else [tensor.to(device) for tensor in batch.index]
    for i, tensor in enumerate(index):
        with NO_MEMORY:
            batch.plan(*index[:i], _give_back(tensor, at_offset), *index[i + 1 :])
        batch.check()
    if kind != "decode":
        num_bits = sum(q * kv for q, kv in zip(QO_LENS, KV_LENS))
        mask, packed = torch.ones(num_bits, dtype=torch.bool), torch.zeros(num_bits, dtype=torch.uint8)
        for given in ({"custom_mask": mask}, {"packed_custom_mask": packed}):
            ((name, tensor),) = given.items()
            with NO_MEMORY:
                batch.plan(*index, **{name: _give_back(tensor.to("cpu" if on_host else device), at_offset)})
            batch.check()


@pytest.mark.parametrize("buffer", range(6))
def test_buffers_for_graphs_without_storage(buffer: int, kind: str, device: torch.device) -> None:
    batch = Batch(kind, device, graph=True)
    mask = {} if kind == "decode" else {"custom_mask": torch.ones(6 * 9 * 3, dtype=torch.bool)}
    names = [name for name in batch.wrapper._buffers if mask or "mask" not in name]
    if buffer >= len(names):
        return
    batch.plan(**mask)
    batch.wrapper._buffers[names[buffer]].untyped_storage().resize_(0)
    with NO_MEMORY:
        batch.plan(**mask)


@WHERE
@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("op", ["single_decode", "single_prefill"])
def test_single_calls_of_tensors_without_storage(op: str, which: str, at_offset: bool, device: torch.device) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    q_shape = (HEADS, HEAD_DIM) if op == "single_decode" else (3, HEADS, HEAD_DIM)
    given = {"q": torch.zeros(q_shape, dtype=dtype, device=device)}
    given |= {name: torch.zeros(9, KV_HEADS, HEAD_DIM, dtype=dtype, device=device) for name in "kv"}
    call = getattr(flashinfer, f"{op}_with_kv_cache")
    gone = {**given, which: _give_back(given[which], at_offset)}
    for _ in range(2):
        with NO_MEMORY:
            call(**gone)
        call(**given)  # from here on, the signature is known
    if op == "single_prefill":
        for name, dtype in (("custom_mask", torch.bool), ("packed_custom_mask", torch.uint8)):
            with NO_MEMORY:
                call(**given, **{name: _give_back(torch.zeros(27, dtype=dtype, device=device), at_offset)})


@WHERE
@pytest.mark.parametrize(
    "call", ["merge_state", "merge_state_in_place", "merge_states", "variable_length_merge_states"]
)
def test_merges_of_tensors_without_storage(call: str, at_offset: bool, device: torch.device) -> None:
    v, s = torch.zeros(3, 2, HEADS, HEAD_DIM, device=device), torch.zeros(3, 2, HEADS, device=device)
    given: list[Tensor] = [v[:, 0].contiguous(), s[:, 0].contiguous()] * 2
    if call == "merge_state_in_place":
        given.append(torch.ones(3, dtype=torch.bool, device=device))
    elif call == "merge_states":
        given = [v, s]
    elif call == "variable_length_merge_states":
        given = [v[:, 0].contiguous(), s[:, 0].contiguous(), int32(0, 1, 3).to(device)]
    merge = getattr(importlib.import_module("flashinfer.cascade"), call)
    for _ in range(2):
        for i, tensor in enumerate(given):
            with NO_MEMORY:
                merge(*given[:i], _give_back(tensor, at_offset), *given[i + 1 :])
        merge(*[tensor.clone() for tensor in given])  # from here on, the signature is known


@WHERE
def test_cascades_of_tensors_without_storage(at_offset: bool) -> None:
    cascade = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0, dtype=torch.uint8))
    index = [[int32(0, 3), int32(0, 1, 2, 3)], [int32(0, 1), int32(0, 1, 2, 3)], [int32(0), int32(1, 2, 3)]]
    index.append([int32(4), int32(1, 2, 3)])
    for given in index:
        for level, tensor in enumerate(given):
            given[level] = _give_back(tensor, at_offset)
            with NO_MEMORY:
                cascade.plan(*index, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, q_data_type=torch.float32)
            given[level] = tensor
    cascade.plan(*index, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, q_data_type=torch.float32)


def test_empty_tensors_need_no_storage(kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan(*[int32(*[0] * ("indptr" in name)) for name in batch.wrapper._index_names])
    kv = [half[:0] for half in batch.kv] if kind == "ragged" else [batch.kv[:0]]
    out = batch.wrapper.run(_give_back(batch.q[:0], False), *[_give_back(half, False) for half in kv])
    assert out.shape == batch.q[:0].shape
