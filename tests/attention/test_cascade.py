# SPDX-License-Identifier: Apache-2.0
"""Merging of attention states, and shared prefixes, on both targets against the FP64 oracle."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.cascade import variable_length_merge_states
from flashinfer.errors import KernelMissing, UnsupportedConfig
from tests.oracles.attention import attention
from tests.tolerances import assert_close

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def merged(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """FP64: states [num_states, ..., head_dim] and their base-2 LSE; -inf weighs nothing, whatever v holds."""
    v, s = v.cpu().double(), s.cpu().double()
    total = torch.logsumexp(s * math.log(2), dim=0) / math.log(2)
    weight = torch.where(s.isinf(), 0.0, torch.exp2(s - torch.where(total.isinf(), 0.0, total)))
    return (torch.where(weight[..., None] > 0, v, 0.0) * weight[..., None]).sum(0), total


def states(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    v = torch.randn(shape, generator=generator).to(device, dtype)
    s = (torch.randn(shape[:-1], generator=generator) * 8).to(device)
    return v, s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(7, 8, 128), (1, 1, 64), (33, 5, 96), (3, 4, 256), (65, 3, 512), (0, 4, 128)], ids=str
)
def test_merge_state(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    v, s = states(device, dtype, 2, *shape)
    if shape[0] > 2:
        s[0, 0] = s[1, 1] = -math.inf  # no keys on one side, and on the other
        v[0, 0] = math.nan
        s[:, 2] = -math.inf  # on either
        v[:, 2] = math.nan
    out, lse = flashinfer.merge_state(v[0], s[0], v[1], s[1])
    expected = merged(v, s)
    assert_close(out, expected[0])
    assert_close(lse, expected[1])


def test_merge_state_far_apart(device: torch.device) -> None:
    """Statistics that overflow an exponential: the greater one is the result."""
    v, s = states(device, torch.float32, 2, 4, 2, 64)
    s[0], s[1] = 3e4, -3e4
    out, lse = flashinfer.merge_state(v[0], s[0], v[1], s[1])
    assert torch.equal(out, v[0]) and torch.equal(lse, s[0])


def test_merging_what_is_strided_unaligned_or_of_another_dtype(device: torch.device) -> None:
    """Copied as kernels read it; a second call, whose signature is known, copies again."""
    v, s = states(device, torch.bfloat16, 2, 6, 4, 64)
    unaligned = torch.empty(v[1].numel() + 1, dtype=v.dtype, device=device)[1:].view(v[1].shape)
    unaligned.copy_(v[1])
    v_strided, s_strided = (
        v.transpose(1, 2).contiguous().transpose(1, 2),
        s.transpose(1, 2).contiguous().transpose(1, 2),
    )
    expected, s_half = merged(v, s), s.half()
    expected_half = merged(v, torch.stack([s[0], s_half[1].float()]))
    offsets = torch.tensor([0, 1, 2], device=device)
    for _ in range(2):
        for actual in (
            flashinfer.merge_state(v_strided[0], s_strided[0], unaligned, s[1]),
            flashinfer.merge_states(v_strided.transpose(0, 1), s_strided.transpose(0, 1)),
        ):
            assert_close(actual[0], expected[0])
            assert_close(actual[1], expected[1])
        out, lse = v[0].clone(), s[0].clone()
        flashinfer.merge_state_in_place(out, lse, unaligned, s_half[1])
        assert_close(out, expected_half[0])
        assert_close(lse, expected_half[1])
        single = variable_length_merge_states(unaligned[:2], s_half[1, :2], offsets)  # int64 offsets
        assert torch.equal(single[0], v[1, :2]) and torch.equal(single[1], s_half[1, :2].float())


@pytest.mark.sanitizer
@pytest.mark.parametrize("masked", [False, True])
def test_merge_state_in_place(device: torch.device, masked: bool) -> None:
    v, s = states(device, torch.bfloat16, 2, 50, 6, 128)
    mask = (torch.arange(50) % 3 != 0).to(device) if masked else None
    expected = merged(v, s)
    kept, kept_s = v[0].clone(), s[0].clone()
    out, lse = v[0].clone(), s[0].clone()
    assert flashinfer.merge_state_in_place(out, lse, v[1], s[1], mask) is None
    if mask is not None:
        assert torch.equal(out[~mask], kept[~mask])
        torch.testing.assert_close(lse[~mask], kept_s[~mask], rtol=1e-6, atol=1e-6)
        out, lse, expected = out[mask], lse[mask], (expected[0][mask.cpu()], expected[1][mask.cpu()])
    assert_close(out, expected[0])
    assert_close(lse, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_states", [0, 1, 2, 9])
def test_merge_states(device: torch.device, dtype: torch.dtype, num_states: int) -> None:
    v, s = states(device, dtype, 11, num_states, 4, 128)
    if num_states > 2:
        s[3, 1:] = -math.inf
        v[3, 2] = math.nan
    out, lse = flashinfer.merge_states(v, s)
    if num_states == 0:
        assert (out == 0).all() and (lse == -math.inf).all()
        return
    expected = merged(v.transpose(0, 1), s.transpose(0, 1))
    assert_close(out, expected[0])
    assert_close(lse, expected[1])


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_read_where_they_lie(device: torch.device, dtype: torch.dtype) -> None:
    """Blocks of outputs and LSE as ranks exchange them: rows side by side within a state, states apart, nothing between
    read."""
    num_states, seq_len, num_heads, head_dim = 5, 7, 3, 64
    v, s = states(device, dtype, num_states, seq_len, num_heads, head_dim)
    s[2] = -math.inf
    v_bytes, s_bytes = v[0].numel() * dtype.itemsize, s[0].numel() * 4
    block = torch.full((num_states, v_bytes + s_bytes + 12 + 16), 0xFF, dtype=torch.uint8, device=device)[:, :-16]
    blocks = [row[:v_bytes].view(dtype).view(v.shape[1:]) for row in block]
    lses = [row[v_bytes : v_bytes + s_bytes].view(torch.float32).view(s.shape[1:]) for row in block]
    for one, lse, given, given_lse in zip(blocks, lses, v, s):
        one.copy_(given)
        lse.copy_(given_lse)
    stride = block.stride(0)
    rows = blocks[0].as_strided(
        (seq_len, num_states, num_heads, head_dim), (num_heads * head_dim, stride // dtype.itemsize, head_dim, 1)
    )
    lse_rows = lses[0].as_strided((seq_len, num_states, num_heads), (num_heads, stride // 4, 1))
    out, lse = flashinfer.merge_states(rows, lse_rows)
    expected = merged(v, s)
    assert_close(out, expected[0])
    assert_close(lse, expected[1])
    single = variable_length_merge_states(
        rows[2], lse_rows[2], torch.arange(num_states + 1, dtype=torch.int32, device=device)
    )
    kept = lse_rows[2] > -math.inf
    assert torch.equal(single[0][kept], rows[2][kept]) and torch.equal(single[1], lse_rows[2])


@pytest.mark.sanitizer
def test_variable_length_merge_states(device: torch.device) -> None:
    lengths = [3, 0, 1, 70, 0, 2]
    v, s = states(device, torch.float16, sum(lengths), 3, 64)
    indptr = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    out, lse = variable_length_merge_states(v, s, indptr)
    for i, n in enumerate(lengths):
        begin = sum(lengths[:i])
        if n == 0:
            assert (out[i] == 0).all() and (lse[i] == -math.inf).all()
            continue
        expected = merged(v[begin : begin + n], s[begin : begin + n])
        assert_close(out[i], expected[0])
        assert_close(lse[i], expected[1])


def test_merge_errors(device: torch.device) -> None:
    v, s = states(device, torch.float32, 2, 3, 2, 64)
    with pytest.raises(ValueError, match="shape"):
        flashinfer.merge_state(v[0], s[0][:2], v[1], s[1])
    with pytest.raises(ValueError, match="contiguous"):
        flashinfer.merge_state_in_place(v[0].transpose(0, 1), s[0].T, v[1], s[1])
    with pytest.raises(UnsupportedConfig, match="float16"):
        flashinfer.merge_state(v[0].double(), s[0], v[1].double(), s[1])
    with pytest.raises(ValueError, match=r"s is torch\.float16; expected float32"):
        flashinfer.merge_state_in_place(v[0], s[0].half(), v[1], s[1])
    with pytest.raises(ValueError, match=r"v starts 4 bytes after a multiple of 16; call \.clone\(\)"):
        flashinfer.merge_state_in_place(v.flatten()[1 : 1 + v[0].numel()].view(v[0].shape), s[0], v[1], s[1])
    with pytest.raises(ValueError, match=r"expected \[num_states, num_heads, head_dim\]"):
        variable_length_merge_states(v, s, torch.tensor([0, 1], device=device))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [[0, 1, 4], [0, 2, 1, 3], [-1, 3], [4, 4], [0, 1 << 40], [-(1 << 32), 3]], ids=str)
def test_wrong_offsets_of_states(dtype: torch.dtype, offsets: list[int]) -> None:
    """Each time, as offsets are no part of a signature; and before int32 makes a right number of a wrong one."""
    if dtype == torch.int32 and max(map(abs, offsets)) >= 1 << 31:
        return
    v, s = states(torch.device("cpu"), torch.float32, 3, 2, 64)
    variable_length_merge_states(v, s, torch.tensor([0, 1, 2, 3][: len(offsets)], dtype=dtype))
    with pytest.raises(
        (ValueError, IndexError), match=r"never descend|ends at .*; expected at most 3, the states in v"
    ):
        variable_length_merge_states(v, s, torch.tensor(offsets, dtype=dtype))


def test_rows_to_merge(device: torch.device) -> None:
    """The mask of merge_state_in_place: any dtype, strided, or an error that leaves v as it is."""
    v, s = states(device, torch.float32, 2, 3, 2, 64)
    merged_v, _ = merged(v, s)
    for mask in (torch.tensor([0.0, 0.5, -1.0]), torch.tensor([0, 2, 255]).byte(), torch.tensor([0, 9, 1, 9, 1])[::2]):
        out = v[0].clone()
        flashinfer.merge_state_in_place(out, s[0].clone(), v[1], s[1], mask.to(device))
        assert torch.equal(out[0], v[0, 0])
        assert_close(out[1:], merged_v[1:])
    for wrong in (
        torch.ones(2).bool(),
        torch.ones(()).bool(),
        torch.ones(3, 1).bool(),
        torch.ones(3).bool().to("meta"),
    ):
        wrong = wrong if wrong.is_meta else wrong.to(device)
        with pytest.raises(ValueError, match=r"mask is .*; expected \[3\], the rows of v, on"):
            flashinfer.merge_state_in_place(v[0], s[0], v[1], s[1], wrong)
    with pytest.raises(TypeError, match=r"mask is list; expected a tensor"):
        flashinfer.merge_state_in_place(v[0], s[0], v[1], s[1], [True])  # type: ignore[arg-type]


def test_states_without_columns(device: torch.device) -> None:
    """No kernel; not a success that leaves s unwritten."""
    v, s = torch.empty(2, 3, 2, 0, device=device), torch.zeros(2, 3, 2, device=device)
    with pytest.raises(UnsupportedConfig, match="head_dim=0 is not supported"):
        flashinfer.merge_state(v[0], s[0], v[1], s[1])
    with pytest.raises(UnsupportedConfig, match="head_dim=0 is not supported"):
        flashinfer.merge_states(v.transpose(0, 1), s.transpose(0, 1))


# ------------------------------------------------------------------------------------------------------ shared prefixes

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 128, 16


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


class SharedPrefix:
    """A batch with a common prefix of full pages and unique rests, in one paged cache."""

    def __init__(self, device: torch.device, qo_lens: list[int], shared_len: int, unique_lens: list[int]) -> None:
        generator = torch.Generator().manual_seed(5)
        self.qo_lens, self.unique_lens = qo_lens, unique_lens
        lengths = [shared_len, *unique_lens]
        rows = [torch.randn(2, n, KV_HEADS, DIM, generator=generator).bfloat16() for n in lengths]
        pages = [-(-n // PAGE) for n in lengths]
        self.cache = torch.full((sum(pages), 2, PAGE, KV_HEADS, DIM), math.nan).bfloat16()
        for row, first in zip(rows, offsets(pages).tolist()):
            for page, begin in enumerate(range(0, row.shape[1], PAGE)):
                piece = row[:, begin : begin + PAGE]
                self.cache[first + page, :, : piece.shape[1]] = piece
        self.cache = self.cache.to(device)
        self.q = torch.randn(sum(qo_lens), HEADS, DIM, generator=generator).bfloat16().to(device)
        self.shared = rows[0].to(device)
        self.rows = rows
        self.shared_indices = (
            offsets([sum(qo_lens)]), offsets(pages[:1]), torch.arange(pages[0], dtype=torch.int32),
            torch.tensor([(shared_len - 1) % PAGE + 1], dtype=torch.int32),
        )  # fmt: skip
        self.unique_indices = (
            offsets(qo_lens), offsets(pages[1:]), torch.arange(pages[0], sum(pages), dtype=torch.int32),
            torch.tensor([(n - 1) % PAGE + 1 for n in unique_lens], dtype=torch.int32),
        )  # fmt: skip

    def expected(self, causal: bool) -> Tensor:
        outs, begin = [], 0
        for qo_len, row in zip(self.qo_lens, self.rows[1:]):
            k, v = torch.cat([self.rows[0], row], dim=1)
            outs.append(attention(self.q[begin : begin + qo_len], k, v, causal=causal)[0])
            begin += qo_len
        return torch.cat(outs)


def workspace(device: torch.device) -> Tensor:
    return torch.empty((64 << 20) if device.type == "cuda" else 8, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("causal", [False, True])
def test_multi_level_cascade(device: torch.device, causal: bool) -> None:
    batch = SharedPrefix(device, [5, 1, 40], 160, [20, 1, 90])
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(device))
    both = zip(batch.shared_indices, batch.unique_indices)
    wrapper.plan(*(list(pair) for pair in both), HEADS, KV_HEADS, DIM, PAGE, causal=causal, q_data_type="bfloat16")
    # Two roundings of the parts to bf16 before the merge.
    assert_close(wrapper.run(batch.q, batch.cache), batch.expected(causal), scale=2.0)


def test_decode_with_shared_prefix(device: torch.device) -> None:
    batch = SharedPrefix(device, [1, 1, 1, 1], 96, [20, 1, 90, 16])
    wrapper = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(device))
    wrapper.begin_forward(*batch.unique_indices[1:], HEADS, KV_HEADS, DIM, PAGE, data_type="bfloat16")
    out = wrapper.forward(batch.q, batch.shared[0], batch.shared[1], batch.cache)
    assert_close(out, batch.expected(False), scale=2.0)
    wrapper.end_forward()


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_with_shared_prefix(device: torch.device, causal: bool) -> None:
    batch = SharedPrefix(device, [5, 1, 40], 96, [20, 1, 90])
    wrapper = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace(device))
    wrapper.begin_forward(*batch.unique_indices, HEADS, KV_HEADS, DIM, PAGE)
    out = wrapper.forward(batch.q, batch.shared[0], batch.shared[1], batch.cache, causal=causal)
    assert_close(out, batch.expected(causal), scale=2.0)
    wrapper.end_forward()


# --------------------------------------------------------------------------------------------------- plans that fail

OPTIONS = (HEADS, KV_HEADS, DIM, PAGE)


def make_cascade(device: torch.device, use_cuda_graph: bool = False) -> flashinfer.MultiLevelCascadeAttentionWrapper:
    """For graphs of up to three requests, else for any."""
    index = lambda *sizes: [torch.zeros(n, dtype=torch.int32, device=device) for n in sizes]  # noqa: E731
    buffers = [index(2, 4), index(2, 4), index(20, 20), index(1, 3)] if use_cuda_graph else [None] * 4
    return flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(device), "NHD", use_cuda_graph, *buffers)


def tables(batch: SharedPrefix, device: torch.device) -> list[list[Tensor]]:
    return [
        [shared.to(device), unique.to(device)] for shared, unique in zip(batch.shared_indices, batch.unique_indices)
    ]


def with_last(table: list[list[Tensor]], which: int, change: Callable[[Tensor], Any]) -> list[list[Any]]:
    """The table with another tensor for the last level."""
    return [[pair[0], change(pair[1])] if i == which else pair for i, pair in enumerate(table)]


# name -> the index tensors of a plan that fails at the last level, of those of one that does not
FAILING: dict[str, Callable[[list[list[Tensor]]], list[list[Any]]]] = {
    "offsets of another batch": lambda t: with_last(t, 1, lambda x: x[:-1]),
    "offsets that descend": lambda t: with_last(t, 1, lambda x: x.cpu().flip(0)),
    "lengths of another batch": lambda t: with_last(t, 3, lambda x: x[:-1]),
    "float pages": lambda t: with_last(t, 2, lambda x: x.cpu().float()),
    "pages of two axes": lambda t: with_last(t, 2, lambda x: x.cpu()[None]),
    "on meta": lambda t: with_last(t, 2, lambda x: x.to("meta")),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_plan_that_fails_leaves_the_last_one(device: torch.device, name: str) -> None:
    batch, other = SharedPrefix(device, [5, 1, 40], 160, [20, 1, 90]), SharedPrefix(device, [3, 2, 4], 32, [7, 9, 5])
    wrapper = make_cascade(device)
    wrong = FAILING[name](tables(other, device))
    with pytest.raises((ValueError, TypeError)):
        wrapper.plan(*wrong, *OPTIONS, q_data_type="bfloat16")
    with pytest.raises(ValueError, match=r"run\(\) before plan\(\)"):
        wrapper.run(other.q, other.cache)
    wrapper.plan(*tables(batch, device), *OPTIONS, causal=True, q_data_type="bfloat16")
    expected = wrapper.run(batch.q, batch.cache)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError)):
            wrapper.plan(*wrong, *OPTIONS, q_data_type="bfloat16")
        assert torch.equal(wrapper.run(batch.q, batch.cache), expected)
    assert_close(expected, batch.expected(True), scale=2.0)
    wrapper.plan(*tables(other, device), *OPTIONS, q_data_type="bfloat16")
    assert_close(wrapper.run(other.q, other.cache), other.expected(False), scale=2.0)


def test_a_plan_that_fails_within_the_last_level(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it fails, and with what: here once all index tensors are taken."""
    batch, other = SharedPrefix(device, [5, 1, 40], 160, [20, 1, 90]), SharedPrefix(device, [3, 2, 4], 32, [7, 9, 5])
    wrapper = make_cascade(device)
    wrapper.plan(*tables(batch, device), *OPTIONS, q_data_type="bfloat16")
    expected = wrapper.run(batch.q, batch.cache)
    plan = flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan

    def fail_behind(level: Any, *args: Any, **options: Any) -> None:
        plan(level, *args, **options)
        if level is wrapper._levels[1]:
            raise KernelMissing("no store")

    with monkeypatch.context() as patch, pytest.raises(KernelMissing):
        patch.setattr(flashinfer.BatchPrefillWithPagedKVCacheWrapper, "plan", fail_behind)
        wrapper.plan(*tables(other, device), *OPTIONS, q_data_type="bfloat16")
    assert torch.equal(wrapper.run(batch.q, batch.cache), expected)


@pytest.mark.parametrize("name", ["offsets of another batch", "offsets that descend", "lengths of another batch"])
def test_a_plan_for_graphs_that_fails_forbids_runs(device: torch.device, name: str) -> None:
    """Its buffers are the caller's and may have been filled: no run mixes two plans."""
    batch = SharedPrefix(device, [5, 1, 40], 160, [20, 1, 90])
    wrapper = make_cascade(device, use_cuda_graph=True)
    wrapper.plan(*tables(batch, device), *OPTIONS, q_data_type="bfloat16")
    with pytest.raises((ValueError, TypeError)):
        wrapper.plan(*FAILING[name](tables(batch, device)), *OPTIONS, q_data_type="bfloat16")
    with pytest.raises(ValueError, match=r"the last plan\(\) failed .*; call plan\(\) again"):
        wrapper.run(batch.q, batch.cache)
    wrapper.plan(*tables(batch, device), *OPTIONS, q_data_type="bfloat16")
    assert_close(wrapper.run(batch.q, batch.cache), batch.expected(False), scale=2.0)


def test_lists_of_levels(device: torch.device) -> None:
    batch = SharedPrefix(device, [5, 1, 40], 160, [20, 1, 90])
    table = tables(batch, device)
    wrapper = make_cascade(device)
    for i, name in enumerate(
        ("qo_indptr_arr", "paged_kv_indptr_arr", "paged_kv_indices_arr", "paged_kv_last_page_len")
    ):
        for wrong in (table[i][:1], [*table[i], table[i][0]], [], table[i][1], None):
            with pytest.raises(ValueError, match=rf"multi_level_cascade: {name} .*; expected a list of 2, one a level"):
                wrapper.plan(*table[:i], wrong, *table[i + 1 :], *OPTIONS)  # type: ignore[arg-type]
    on_host = tables(batch, torch.device("cpu"))
    on_host[0][0] = offsets([45])
    with pytest.raises(ValueError, match=r"the entries of qo_indptr_arr end at \[45, 46\]; expected the same number"):
        wrapper.plan(*on_host, *OPTIONS, q_data_type="bfloat16")
    for wrong_levels in (0, -1, 257, (1 << 31) - 1, 1 << 70):
        with pytest.raises(ValueError, match=r"num_levels is .*; expected at least 1"):
            flashinfer.MultiLevelCascadeAttentionWrapper(wrong_levels, workspace(device))
    for no_number in (1.5, "2", None):
        with pytest.raises(TypeError, match=r"num_levels is .*; expected an integer"):
            flashinfer.MultiLevelCascadeAttentionWrapper(no_number, workspace(device))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected a list of 2, one a level"):
        buffers = [[torch.zeros(4, dtype=torch.int32, device=device)] * 3] * 4
        flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(device), "NHD", True, *buffers)
    with pytest.raises(ValueError, match=r"int_workspace_buffers has 1 entries; expected a list of 2"):
        wrapper.reset_workspace_buffer(workspace(device), [workspace(device)])
    wrapper.reset_workspace_buffer(workspace(device), [workspace(device)] * 3)
    first = wrapper._levels[0]._int_workspace_buffer
    with pytest.raises(ValueError, match=r"the workspace must be a contiguous tensor"):
        wrapper.reset_workspace_buffer(workspace(device), [workspace(device), workspace(device)[::2]])
    if device.type == "cuda":
        with pytest.raises(ValueError, match="a workspace is on cpu; expected cuda:0, the device of the wrapper"):
            wrapper.reset_workspace_buffer(workspace(device), [workspace(device), workspace(torch.device("cpu"))])
    assert wrapper._levels[0]._int_workspace_buffer is first


WRAPPERS = (
    lambda buffer: flashinfer.MultiLevelCascadeAttentionWrapper(2, buffer),
    flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
)


@pytest.mark.parametrize("make", WRAPPERS, ids=("multi level", "decode", "prefill"))
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, lambda wrapper: copy.deepcopy([wrapper])])
def test_copies_are_refused(make: Callable[[Tensor], object], copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"cannot be copied: it holds addresses .*; make a new one and call plan\(\)"):
        copied(make(workspace(torch.device("cpu"))))


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_shared_parts_of_other_shapes(device: torch.device, name: str) -> None:
    """Of k_shared and v_shared, whose result is merged with that of the cache."""
    batch = SharedPrefix(device, [1, 1, 1], 96, [20, 1, 90])
    if name == "decode":
        decode = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(device))
        decode.begin_forward(*batch.unique_indices[1:], *OPTIONS, data_type="bfloat16")
        forward: Callable[..., Tensor] = decode.forward
    else:
        prefill = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace(device))
        prefill.begin_forward(*batch.unique_indices, *OPTIONS, q_data_type="bfloat16")
        forward = prefill.forward
    k, v = batch.shared
    for other in (v[..., :0], v[..., :64].contiguous(), v[:, :1], v[:5], v[0], v.float(), v.to("meta"), None):
        with pytest.raises((ValueError, TypeError)):
            forward(batch.q, k, other, batch.cache)
        with pytest.raises((ValueError, TypeError)):
            forward(batch.q, other, v, batch.cache)
    for function in (flashinfer.single_decode_with_kv_cache, flashinfer.single_prefill_with_kv_cache):
        q = batch.q[0] if function is flashinfer.single_decode_with_kv_cache else batch.q
        with pytest.raises(ValueError, match="expected a head_dim of 1 or more"):
            function(q, k, v[..., :0])
