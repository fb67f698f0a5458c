# SPDX-License-Identifier: Apache-2.0
"""Attention with options, sizes and scalars out of their range, planned and not."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch

import flashinfer
from tests.attention.hostile_kit import (
    Batch,
    int32,
    single_call,
)
from tests.tolerances import assert_close

# ---------------------------------------------------------------------------------------------------- ranges of scalars

BAD_SCALARS: dict[str, tuple[Any, ...]] = {
    "window_left": ("3", 1.5, None),
    "logits_soft_cap": (-1.0, math.nan, math.inf, "30"),
    "sm_scale": (0.0, -1.0, math.nan, math.inf, "1"),
    "rope_scale": (0.0, -2.0, math.nan, math.inf, "1"),
    "rope_theta": (0, -1e4, math.nan, math.inf, "1e4"),
    "pos_encoding_mode": ("", "rope", 3, None),
}
CASES = [(name, value) for name, values in BAD_SCALARS.items() for value in values]


@pytest.mark.parametrize("name, value", CASES, ids=[f"{name}={value!r}" for name, value in CASES])
def test_options_out_of_range(name: str, value: Any, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    one_line = pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}")
    with one_line:
        batch.plan(**{name: value})
    batch.plan()
    if value is not None:
        kv = batch.kv if kind == "ragged" else (batch.kv,)
        with pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}"):
            batch.wrapper.forward(batch.q, *kv, **{name: value})
    batch.check()


@pytest.mark.parametrize("window", [1 << 31, (1 << 63) - 1, (1 << 31) - 1, 1 << 30, (1 << 30) - 1, 100])
def test_a_window_longer_than_any_kv_is_none(window: int, kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan(window_left=window)
    batch.check()
    batch.plan()
    if kind != "ragged":
        assert_close(batch.run(window_left=window), batch.expected())


@pytest.mark.parametrize("value", ["", "float17", 3, ["float16"], torch.zeros(2)], ids=repr)
@pytest.mark.parametrize("name", ["q_data_type", "kv_data_type", "o_data_type", "data_type"])
def test_dtypes_that_are_none(name: str, value: Any, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    options = {"q_data_type": torch.float32, "kv_data_type": torch.float32, name: value}
    if kind == "decode" or name != "data_type":
        with pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}"):
            batch.plan(**options)
    if kind != "decode" and name == "q_data_type":
        with pytest.raises(TypeError, match=r"^\w+: q_data_type"):
            batch.plan(q_data_type=None)
    batch.plan()
    batch.check()


def test_options_without_a_hash(kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    names = ["window_left", "sm_scale", "pos_encoding_mode", *(["disable_split_kv"] if kind != "decode" else [])]
    for name in names:
        with pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}"):
            batch.plan(**{name: [1]})
    batch.plan()
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    for name, value in (("enable_pdl", "no"), ("enable_pdl", [1]), ("v_scale", [1.0])):
        with pytest.raises((ValueError, TypeError), match=r"^\w+: "):
            batch.wrapper.run(batch.q, *kv, **{name: value})
    batch.check()


@pytest.mark.parametrize("name", ["q_scale", "k_scale", "v_scale"])
def test_scales_that_equal_the_last_one(name: str, kind: str) -> None:
    """Those of heads are refused, one number of another kind is that number."""
    batch = Batch(kind, torch.device("cpu"))
    batch.plan()
    for last in (1.0, None):
        batch.check()
        batch.run(**{name: last})
        with pytest.raises(flashinfer.errors.UnsupportedConfig, match=f"{name} is a tensor of shape"):
            batch.run(**{name: torch.ones(2)})
        with pytest.raises(TypeError, match=f"{name} is True; expected a number"):
            batch.run(**{name: True})
        for same in (1, torch.ones(()), torch.ones(1, 1), numpy.float64(1), numpy.float32(1)):
            assert torch.equal(batch.run(**{name: same}), batch.run())
    batch.check()


@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_scales_by_position_are_refused(kind: str) -> None:
    """Upstream's per-head scales of fp8, which it takes after q, k and v."""
    batch = Batch(kind, torch.device("cpu"))
    batch.plan()
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    with pytest.raises(TypeError, match=r"got 3 more.*as q_scale, k_scale and v_scale"):
        batch.wrapper.run(batch.q, *kv, *(torch.ones(2) for _ in range(3)))
    batch.check()


@pytest.mark.parametrize("longest", ["4", 1.5, -1, [4]], ids=repr)
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_a_longest_request_that_is_no_length(kind: str, longest: Any) -> None:
    batch = Batch(kind, torch.device("cpu"))
    with pytest.raises((ValueError, TypeError), match=r"^\w+: max_token_per_sequence"):
        batch.plan(max_token_per_sequence=longest)
    batch.plan(max_token_per_sequence=3)
    batch.check()


def test_buffers_for_graphs_that_hold_nothing(kind: str) -> None:
    roles = {
        "decode": ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"),
        "paged": ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf"),
        "ragged": ("qo_indptr_buf", "kv_indptr_buf"),
    }[kind]
    make = type(Batch(kind, torch.device("cpu")).wrapper)
    sound = {name: int32(0) if "indptr" in name else int32() for name in roles}
    make(torch.empty(0, dtype=torch.uint8), use_cuda_graph=True, **sound)
    for name in roles:
        if "indptr" in name:
            with pytest.raises(ValueError, match=rf"^\w+: {name} is empty; expected batch_size \+ 1 entries"):
                make(torch.empty(0, dtype=torch.uint8), use_cuda_graph=True, **{**sound, name: int32()})


SIZES = {"num_qo_heads": 0, "num_kv_heads": 1, "head_dim": 2, "page_size": 3}


@pytest.mark.parametrize("value", [0, -1, -4, 1 << 31, 1.5, "4", None], ids=repr)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_out_of_range(name: str, value: Any, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    if SIZES[name] >= len(batch.sizes):
        return
    good, bad = batch.sizes, list(batch.sizes)
    bad[SIZES[name]] = value
    batch.sizes = tuple(bad)  # type: ignore[assignment]
    with pytest.raises((ValueError, TypeError), match=rf"{name}|head_dim"):
        batch.plan()
    batch.sizes = good
    batch.plan()
    batch.check()


def test_sizes_may_be_any_integers(kind: str) -> None:
    """But for tensors, which may change while a plan is found by them."""
    batch, other = (Batch(kind, torch.device("cpu")) for _ in range(2))
    batch.sizes = tuple(map(numpy.int32, batch.sizes))  # type: ignore[assignment]
    batch.plan()
    batch.check()
    other.sizes = tuple(map(torch.tensor, other.sizes))  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"is a tensor; expected an integer, call \.item"):
        other.plan()


@pytest.mark.parametrize("q", [None, "q", (), [1.0], torch.zeros(())], ids=repr)
@pytest.mark.parametrize("is_planned", [False, True])
def test_forward_of_no_tensor(q: Any, is_planned: bool, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    if is_planned:
        batch.plan()
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    with pytest.raises((TypeError, ValueError), match=": q "):
        batch.wrapper.forward(q, *kv)


# ------------------------------------------------------------------------------------------------------- without a plan


@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_single_refuses_what_is_no_tensor_in_memory(name: str, which: str, device: torch.device) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    function, given = single_call(name, device)
    expected = function(**given)
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor
    for value in (None, 3, "q", [1.0]):
        with pytest.raises(TypeError, match=f"{which} is {type(value).__name__}; expected a tensor"):
            function(**{**given, which: value})
    for pretended in (given[which].to("meta"), fake(given[which])):
        with pytest.raises((ValueError, RuntimeError)):
            function(**{**given, which: pretended})
    for shape in ((), (3,), (2, 2, 2, 2)):
        with pytest.raises(ValueError):
            function(**{**given, which: torch.zeros(shape, device=device, dtype=given["q"].dtype)})
    assert torch.equal(function(**given), expected)


@pytest.mark.parametrize("name, value", CASES, ids=[f"{name}={value!r}" for name, value in CASES])
@pytest.mark.parametrize("operator", ["decode", "prefill"])
def test_single_options_out_of_range(operator: str, name: str, value: Any) -> None:
    function, given = single_call(operator, torch.device("cpu"))
    with pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}"):
        function(**given, **{name: value})


def test_single_masks_that_do_not_fit(device: torch.device) -> None:
    function, given = single_call("prefill", device)
    expected = function(**given, causal=True)
    mask = torch.ones(3, 9, device=device).tril(6).bool()
    for bad in (mask[:2], mask[:, :8], mask[None, :, :, None][..., :0], mask.flatten()[:-1]):
        with pytest.raises(ValueError, match="custom_mask"):
            function(**given, custom_mask=bad)
    packed = flashinfer.packbits(mask.flatten(), bitorder="little")
    for bad in (packed[:-1], packed.int(), packed[:0]):
        with pytest.raises(ValueError, match="packed_custom_mask"):
            function(**given, packed_custom_mask=bad)
    with pytest.raises(TypeError, match="custom_mask is list; expected a tensor"):
        function(**given, custom_mask=[True])
    for options in ({"custom_mask": mask}, {"custom_mask": mask.cpu()}, {"packed_custom_mask": packed.cpu()}):
        assert torch.equal(function(**given, **options), expected)
