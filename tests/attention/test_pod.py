# SPDX-License-Identifier: Apache-2.0
"""Prefill beside decode with arguments of their own, on both targets against the FP64 oracle, request by request."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashinfer.attention import pod
from flashinfer.attention.pod import BatchPODWithPagedKVCacheWrapper, PODWithPagedKVCacheWrapper
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import indices, memo
from tests.attention.prefill_kit import BF16, CAUSAL, Batch, Case, check, expect, make_batch
from tests.oracles.attention import attention


def workspace(device: torch.device) -> Tensor:
    return torch.full(((64 << 20) if device.type == "cuda" else 8,), 255, dtype=torch.uint8, device=device)


CPU = torch.device("cpu")
SMALL = (5, 20, 1, 1, 1, 1), (40, 33, 100, 70, 4, 129)  # queries and keys of requests
PREFILLED = Case("prefilled", qo_lens=(33, 130, 300), kv_lens=(33, 1000, 300))
DECODED = Case("decoded", qo_lens=(1,) * 5, kv_lens=(70, 4000, 1, 0, 513), options={})
APPENDED = replace(DECODED, qo_lens=(1, 3, 0, 2, 1))


def plan_pod(wrapper: Any, batches: tuple[Batch, Batch], where: torch.device, **options: Any) -> None:
    given = [x.to(where) for batch in batches for x in batch.indices]
    case = batches[0].case
    types = {"q_data_type": case.q_dtype, "kv_data_type": case.kv_dtype}
    wrapper.plan(*given, *case.heads, case.head_dim, case.page_size, **types, **options)


@pytest.mark.parametrize("decoded", [DECODED, APPENDED], ids=["decoded", "appended"])
@pytest.mark.parametrize("on_host", [True, False], ids=["on_host", "on_device"])
def test_batch_pod(decoded: Case, on_host: bool, device: torch.device) -> None:
    batches = make_batch(PREFILLED, device), make_batch(decoded, device, seed=1)
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(device))
    assert not wrapper.is_cuda_graph_enabled
    where = torch.device("cpu") if on_host else device
    expected_p = {causal: expect(batches[0], causal=causal) for causal in (True, False)}
    expected_d = expect(batches[1])
    for _ in range(2):
        plan_pod(wrapper, batches, where)
        for causal in (True, False, True):
            (out_p, out_d), (lse_p, lse_d) = wrapper.run(
                batches[0].q, batches[0].kv, batches[1].q, batches[1].kv, causal_p=causal, return_lse=True
            )
            check((out_p, lse_p), expected_p[causal])
            check((out_d, lse_d), expected_d)
    out_p, out_d = wrapper.run(batches[0].q, batches[0].kv, batches[1].q, batches[1].kv, k_scale=0.5, v_scale=3.0)
    check((out_p, expected_p[False][1]), expected_p[False])
    expected = expect(batches[1], k_scale=0.5, v_scale=3.0)
    check((out_d, expected[1]), expected)


class OneBatch:
    """Queries that are slices of one tensor, over one cache: what one launch may compute. Three requests are prefilled,
    three decoded."""

    def __init__(self, device: torch.device, qo_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> None:
        case = Case("both", qo_lens=qo_lens, kv_lens=kv_lens)
        self.batch, self.shape = make_batch(case, device), (*case.heads, case.head_dim, case.page_size)
        qo_indptr, kv_indptr, pages, last = self.batch.indices
        self.num_rows, num_pages = int(qo_indptr[3]), int(kv_indptr[3])
        self.q_p, self.q_d = self.batch.q[: self.num_rows], self.batch.q[self.num_rows :]
        beyond = pages[-2:] * 0 + 1  # of no request
        prefilled = (qo_indptr[:4], kv_indptr[:4], torch.cat([pages[:num_pages], beyond]), last[:3])
        one_each = torch.arange(4, dtype=torch.int32)
        self.indices = [*prefilled, one_each, kv_indptr[3:] - num_pages, pages[num_pages:], last[3:]]

    def indices_on(self, device: torch.device, one_each: torch.device) -> list[Tensor]:
        """New ones; one_each: where that of requests with a query each is."""
        return [x.to(one_each if i == 4 else device, copy=True) for i, x in enumerate(self.indices)]

    def plan(self, wrapper: Any, index_tensors: list[Tensor]) -> None:
        wrapper.plan(*index_tensors, *self.shape, q_data_type=BF16)

    def run(self, wrapper: Any, **options: Any) -> Any:
        return wrapper.run(self.q_p, self.batch.kv, self.q_d, self.batch.kv, **options)


@pytest.mark.parametrize("on_host", [True, False], ids=["on_host", "on_device"])
def test_batch_pod_of_one_batch_is_one_launch(
    on_host: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = OneBatch(device, (33, 130, 300, 1, 1, 1), (33, 1000, 300, 70, 4000, 1))
    batch, q_p, q_d, num_rows = one.batch, one.q_p, one.q_d, one.num_rows
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(device))
    monkeypatch.setattr(wrapper, "_joins", True)  # on the CPU too
    launches, run_both = [], wrapper._run_both
    monkeypatch.setattr(wrapper, "_run_both", lambda *args: launches.append(args) or run_both(*args))
    expected = {causal: expect(batch, causal=causal) for causal in (True, False)}
    for _ in range(2):
        one.plan(wrapper, one.indices_on(CPU if on_host else device, CPU))
        with monkeypatch.context() as capturing:  # a planner would be captured, and not run: two launches
            capturing.setattr(memo, "is_capturing", lambda tensor: True)
            outs, lses = one.run(wrapper, causal_p=True, return_lse=True)
            check((torch.cat(outs), torch.cat(lses)), expected[True])
        assert not launches
        for causal in (True, False, True):
            outs, lses = one.run(wrapper, causal_p=causal, return_lse=True)
            check((torch.cat(outs), torch.cat(lses)), expected[causal])
        out_p, out_d = one.run(wrapper, causal_p=True)
        assert torch.equal(out_p, outs[0]) and torch.equal(out_d, outs[1])
        assert len(launches) == 4
        wrapper.run(q_p.clone(), batch.kv, q_d, batch.kv)
        wrapper.run(q_p, batch.kv, q_d, batch.kv, v_scale=2.0)
        assert len(launches) == 4
        padded = torch.cat([q_p, q_p[:5], q_d])  # rows of no request between the two
        outs, lses = wrapper.run(padded[:-3], batch.kv, padded[-3:], batch.kv, causal_p=True, return_lse=True)
        assert not outs[0][num_rows:].any() and len(launches) == 5
        found = torch.cat([outs[0][:num_rows], outs[1]]), torch.cat([lses[0][:num_rows], lses[1]])
        check(found, expected[True])
        launches.clear()


@pytest.mark.parametrize("way", ["one_launch", "two_launches", "captured", "masked", "appended"])
def test_a_plan_of_batch_pod_owns_its_index_tensors(
    way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written anew as soon as plan() returned, on the device too, and runs are those of the plan: the first,
    later ones, and one with other options, which plans again."""
    monkeypatch.setattr(indices, "may_be_visible", lambda *tensors: False)  # used in place, as on a GPU
    one, wrapper = OneBatch(device, *SMALL), BatchPODWithPagedKVCacheWrapper(workspace(device))
    monkeypatch.setattr(wrapper, "_joins", way in ("one_launch", "captured"))
    if way == "captured":
        monkeypatch.setattr(memo, "is_capturing", lambda tensor: True)
    if way == "appended":  # as by one that the host does not see
        monkeypatch.setattr(pod, "_one_each", lambda qo_indptr: False)
    options: dict[str, Any] = {"return_lse": True}
    if way == "masked":
        num_bits = sum(n * m for n, m in zip(SMALL[0][:3], SMALL[1][:3]))
        options["custom_mask_p"] = torch.ones(num_bits, dtype=torch.bool, device=device)
    expected = {causal: expect(one.batch, causal=causal) for causal in (True, False)}
    for _ in range(2):
        index_tensors = one.indices_on(device, device if way == "appended" else CPU)
        one.plan(wrapper, index_tensors)
        for x in index_tensors:
            x.zero_()
        for causal in (True, True, False):
            outs, lses = one.run(wrapper, causal_p=causal, **options)
            check((torch.cat(outs), torch.cat(lses)), expected[causal and way != "masked"])


@pytest.mark.gpu
def test_batch_pod_captured() -> None:
    """Plan and run in one graph, and between the two the caller writes its index tensors anew."""
    device = torch.device("cuda")
    one, wrapper = OneBatch(device, *SMALL), BatchPODWithPagedKVCacheWrapper(workspace(device))
    index_tensors, values = one.indices_on(device, CPU), one.indices_on(device, CPU)
    one.plan(wrapper, index_tensors)
    one.run(wrapper, causal_p=True)
    torch.cuda.synchronize()
    graph, on_device = torch.cuda.CUDAGraph(), [x for x in index_tensors if x.is_cuda]
    with torch.cuda.graph(graph):
        one.plan(wrapper, index_tensors)
        for x in on_device:
            x.zero_()
        outs, lses = one.run(wrapper, causal_p=True, return_lse=True)
    for _ in range(2):
        for x, value in zip(index_tensors, values):
            x.copy_(value)
        for x in (*outs, *lses):
            x.fill_(math.nan)
        graph.replay()
        check((torch.cat(outs), torch.cat(lses)), expect(one.batch, causal=True))


def test_batch_pod_under_a_mask(device: torch.device) -> None:
    batches = make_batch(replace(PREFILLED, mask="bool", options={}), device), make_batch(DECODED, device, seed=1)
    assert batches[0].masks is not None
    mask = torch.cat([mask.flatten() for mask in batches[0].masks]).to(device)
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(device))
    plan_pod(wrapper, batches, torch.device("cpu"), window_left=100)
    given = (batches[0].q, batches[0].kv, batches[1].q, batches[1].kv)
    expected = expect(batches[0], window_left=100)
    (out, _), (lse, _) = wrapper.run(*given, custom_mask_p=mask, return_lse=True)
    check((out, lse), expected)
    (out, out_d), (lse, lse_d) = wrapper.run(*given, causal_p=True, return_lse=True)
    plain = replace(batches[0], masks=None)
    check((out, lse), expect(plain, causal=True, window_left=100))
    check((out_d, lse_d), expect(batches[1], window_left=100))


def test_a_plan_of_batch_pod_that_fails_changes_nothing() -> None:
    device = torch.device("cpu")
    batches = make_batch(PREFILLED, device), make_batch(DECODED, device, seed=1)
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(device))
    given = (batches[0].q, batches[0].kv, batches[1].q, batches[1].kv)
    with pytest.raises(ValueError, match="before plan"):
        wrapper.run(*given)
    plan_pod(wrapper, batches, device)
    before = wrapper.run(*given, causal_p=True)
    shorter = make_batch(replace(PREFILLED, qo_lens=(3, 3, 3)), device)
    wrong = replace(batches[1], indices=(*batches[1].indices[:3], batches[1].indices[3] + 100))
    with pytest.raises(ValueError, match="last_page_len"):
        plan_pod(wrapper, (shorter, wrong), device)
    after = wrapper.run(*given, causal_p=True)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_a_plan_of_batch_pod_goes_back_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where one of the two does not."""
    device = torch.device("cpu")
    batches = make_batch(PREFILLED, device), make_batch(DECODED, device, seed=1)
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(device))
    plan_pod(wrapper, batches, device)
    settled = wrapper._decode._settled()

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(wrapper._prefill, "_resettle", fail)
    monkeypatch.setattr(wrapper, "_copy_what_is_in_place", fail)
    with pytest.raises(MemoryError):
        plan_pod(wrapper, batches, device)
    assert wrapper._decode._settled() == settled


def test_batch_pod_refuses() -> None:
    batches = make_batch(PREFILLED, CPU), make_batch(DECODED, CPU, seed=1)
    wrapper = BatchPODWithPagedKVCacheWrapper(workspace(CPU))
    case, given = batches[0].case, [x for batch in batches for x in batch.indices]
    shapes = (*case.heads, case.head_dim, case.page_size)
    for wrong in (None, 7):
        with pytest.raises(TypeError, match="kv_indptr_d"):
            wrapper.plan(*given[:5], wrong, *given[6:], *shapes, q_data_type=case.q_dtype)
    with pytest.raises(ValueError, match="qo_indptr"):
        wrapper.plan(*given[:4], given[4][:0], *given[5:], *shapes, q_data_type=case.q_dtype)
    plan_pod(wrapper, batches, CPU)
    wrapper._joins = True  # as on a GPU
    for cache in (None, 7):
        with pytest.raises(TypeError, match="the KV cache is"):
            wrapper.run(batches[0].q, cache, batches[1].q, cache)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pod(layout: str, device: torch.device) -> None:
    batch, generator = make_batch(DECODED, device), torch.Generator().manual_seed(4)
    wrapper = PODWithPagedKVCacheWrapper(workspace(device))
    assert not wrapper.is_cuda_graph_enabled
    types = {"q_data_type": BF16, "kv_data_type": BF16}
    wrapper.plan(*batch.indices[1:], 8, 2, 128, 16, sm_scale=0.11, **types)
    expected = expect(batch, sm_scale=0.11)
    for qo_len, kv_len, options in (
        (70, 700, CAUSAL), (70, 700, {}), (5, 9, {"window_left": 3, "causal": True}), (70, 700, {"sm_scale": 0.3}),
    ):  # fmt: skip
        q, k, v = (
            torch.randn(n, h, 128, generator=generator).to(BF16) for n, h in ((qo_len, 8), (kv_len, 2), (kv_len, 2))
        )
        rows = [x if layout == "NHD" else x.transpose(0, 1).contiguous() for x in (k, v)]
        given = [x.to(device) for x in (q, *rows)]
        named_p = {f"{name}_p": value for name, value in options.items()}
        out_p, out_d = wrapper.run(*given, batch.q, batch.kv, kv_layout_p=layout, sm_scale_d=0.11, **named_p)
        out, lse = attention(q, k, v, **options)
        check((out_p, lse), (out, lse))
        check((out_d, expected[1]), expected)
        mask = torch.rand(qo_len, kv_len, generator=generator) < 0.5
        out_p, _ = wrapper.run(*given, batch.q, batch.kv, kv_layout_p=layout, custom_mask_p=mask.to(device))
        out, lse = attention(q, k, v, custom_mask=mask)
        check((out_p, lse), (out, lse))


def test_pod_refuses() -> None:
    device = torch.device("cpu")
    batch, wrapper = make_batch(DECODED, device), PODWithPagedKVCacheWrapper(workspace(device))
    given = (batch.q, *torch.zeros(2, 20, 2, 128, dtype=BF16), batch.q, batch.kv)
    with pytest.raises(ValueError, match="before plan"):
        wrapper.run(*given)
    wrapper.plan(*batch.indices[1:], 8, 2, 128, 16, window_left=20, q_data_type=BF16)
    wrapper.run(*given, window_left_d=20)
    for options, message in (
        ({"window_left_d": 5}, r"window_left_d is 5; expected -1 or what was planned, 20"),
        ({"pos_encoding_mode_d": "ALIBI"}, "pos_encoding_mode_d is 'ALIBI'"),
        ({"custom_mask_d": batch.q}, "custom_mask_d is tensor"),
    ):
        with pytest.raises(UnsupportedConfig, match=message):
            wrapper.run(*given, **options)
    with pytest.raises(UnsupportedConfig, match="jit_args"):
        PODWithPagedKVCacheWrapper(workspace(device), jit_args=["x"])
