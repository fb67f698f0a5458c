# SPDX-License-Identifier: Apache-2.0
"""Attention of the C++ headers on the CPU, through the C interface: the bits of Python's wrappers, over caches whose
unused memory is NaN; what does not fit is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer import target
from flashinfer.families.attention.decode import decode
from flashinfer.families.attention.mla import mla
from flashinfer.families.attention.prefill import prefill
from flashinfer.jit import KernelSpec
from tests.cpp.kit import (
    Api,
    CError,
    Kernels,
    MlaShape,
    Options,
    Shape,
    Workspace,
    options,
    page_table,
    tensor,
    write_set,
)

HOST = target.host()
QO_HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 4
FP32, INT32 = torch.float32, torch.int32
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window and soft cap": {"window_left": 5, "logits_soft_cap": 3.0, "sm_scale": 0.2},
}
NO_WORKSPACE = Workspace()


def specs() -> list[KernelSpec]:
    of_both = {"q_dtype": "fp32", "kv_dtype": "fp32", "head_dim": DIM}
    window = {"has_window": True, "has_soft_cap": True}
    return [
        decode(HOST, **of_both, group_size=2),
        decode(HOST, **of_both, group_size=2, **window),
        decode(HOST, **of_both, group_size=2, has_sinks=True),
        decode(HOST, **of_both, group_size=2, kv_storage="single"),
        prefill(HOST, **of_both),
        prefill(HOST, **of_both, **window),
        prefill(HOST, **of_both, kv_storage="ragged"),
        prefill(HOST, **of_both, kv_storage="single"),
        mla(HOST, q_dtype="fp32", mask="causal"),
    ]


@pytest.fixture(scope="module")
def kernels(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return api.open([write_set(tmp_path_factory.mktemp("set"), specs())])


class Batch:
    """Requests over shuffled pages; what none of them uses is NaN. One has no keys."""

    def __init__(self, *row_shape: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = (9, 0, 1, 23)
        counts = [-(-length // PAGE) for length in lengths]
        self.kv_lens = torch.tensor(lengths, dtype=INT32)
        self.indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=INT32)
        self.indices = torch.randperm(sum(counts) + 3, generator=generator).to(INT32)
        self.last = torch.tensor([(length - 1) % PAGE + 1 for length in lengths], dtype=INT32)
        self.cache = torch.full((sum(counts) + 3, 2, PAGE, *row_shape), math.nan)
        for i, length in enumerate(lengths):
            for j in range(length):
                page = int(self.indices[int(self.indptr[i]) + j // PAGE])
                self.cache[page, :, j % PAGE] = torch.randn(2, *row_shape, generator=generator)
        self.qo_indptr = torch.tensor([0, 3, 3, 4, 9], dtype=INT32)
        self.num_tokens = 9

    def table(self, last: torch.Tensor | None = None) -> Any:
        return page_table(self.indptr, self.indices, self.last if last is None else last)


@pytest.fixture
def batch() -> Batch:
    return Batch(KV_HEADS, DIM)


def shape_of(**given: int) -> Shape:
    return Shape(
        **{**dict(zip([field[0] for field in Shape._fields_], (QO_HEADS, KV_HEADS, DIM, 0, PAGE, 0, 0, 0))), **given}
    )


@pytest.mark.parametrize("case", OPTIONS)
def test_batch_decode(case: str, batch: Batch, kernels: Kernels) -> None:
    given = OPTIONS[case]
    q, out, lse = (
        torch.randn(4, QO_HEADS, DIM),
        torch.full((4, QO_HEADS, DIM), math.nan),
        torch.full((4, QO_HEADS), math.nan),
    )
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    wrapper.plan(
        batch.indptr,
        batch.indices,
        batch.last,
        QO_HEADS,
        KV_HEADS,
        DIM,
        PAGE,
        q_data_type=FP32,
        kv_data_type=FP32,
        **given,
    )
    expected = wrapper.run(q, batch.cache, return_lse=True)
    made = kernels.make("batch_decode", NO_WORKSPACE)
    made.plan(batch.table(), shape_of(), options(**given))
    made.run(q, batch.cache[:, 0], batch.cache[:, 1], out, lse)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) and not out.isnan().any()


def test_batch_decode_of_layout_hnd_with_sinks(batch: Batch, kernels: Kernels) -> None:
    q, out, sinks = torch.randn(4, QO_HEADS, DIM), torch.full((4, QO_HEADS, DIM), math.nan), torch.randn(QO_HEADS)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    sizes = (QO_HEADS, KV_HEADS, DIM, PAGE)
    wrapper.plan(batch.indptr, batch.indices, batch.last, *sizes, q_data_type=FP32, kv_data_type=FP32)
    expected = wrapper.run(q, batch.cache, sinks=sinks)
    made = kernels.make("batch_decode", NO_WORKSPACE)
    made.plan(batch.table(), shape_of(), options(sinks=sinks.data_ptr()))
    cache = batch.cache.transpose(2, 3).contiguous().transpose(2, 3)
    made.run(q, cache[:, 0], cache[:, 1], out, None)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", OPTIONS)
def test_batch_prefill(case: str, batch: Batch, kernels: Kernels) -> None:
    given = OPTIONS[case]
    q = torch.randn(9, QO_HEADS, DIM)
    out, lse = torch.full((9, QO_HEADS, DIM), math.nan), torch.full((9, QO_HEADS), math.nan)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    wrapper.plan(
        batch.qo_indptr, batch.indptr, batch.indices, batch.last, QO_HEADS, KV_HEADS, DIM, PAGE, causal=True,
        q_data_type=FP32, **given,
    )  # fmt: skip
    expected = wrapper.run(q, batch.cache, return_lse=True)
    made = kernels.make("batch_prefill", NO_WORKSPACE)
    made.plan(batch.qo_indptr, 9, batch.table(), shape_of(), options(is_causal=1, **given))
    made.run(q, batch.cache[:, 0], batch.cache[:, 1], out, lse)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) and not out.isnan().any()


def test_ragged_prefill(kernels: Kernels) -> None:
    q, k, v = torch.randn(9, QO_HEADS, DIM), torch.randn(20, KV_HEADS, DIM), torch.randn(20, KV_HEADS, DIM)
    qo_indptr, kv_indptr = (torch.tensor(x, dtype=INT32) for x in ([0, 3, 9], [0, 7, 20]))
    out = torch.full((9, QO_HEADS, DIM), math.nan)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    wrapper.plan(qo_indptr, kv_indptr, QO_HEADS, KV_HEADS, DIM, causal=True, q_data_type=FP32)
    made = kernels.make("batch_prefill", NO_WORKSPACE)
    made.plan_ragged(qo_indptr, 9, kv_indptr, shape_of(), options(is_causal=1))
    made.run_ragged(q, k, v, out, None)
    assert torch.equal(out, wrapper.run(q, k, v))


def test_single(kernels: Kernels) -> None:
    q, k, v = torch.randn(5, QO_HEADS, DIM), torch.randn(20, KV_HEADS, DIM), torch.randn(20, KV_HEADS, DIM)
    out, first = torch.full_like(q, math.nan), torch.full_like(q[0], math.nan)
    kernels.single_prefill(NO_WORKSPACE, q, k, v, out, options(is_causal=1))
    assert torch.equal(out, flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True))
    kernels.single_decode(NO_WORKSPACE, q[0], k, v, first, options())
    assert torch.equal(first, flashinfer.single_decode_with_kv_cache(q[0], k, v))
    long = tensor(k)
    long.shape[0] = 1 << 32  # which would be none in 32 bits
    with pytest.raises(CError, match="expected 0 to 2"):
        kernels.single_decode(NO_WORKSPACE, q[0], long, long, first, options())


def test_mla(kernels: Kernels) -> None:
    batch, num_heads, dims = Batch(576), 3, (512, 64)
    ckv, kpe = batch.cache[:, 0].split(dims, dim=-1)
    q_nope, q_pe = torch.randn(9, num_heads, 512), torch.randn(9, num_heads, 64)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    wrapper.plan(
        batch.qo_indptr, batch.indptr, batch.indices, batch.kv_lens, num_heads, 512, 64, PAGE, True, 0.1, FP32, FP32
    )
    expected = wrapper.run(q_nope, q_pe, ckv, kpe, return_lse=True)
    out, lse = torch.full_like(q_nope, math.nan), torch.full((9, num_heads), math.nan)
    made = kernels.make("mla", NO_WORKSPACE)
    shape, numbers = MlaShape(num_heads, 512, 64, PAGE, 0, 0), (1, 0.1, 1.0)
    made.plan(batch.qo_indptr, 9, batch.table(batch.kv_lens), shape, *numbers)
    made.run(q_nope, q_pe, ckv, kpe, out, lse)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) and not out.isnan().any()


# ------------------------------------------------------------------------------------------------------------- refused


def _refused(made: Kernels, *plan: Any, run: tuple[Any, ...] | None = None) -> str:
    with pytest.raises(CError) as caught:
        made.plan(*plan)
        assert run is not None
        made.run(*run)
    return str(caught.value)


def test_index_tensors_that_lead_nowhere(batch: Batch, kernels: Kernels) -> None:
    q = torch.zeros(4, QO_HEADS, DIM)
    run = (q, batch.cache[:, 0], batch.cache[:, 1], q.clone(), None)
    made = kernels.make("batch_decode", NO_WORKSPACE)

    def refusal(**changed: list[int]) -> str:
        parts = {"indptr": batch.indptr, "indices": batch.indices, "last": batch.last}
        parts |= {name: torch.tensor(values, dtype=INT32) for name, values in changed.items()}
        return _refused(made, page_table(*parts.values()), shape_of(), options(), run=run)

    assert "indptr[2] is 1; expected 3 or more" in refusal(indptr=[0, 3, 1, 4, 5])
    assert "indptr ends at 99; expected at most" in refusal(indptr=[0, 3, 3, 4, 99])
    assert "last_page_len[0] is 5; expected 1 to 4" in refusal(last=[5, 1, 1, 1])
    assert "last_page_len[3] is 0" in refusal(last=[1, 1, 1, 0])
    assert "indices[1] is -1; expected 0 or more" in refusal(indices=[0, -1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert "the planned page numbers go up to 77" in refusal(indices=[0, 77, 2, 3, 4, 5, 6, 7, 8, 9])
    assert "go up to 2147483647" in refusal(indices=[0, (1 << 31) - 1, 2, 3, 4, 5, 6, 7, 8, 9])
    made.plan(batch.table(), shape_of(), options())  # and works on
    made.run(*run)


def test_index_tensors_that_change_behind_a_plan(batch: Batch, kernels: Kernels) -> None:
    """They are the caller's: a run looks at them again, and neither reads nor writes where they lead."""
    cache, q, far = (batch.cache[:, 0], batch.cache[:, 1]), torch.zeros(9, QO_HEADS, DIM), (1 << 31) - 1
    qo_indptr, indptr, indices, last = (x.clone() for x in (batch.qo_indptr, batch.indptr, batch.indices, batch.last))
    shape, table = shape_of(), page_table(indptr, indices, last)
    latent, lens = torch.zeros(len(batch.cache), PAGE, 576), batch.kv_lens.clone()
    ckv, kpe = latent.split((512, 64), dim=-1)
    one, many, rows, mla = (
        kernels.make(name, NO_WORKSPACE) for name in ("batch_decode", *["batch_prefill"] * 2, "mla")
    )
    one.plan(table, shape, options())
    many.plan(qo_indptr, 9, table, shape, options(is_causal=1))
    rows.plan_ragged(qo_indptr, 9, indptr, shape, options(is_causal=1))
    mla.plan(qo_indptr, 9, page_table(indptr, indices, lens), MlaShape(3, 512, 64, PAGE, 0, 0), 1, 0.1, 1.0)
    out, wide = torch.full_like(q, 7.0), torch.full((9, 3, 512), 7.0)
    k, narrow = torch.zeros(int(indptr[-1]), KV_HEADS, DIM), torch.zeros(9, 3, 64)
    runs = {
        "decode": lambda: one.run(q[: len(last)], *cache, out[: len(last)], None),
        "prefill": lambda: many.run(q, *cache, out, None),
        "ragged": lambda: rows.run_ragged(q, k, k, out, None),
        "mla": lambda: mla.run(torch.zeros(9, 3, 512), narrow, ckv, kpe, wide, None),
    }
    of_pages, of_rows = ("decode", "prefill", "mla"), ("prefill", "ragged", "mla")
    for tensor_of, at, value, names in (
        (indices, 0, far, of_pages),
        (indices, 0, -1, of_pages),
        (indptr, -1, far, tuple(runs)),
        (indptr, 1, -1, tuple(runs)),
        (last, 0, far, of_pages[:2]),
        (lens, 0, far, ("mla",)),
        (qo_indptr, -1, far, of_rows),
        (qo_indptr, 1, far, of_rows),
    ):
        kept = int(tensor_of[at])
        tensor_of[at] = value
        for name in names:
            with pytest.raises(CError, match=r"expected|go up to|reach"):
                runs[name]()
        tensor_of[at] = kept
    assert bool((out == 7).all()) and bool((wide == 7).all())


def test_tensors_that_do_not_fit(batch: Batch, kernels: Kernels) -> None:
    q = torch.zeros(4, QO_HEADS, DIM)
    k, v = batch.cache.unbind(1)
    made, plan = kernels.make("batch_decode", NO_WORKSPACE), (batch.table(), shape_of(), options())
    with pytest.raises(CError, match="nothing is planned"):
        made.run(q, k, v, q.clone(), None)
    cases = {
        "q is fp32 [3, 4, 64]; expected [4, 4, 64]": (q[:3], k, v, q.clone(), None),
        "q is bf16 [4, 4, 64]; expected fp32": (q.bfloat16(), k, v, q.clone(), None),
        "out is fp32 [4, 4, 32]": (q, k, v, q[..., :32], None),
        "the k cache is fp32": (q, k[:, :2], v, q.clone(), None),
        "the last axis of q is not dense": (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, q.clone(), None),
        "lse is fp32 [4, 3]": (q, k, v, q.clone(), torch.zeros(4, 3)),
    }
    for message, run in cases.items():
        assert message in _refused(made, *plan, run=run)
    assert "expected a positive multiple" in _refused(made, batch.table(), shape_of(num_kv_heads=3), options())
    assert "expected int32" in _refused(made, page_table(batch.indptr.long(), batch.indices, batch.last), *plan[1:])


def test_a_plan_that_fails_changes_nothing(batch: Batch, kernels: Kernels) -> None:
    q, out = torch.randn(4, QO_HEADS, DIM), torch.empty(4, QO_HEADS, DIM)
    made = kernels.make("batch_decode", NO_WORKSPACE)
    made.plan(batch.table(), shape_of(), options())
    made.run(q, batch.cache[:, 0], batch.cache[:, 1], out, None)
    _refused(made, batch.table(), shape_of(head_dim_qk=96), Options(window_left=-1, q_scale=1, k_scale=1, v_scale=1))
    again = torch.empty_like(out)
    made.run(q, batch.cache[:, 0], batch.cache[:, 1], again, None)
    assert torch.equal(again, out)
